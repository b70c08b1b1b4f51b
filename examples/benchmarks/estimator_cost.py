"""What a step with each curvature estimator costs beside one without; one json.

    python examples/benchmarks/estimator_cost.py MODEL [--device cpu] [--batch-size 2] [--length 512] [--rounds 3]

Every estimator has a model prepared for it, over the same weights; their steps (forward, backward, curvature, no
optimizer) take turns in one process. ``amortised``: at the paper preset's probes, one step in K of a run of 150.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM

from sparseforge_fx import SparseModel, paper_preset, prepare
from sparseforge_fx.methods.curvature import ESTIMATORS
from sparseforge_fx.report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "estimator_cost"


def main(
    model: str,
    device: str = "cpu",
    batch_size: int = 2,
    length: int = 512,
    rounds: int = 3,
    threads: int = 0,
    label: str = "",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    options = {"attn_implementation": "eager"}  # the fused attention has no second derivative
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **options).eval().to(device)
    net.get_input_embeddings().weight.requires_grad_(False)
    ids = torch.randint(0, net.config.vocab_size, (batch_size, length), device=device)
    prepared = {name: prepare(net, None, paper_preset(150, curvature=name)).train() for name in ESTIMATORS}
    runs = {"none": lambda: step(prepared["squared_gradient"], ids, probe=False)}
    runs |= {name: lambda sparse=sparse: step(sparse, ids, probe=True) for name, sparse in prepared.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            clock = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - clock)
    median = {name: statistics.median(t) for name, t in times.items()}
    every = paper_preset(150).probe_every
    record = {
        "model": Path(model).name,
        "batch_size": batch_size,
        "length": length,
        "rounds": rounds,
        "median_seconds": median,
        "spread": {name: [min(t), max(t)] for name, t in times.items()},
        "over_none": {name: t / median["none"] for name, t in median.items()},
        "amortised": {name: 1 + (t / median["none"] - 1) / every for name, t in median.items()},
        **environment(),
    }
    write_json(RESULTS / f"{label or Path(model).name + '-' + device}.json", record)
    print(record["over_none"])


def step(sparse: SparseModel, ids: torch.Tensor, *, probe: bool) -> None:
    """One step without an optimizer; the mask update that may follow is left out."""
    sparse.steps_done = 0 if probe else 1
    sparse(input_ids=ids)
    assert sparse.last_loss is not None
    sparse.last_loss.total.backward()
    sparse.step()
    for p in sparse.parameters():
        p.grad = None
    if ids.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
