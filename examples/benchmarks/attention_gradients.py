"""Gradients of causal attention in bfloat16 on a CPU: our kernel's beside torch's, in turn; one json.

    python examples/benchmarks/attention_gradients.py [--shapes 1x9x512x64,...] [--rounds 15] [--threads 0]

Of a forward pass that both share; random inputs, heads behind positions as a projection gives them. Errors are relative
to the gradients in float64, of queries, keys and values together.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
import typer
from common import medians_and_spread, save, seconds_in_turn, use

from sparseforge_fx.kernels import cpu

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def main(
    shapes: str = "1x9x512x64,2x9x512x64,1x9x2048x64,1x32x1024x128",
    rounds: int = 15,
    threads: int = 0,
    label: str = "cpu",
) -> None:
    use(threads=threads)
    if not cpu.differentiates_attention():
        sys.exit(
            "the kernel needs a CPU with instructions for bfloat16, and a C++ compiler: there is nothing to compare"
        )
    torch.manual_seed(0)
    record = {
        "rounds": rounds,
        "instruction_set": cpu.instruction_set(),
        "cases": [measure(tuple(map(int, shape.split("x"))), rounds) for shape in shapes.split(",")],
    }
    save("attention_gradients", label, record)


def measure(shape: tuple[int, ...], rounds: int) -> dict:
    """Seconds of both, how often ours is faster, and errors, of one [batch, heads, length, size]."""
    batch, heads, length, size = shape
    query, key, value, gradient = (torch.randn(batch, length, heads, size).bfloat16().transpose(1, 2) for _ in range(4))
    seen = torch.ones(length, length).tril().bool()
    mask = torch.zeros(1, 1, length, length, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    out, logsumexp = flash(query, key, value, 0.0, False, attn_mask=mask)
    scale = size**-0.5
    given = gradient, query, key, value
    runs = {
        "torch": partial(flash_backward, *given, out, logsumexp, 0.0, False, attn_mask=mask, scale=scale),
        "ours": partial(cpu.attention_backward, *given, mask, out, logsumexp, causal=False, scale=scale),
    }
    seconds_in_turn(runs, 2)  # warms up
    found = medians_and_spread(seconds_in_turn(runs, rounds))
    wide = [t.double().requires_grad_() for t in given[1:]]
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide, attn_mask=mask.double()), wide, gradient.double())
    median = found["median_seconds"]
    row = {
        "shape": list(shape),
        **found,
        "speedup": median["torch"] / median["ours"],
        "relative_error": {name: relative(run(), exact) for name, run in runs.items()},
    }
    print(row)
    return row


def relative(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    error = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return float((error / sum(b.square().sum() for b in exact)).sqrt())


if __name__ == "__main__":
    typer.run(main)
