"""What a heating step costs beside a dense distillation step of the same model, batch and loop; one json.

    python examples/benchmarks/training_overhead.py MODEL [--device cpu] [--batch-size 4] [--length 512] [--rounds 5]

The kinds of step are interleaved in one process and their medians compared. Probe steps and mask updates are
amortised over the periods that the paper's preset takes at 20,000 steps and at 150. No optimizer is in any of the
steps: it would flatter the ratio. Curvature estimators are timed in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import medians_and_spread, model_and_ids, save, seconds_in_turn, use

from sparseforge_fx import SparseModel, annealed_preset, prepare
from sparseforge_fx.graph.compile import compile_repeated_blocks
from sparseforge_fx.report import peak_memory_bytes


def main(
    model: str,
    device: str = "cpu",
    batch_size: int = 4,
    length: int = 512,
    rounds: int = 5,
    threads: int = 0,
    compile: Annotated[bool, typer.Option(help="also time the same steps under torch.compile")] = False,
    label: str = "",
) -> None:
    use(device, threads)
    net, ids = model_and_ids(model, device, batch_size, length)
    clock = time.perf_counter()
    sparse = prepare(net, None, annealed_preset(150))
    prepared = time.perf_counter() - clock
    sparse.train()
    modes = {"eager": 0.0}
    times: dict[str, dict[str, list[float]]] = {"eager": measure(kinds(sparse, ids), rounds)}
    memory = extra_memory(sparse)
    if compile:
        clock = time.perf_counter()
        sparse.compile()
        compiled = kinds(sparse, ids)
        for kind in compiled.values():
            kind()
        modes["compiled"] = time.perf_counter() - clock
        times["compiled"] = measure(compiled, rounds)
    record = {
        "model": Path(model).name,
        "batch_size": batch_size,
        "length": length,
        "rounds": rounds,
        "prepare_seconds": prepared,
        "compile_seconds": modes.get("compiled"),
        "modes": {mode: summarise(t) for mode, t in times.items()},
        "extra_memory": memory,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    save("training_overhead", label or f"{Path(model).name}-{device}", record)
    print(record["modes"], record["extra_memory"])


def kinds(sparse: SparseModel, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    """The steps that are compared. The dense one runs the dense graph of the same capture against the same teacher."""
    dense = sparse.dense.module() if sparse.compiled is None else compile_repeated_blocks(sparse.dense.module())
    weights = [p for p in sparse.parameters() if p.requires_grad]

    def backward(loss: Any) -> None:
        loss.total.backward()
        for p in weights:
            p.grad = None

    def dense_step() -> None:
        output = dense(input_ids=ids)
        backward(sparse.loss(output, sparse.reader.read((), {"input_ids": ids}), teach=True))

    def masked(step: int) -> None:
        sparse.steps_done = step
        sparse(input_ids=ids)
        backward(sparse.last_loss)

    every = sparse.method.config.probe_every
    return {
        "dense": dense_step,
        "heating": lambda: masked(1 if every > 1 else 0),
        "probe": lambda: masked(0),
        "mask_update": lambda: sparse.method._update(0.05),
    }


def measure(todo: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    todo["probe"]()  # curvature for the first mask update
    for run in todo.values():
        run()
    return seconds_in_turn(todo, rounds)


def summarise(times: dict[str, list[float]]) -> dict:
    out: dict = medians_and_spread(times)
    median = out["median_seconds"]
    for steps in (150, 20_000):
        preset = annealed_preset(steps)
        cost = median["heating"] + (median["probe"] - median["heating"]) / preset.probe_every
        out[f"amortised_over_dense_at_{steps}_steps"] = (cost + median["mask_update"] / preset.update_every) / median[
            "dense"
        ]
    return out


def extra_memory(sparse: SparseModel) -> dict[str, float]:
    """Bytes that heating adds per site weight: masks, curvature, anything else that the method holds."""
    numel = sum(w.weight.numel() for w in sparse.method.weights)
    mask = sum(w.mask.numel() * w.mask.element_size() for w in sparse.method.weights)
    curvature = sum(v.numel() * v.element_size() for v in sparse.method.curvature.values.values())
    soft = sum(v.numel() * v.element_size() for v in sparse.method.soft.values())
    return {
        "mask_bytes_per_weight": mask / numel,
        "curvature_bytes_per_weight": curvature / numel,
        "other_bytes_per_weight": soft / numel,
    }


if __name__ == "__main__":
    typer.run(main)
