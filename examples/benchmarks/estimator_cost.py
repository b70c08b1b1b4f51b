"""What a step with each curvature estimator costs beside one without; one json.

    python examples/benchmarks/estimator_cost.py MODEL [--device cpu] [--batch-size 2] [--length 512] [--rounds 3]

Every estimator has a model prepared for it, over the same weights; their steps (forward, backward, curvature, no
optimizer) take turns in one process. ``amortised``: at the probes of preset annealed, one step in K of a run of 150.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from common import medians_and_spread, model_and_ids, save, seconds_in_turn, use

from sparseforge_fx import SparseModel, annealed_preset, prepare
from sparseforge_fx.methods.curvature import ESTIMATORS


def main(
    model: str,
    device: str = "cpu",
    batch_size: int = 2,
    length: int = 512,
    rounds: int = 3,
    threads: int = 0,
    label: str = "",
) -> None:
    use(device, threads)
    # the fused attention has no second derivative
    net, ids = model_and_ids(model, device, batch_size, length, attn_implementation="eager")
    prepared = {name: prepare(net, None, annealed_preset(150, curvature=name)).train() for name in ESTIMATORS}
    runs = {"none": lambda: step(prepared["squared_gradient"], ids, probe=False)}
    runs |= {name: lambda sparse=sparse: step(sparse, ids, probe=True) for name, sparse in prepared.items()}
    seconds_in_turn(runs, 1)  # warms up
    found = medians_and_spread(seconds_in_turn(runs, rounds))
    median = found["median_seconds"]
    every = annealed_preset(150).probe_every
    record = {
        "model": Path(model).name,
        "batch_size": batch_size,
        "length": length,
        "rounds": rounds,
        **found,
        "over_none": {name: t / median["none"] for name, t in median.items()},
        "amortised": {name: 1 + (t / median["none"] - 1) / every for name, t in median.items()},
    }
    save("estimator_cost", label or f"{Path(model).name}-{device}", record)
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


if __name__ == "__main__":
    typer.run(main)
