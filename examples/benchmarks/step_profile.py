"""Where the time of a distillation step with fixed masks goes, by kind of operator; one json.

    python examples/benchmarks/step_profile.py MODEL [--dtypes bfloat16,float32] [--batch-size 2] [--length 512]

Random tokens, masks from the weights' own sizes (a start does not change what a step costs). Steps are timed without the
profiler and profiled after that, in the same run of each dtype; a kind's share is of the profiled steps' own time. The
products' speed counts two operations for each multiply-add, as torch's profiler does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import language_model, save, use
from torch.profiler import ProfilerActivity, profile

import sparseforge_fx as sf

#: kind -> how the names of its operators begin; what none of them names is "other"
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "sparseforge_cpu::attention"),
    "loss": ("aten::_log_softmax", "aten::log_softmax", "aten::exp", "aten::gather", "aten::scatter", "aten::addcmul"),
    "optimizer": ("aten::_foreach", "aten::_fused", "Optimizer"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::_to_copy"),
    "elementwise": (
        "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::silu", "aten::gelu", "aten::relu", "aten::pow", "aten::rsqrt",
        "aten::mean", "aten::sum", "aten::neg", "aten::square", "aten::sqrt", "aten::threshold", "aten::native_layer_norm",
    ),
}  # fmt: skip
PLAIN, PROFILED = 4, 2  # steps


def main(
    model: str,
    dtypes: Annotated[str, typer.Option(help="by commas")] = "bfloat16,float32",
    batch_size: int = 2,
    length: int = 512,
    threads: int = 0,
    label: str = "",
) -> None:
    use(threads=threads)
    record = {
        "model": Path(model).name, "batch_size": batch_size, "length": length,
        "dtypes": {name: steps_of(model, getattr(torch, name), batch_size, length) for name in dtypes.split(",")},
    }  # fmt: skip
    save("step_profile", label or f"{Path(model).name}-cpu", record)
    print(record["dtypes"])


def steps_of(model: str, dtype: torch.dtype, batch_size: int, length: int) -> dict[str, Any]:
    """Seconds of a step, shares by kind, and the products' speed, of one dtype."""
    net = language_model(model, dtype)
    steps = 2 + PLAIN + PROFILED  # the first two are slower
    ids = torch.randint(0, net.config.vocab_size, (steps * batch_size, length))
    data = [{"input_ids": part, "labels": part} for part in ids.split(batch_size)]
    profiler, seconds = profile(activities=[ProfilerActivity.CPU], with_flops=True), []

    def on_step(step: int, row: dict[str, float]) -> None:
        seconds.append(row["seconds"])
        if step == 1 + PLAIN:
            profiler.start()
        elif step == steps - 1:
            profiler.stop()

    sf.sparsify(
        net, data, start="wanda", calibration=1, steps=steps, compile=False, show_progress=False, on_step=on_step
    )
    found = profiler.key_averages()
    rows = [(row.key, row.self_cpu_time_total / 1e6) for row in found]
    kinds = by_kind(rows)
    flops = sum(row.flops for row in found if kind_of(row.key) == "products")
    return {
        "seconds": median(seconds[2 : 2 + PLAIN]),
        "tokens_per_second": batch_size * length / median(seconds[2 : 2 + PLAIN]),
        "shares": {kind: spent / sum(kinds.values()) for kind, spent in kinds.items()},
        "gflops_of_products": flops / 1e9 / kinds["products"],
        "operators": {key: spent / PROFILED for key, spent in sorted(rows, key=lambda row: -row[1])[:20]},
    }


def by_kind(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of every kind, the largest first."""
    spent: dict[str, float] = defaultdict(float, products=0.0)
    for key, seconds in rows:
        spent[kind_of(key)] += seconds
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def kind_of(key: str) -> str:
    return next((kind for kind, names in KINDS.items() if key.startswith(names)), "other")


if __name__ == "__main__":
    typer.run(main)
