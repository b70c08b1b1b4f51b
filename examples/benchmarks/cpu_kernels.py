"""The packed 2:4 linear beside torch's dense linear on this CPU, per shape, rows, dtype and threads; one json.

    python examples/benchmarks/cpu_kernels.py [--label NAME] [--seconds-per-case 0.6] [--shapes 4096x4096,...]

Dense and sparse calls alternate in one process. Every call takes another copy of its weight, so that weights come
from memory (at most 64 copies: the small model's stay in the last-level cache, as they do in use). ``sparse`` is the
operator, ``sparse_kernel`` the C++ call inside it: the difference is what Python costs in eager mode. ``expanded`` is
what the operator does beyond ``max_rows`` of kernels/cpu/rows_linear.h, which this measures if --rows are many.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from common import random_two_four, save

from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.packed import Packed, pack
from sparseforge_fx.kernels.sparse_linear import OP

LARGE = "4096x4096,11008x4096,4096x11008"
SMALL = "576x576,192x576,1536x576,576x1536,960x576,3072x576"  # SmolLM2-135M; the last two are q/k/v and gate/up merged


def main(
    label: str = "cpu",
    shapes: str = f"{LARGE},{SMALL}",
    rows: str = "1,2,4,8,16,32,64",
    threads: str = "1,2",
    seconds_per_case: float = 0.6,
    rotate_bytes: int = 400_000_000,
) -> None:
    cases = []
    for shape, dtype in itertools.product(shapes.split(","), (torch.bfloat16, torch.float32)):
        out, in_features = map(int, shape.split("x"))
        dense, packed = weights(out, in_features, dtype, rotate_bytes)
        for count, m in itertools.product(map(int, threads.split(",")), map(int, rows.split(","))):
            torch.set_num_threads(count)
            x = torch.randn(m, in_features).to(dtype)
            times = measure(contestants(x, dense, packed), seconds_per_case)
            case = {"out": out, "in": in_features, "dtype": str(dtype)[6:], "threads": count, "rows": m}
            case |= summarise(times, dense[0].nbytes, packed[0].nbytes)
            cases.append(case)
            print(f"{shape} {case['dtype']} {count} threads, {m} rows: {case['speedup_of_medians']:.2f}", flush=True)
    record = {
        "instruction_set": cpu.instruction_set(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "rotated_bytes_of_dense_weights": rotate_bytes,
        "load_average": Path("/proc/loadavg").read_text().split()[:3],
        "cases": cases,
    }
    save("kernels", label, record)


def weights(out: int, in_features: int, dtype: torch.dtype, rotate_bytes: int) -> tuple[list, list[Packed]]:
    """Copies of one 2:4 weight, dense and packed."""
    weight = random_two_four(out, in_features).to(dtype)
    first = pack(weight)
    copies = min(64, max(2, -(-rotate_bytes // weight.nbytes)))
    packed_copies = min(64, max(2, -(-rotate_bytes // first.nbytes)))
    return (
        [weight.clone() for _ in range(copies)],
        [first._replace(values=first.values.clone(), bitmask=first.bitmask.clone()) for _ in range(packed_copies)],
    )


def contestants(x: torch.Tensor, dense: list, packed: list[Packed]) -> dict[str, Callable[[], object]]:
    turn_dense, turn_packed, turn_kernel, turn_expanded = map(itertools.cycle, (dense, packed, packed, packed))

    def operator() -> torch.Tensor:
        p = next(turn_packed)
        return OP(x, p.values, p.bitmask, "rows", p.in_features)

    return {
        "dense": lambda: F.linear(x, next(turn_dense)),
        "sparse": operator,
        "sparse_kernel": lambda: cpu.rows_linear(x, *next(turn_kernel)),  # without the operator's Python
        "expanded": lambda: F.linear(x, cpu.rows_dense(*next(turn_expanded))),
    }


@torch.inference_mode()
def measure(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["dense"]) < 7:
        for name, run in runs.items():
            clock = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - clock)
    return times


def summarise(times: dict[str, list[float]], dense_bytes: int, packed_bytes: int) -> dict:
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    medians = {name: q[1] for name, q in quartiles.items()}
    bytes_of = {name: dense_bytes if name == "dense" else packed_bytes for name in times}
    return {
        "rounds": len(times["dense"]),
        "median_microseconds": {name: 1e6 * t for name, t in medians.items()},
        "quartiles_microseconds": {name: [1e6 * q[0], 1e6 * q[2]] for name, q in quartiles.items()},
        "best_microseconds": {name: 1e6 * min(values) for name, values in times.items()},
        "weight_gigabytes_per_second": {name: bytes_of[name] / t / 1e9 for name, t in medians.items()},
        "speedup_of_medians": medians["dense"] / medians["sparse"],
        "speedup_of_best": min(times["dense"]) / min(times["sparse"]),
        "median_of_ratios": statistics.median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True)),
    }


def last_level_cache_bytes() -> int | None:
    try:
        sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except OSError:
        return None
    return max((int(s[:-1]) * {"K": 1024, "M": 1024**2}[s[-1]] for s in sizes), default=None)


if __name__ == "__main__":
    typer.run(main)
