"""A layer of experts in every format beside transformers' own in bfloat16, on this CPU; one json.

    python examples/benchmarks/experts_decode.py [--label NAME] [--experts 64] [--rounds 30]

One layer by the sides of Qwen3-30B-A3B (hidden 2048, experts of 768, eight of them for a token) with random weights and
half of its experts, router included. All formats are called in turn, every call with tokens that were not seen before,
so that the chosen experts come from memory. Beside each layer stands what a plan would say of its two products (``measure``
of deploy/lowering), timed in the same process.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
import typer
from common import in_turn, save, use
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.deploy.lowering.measure import measure
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.layouts import layouts_of
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

DENSE, SPARSE = ("dense", "dense int8", "dense int4"), ("2:4", "2:4 int8", "2:4 int4")


def main(
    label: str = "cpu",
    experts: int = 64,
    hidden: int = 2048,
    width: int = 768,
    tokens: str = "1,8,64",
    rounds: int = 30,
    threads: int = 0,
) -> None:
    """Time one layer in six formats and write results/experts_decode/LABEL.json."""
    use("cpu", threads)
    torch.manual_seed(0)
    models = {name: packed(experts, hidden, width, name) for name in (*DENSE, *SPARSE)}
    layers = {name: model.model.layers[0].mlp for name, model in models.items()}
    rows = []
    counts = [int(count) for count in tokens.split(",")]
    products = priced(experts, hidden, width, counts)
    for count in counts:
        runs = {name: partial(seconds, layer, count, hidden) for name, layer in layers.items()}
        in_turn(runs, 3)  # warm
        times = in_turn(runs, rounds)
        for name, found in times.items():
            ratios = sorted(base / own for base, own in zip(times["dense"], found, strict=True))
            quarter = len(ratios) // 4
            rows.append(
                {
                    "tokens": count, "format": name, "bytes": stored(layers[name]), "median_seconds": statistics.median(found),
                    "products_seconds": products[name, count], "median_of_ratios": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    save(
        "experts_decode", label, {"experts": experts, "hidden": hidden, "width": width, "rounds": rounds, "rows": rows}
    )


def packed(experts: int, hidden: int, width: int, name: str) -> Qwen3MoeForCausalLM:
    """A model of one layer whose experts are in that format, all of them with the same weights but for zeros."""
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, num_experts=experts, num_experts_per_tok=min(8, experts),
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).bfloat16().eval()
    stacks = [p for p in model.parameters() if p.dim() == 3]
    with torch.no_grad():
        for stack in stacks if name in SPARSE else ():
            stack.mul_(hard_mask(stack.abs(), TWO_FOUR))
    if name == "2:4":
        sf.lower_modules(model, gate=False)
    elif "int" in name:
        sf.quantize(model, name.split()[-1], include=["*.experts.*"])
    return model


def priced(experts: int, hidden: int, width: int, counts: list[int]) -> dict[tuple[str, int], float]:
    """Seconds of both products of a layer, by format and tokens, as a plan has them."""
    found = dict.fromkeys(((name, count) for name in (*DENSE, *SPARSE) for count in counts), 0.0)
    routing = cost_table.Routing(experts, min(8, experts))
    for out, into in ((2 * width, hidden), (hidden, width)):
        shapes = {
            name: cost_table.Shape.of(out, into, torch.bfloat16, parse_format(name), routing)
            for name in (*DENSE[1:], *SPARSE)
        }
        device = torch.device("cpu")
        table = measure(list(shapes.values()), counts, device, layouts_of(device), rounds=7)
        for name, shape in shapes.items():
            best = cost.of_one_layout(table[shape].values(), counts)
            for count in counts:
                found[name, count] += best[count].packed_us / 1e6
        for count in counts:
            found["dense", count] += best[count].dense_us / 1e6
    return found


@torch.no_grad()
def seconds(layer: nn.Module, count: int, hidden: int) -> float:
    x = torch.randn(1, count, hidden, dtype=torch.bfloat16)
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


def stored(layer: Any) -> int:
    tensors = [*layer.experts.parameters(), *layer.experts.buffers()]
    return sum(t.nbytes for t in tensors)


if __name__ == "__main__":
    typer.run(main)
