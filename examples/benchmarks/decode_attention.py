"""Attention of the next token on a CPU: our kernel beside torch's and beside loops of Inductor's, in turn; one json.

    python examples/benchmarks/decode_attention.py [--shapes 1x9x3x576x64,...] [--dtype bfloat16] [--rounds 9] [--threads 0]

A shape is batch x heads x heads of keys x positions x width of a head. A run goes over so many caches, of random numbers,
that none is left from the one before, as over a model's layers; times are of one. ``torch`` is its own operator with the
queries that share keys as rows of one head, as transformers calls it for the next token; ``repeated`` the same with keys
and values repeated for them, as it does where a graph is captured; ``inductor`` products and sums in float32, compiled for
the shape. Errors are relative to attention in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import typer
from common import medians_and_spread, save, seconds_in_turn, use
from torch import Tensor

from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.decode_attention import decode_attention


def main(
    shapes: str = "1x9x3x128x64,1x9x3x576x64,8x9x3x128x64,8x9x3x576x64,1x32x8x576x128,8x32x8x576x128",
    dtype: str = "bfloat16",
    rounds: int = 9,
    threads: int = 0,
    rotated_bytes: int = 200_000_000,
    label: str = "cpu",
) -> None:
    use(threads=threads)
    if not cpu.available():
        sys.exit("the kernel needs a C++ compiler: there is nothing to compare")
    torch.manual_seed(0)
    sizes = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    cases = [measure(size, getattr(torch, dtype), rounds, rotated_bytes) for size in sizes]
    about = {"dtype": dtype, "rounds": rounds, "rotated_bytes": rotated_bytes}
    save("decode_attention", label, {**about, "instruction_set": cpu.instruction_set(), "cases": cases})


def measure(size: tuple[int, ...], dtype: torch.dtype, rounds: int, rotated_bytes: int) -> dict[str, Any]:
    """Microseconds of each contender for one cache, and errors, of one shape."""
    batch, heads, key_heads, positions, width = size
    query = torch.randn(batch, heads, 1, width).to(dtype)
    mask = torch.ones(batch, 1, 1, positions, dtype=torch.bool)
    of_one = 2 * batch * positions * key_heads * width * dtype.itemsize
    caches = [
        [torch.randn(batch, positions, key_heads, width).to(dtype).transpose(1, 2) for _ in range(2)]
        for _ in range(1 + rotated_bytes // of_one)
    ]
    ways = {"torch": by_torch, "repeated": by_torch_repeated, "inductor": torch.compile(by_products, dynamic=False)}
    ways["ours"] = by_our_kernel
    runs = {name: partial(over, caches, partial(way, query, mask)) for name, way in ways.items()}
    seconds_in_turn(runs, 1)  # compiles
    found = medians_and_spread(seconds_in_turn(runs, rounds))
    exact = by_torch_repeated(query.double(), mask, *(t.double() for t in caches[0]))
    median = {name: 1e6 * s / len(caches) for name, s in found["median_seconds"].items()}
    case = {
        "shape": list(size),
        **found,
        "caches": len(caches),
        "microseconds": median,
        "gigabytes_per_second": {name: of_one / us / 1e3 for name, us in median.items()},
        "relative_error": {
            name: float((way(query, mask, *caches[0]).double() - exact).norm() / exact.norm())
            for name, way in ways.items()
        },
    }
    print(size, {name: f"{us:.0f} us" for name, us in median.items()}, flush=True)
    return case


def over(caches: list[list[Tensor]], way: Callable[..., Tensor]) -> None:
    for key, value in caches:
        way(key, value)


def by_torch(query: Tensor, mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.view(*key.shape[:2], -1, key.shape[3]), key, value, mask).view_as(query)


def by_torch_repeated(query: Tensor, mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (repeated(t, query.shape[1]) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask)


def by_products(query: Tensor, mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (repeated(t, query.shape[1]).float() for t in (key, value))
    scores = (query.float() / math.sqrt(query.shape[-1]) * key).sum(-1, keepdim=True)
    shares = scores.masked_fill(~mask.transpose(-1, -2), -math.inf).softmax(-2)
    return (shares * value).sum(-2, keepdim=True).to(query.dtype)


def by_our_kernel(query: Tensor, mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return decode_attention(query, key, value, mask, 1 / math.sqrt(query.shape[-1]))


def repeated(t: Tensor, heads: int) -> Tensor:
    batch, few, positions, width = t.shape
    return t[:, :, None].expand(batch, few, heads // few, positions, width).reshape(batch, heads, positions, width)


if __name__ == "__main__":
    typer.run(main)
