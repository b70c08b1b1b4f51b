"""Seconds that each layer-wise method takes for one weight; one json.

    python examples/benchmarks/one_shot_speed.py [--out-features 4096] [--in-features 4096] [--rounds 3]

Methods are interleaved in one process; inputs are correlated Gaussian tokens, twice as many as the layer is wide.
"""

from __future__ import annotations

import torch
import typer
from common import medians_and_spread, save, seconds_in_turn, use

from sparseforge_fx.methods.alps import prune_alps
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.pattern import TWO_FOUR, hard_mask


def main(out_features: int = 4096, in_features: int = 4096, rounds: int = 3, threads: int = 0) -> None:
    use(threads=threads)
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * 0.02
    mix = torch.eye(in_features) + torch.randn(in_features, in_features) * (0.3 / in_features**0.5)
    x = torch.randn(2 * in_features, in_features) @ mix
    moments = x.t() @ x / len(x)
    solvers = {
        "magnitude": lambda: weight * hard_mask(weight.abs(), TWO_FOUR),
        "wanda": lambda: weight * hard_mask(weight.abs() * moments.diagonal().sqrt(), TWO_FOUR),
        "sparsegpt": lambda: prune_obs(weight, moments, TWO_FOUR).weight,
        "alps": lambda: prune_alps(weight, moments, TWO_FOUR)[0],
    }

    def error(found: torch.Tensor) -> float:
        delta = found - weight
        return float((delta @ moments * delta).sum() / (weight @ moments * weight).sum())

    errors = {name: error(solve()) for name, solve in solvers.items()}
    record = {
        "shape": [out_features, in_features],
        "rounds": rounds,
        **medians_and_spread(seconds_in_turn(solvers, rounds)),
        "relative_output_error": errors,
    }
    save("one_shot_speed", f"{out_features}x{in_features}-{torch.get_num_threads()}threads", record)
    print(record["median_seconds"], errors)


if __name__ == "__main__":
    typer.run(main)
