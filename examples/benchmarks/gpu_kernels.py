"""2:4 products on this GPU against the best dense ones, per shape and number of rows; one json.

    python examples/benchmarks/gpu_kernels.py [--minutes 8] [--compiled] [--no-tune] [--shapes llama-7b,opt-6.7b]

Every candidate is first compared with a float32 product; one that is wrong gets no time. Times are those of CUDA-graph
replays over as many copies of the weight as exceed the L2 cache, in interleaved rounds. When the minutes are over,
what was measured is written. --dry runs the same code on tiny CPU tensors and writes nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch.sparse import to_sparse_semi_structured

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.gpu import cusparselt
from sparseforge_fx.kernels.gpu.planes import planes_to_dense, to_planes
from sparseforge_fx.kernels.gpu.planes_linear import expand_planes, planes_linear, tune
from sparseforge_fx.kernels.gpu.tiles import DECODE_ROWS, bucket
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "kernels"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
SHAPES = {  # out, in; q/k/v and gate/up as one linear each, as the deployed graph merges them
    "llama-7b": ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (11008, 4096)),
    "llama-3-8b": ((6144, 4096), (28672, 4096), (4096, 14336)),
    "opt-6.7b": ((16384, 4096), (4096, 16384)),
    "opt-1.3b": ((2048, 2048), (6144, 2048), (8192, 2048), (2048, 8192)),
    "opt-125m": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "smollm2-135m": ((576, 576), (960, 576), (3072, 576), (576, 1536)),
}
DRY_SHAPES = {"dry": ((32, 64), (48, 80))}
COLD_BYTES = 256 << 20  # of weights between two uses of the same one; more than five times an H200's L2

Call = Callable[[torch.Tensor], torch.Tensor]


def main(
    minutes: float = 8.0,
    rounds: int = 7,
    shapes: str = ",".join(SHAPES),
    compiled: Annotated[
        bool, typer.Option(help="also time torch.compile(mode='max-autotune') of the dense linear")
    ] = False,
    tune_tiles: Annotated[bool, typer.Option("--tune/--no-tune", help="search tiles before timing")] = True,
    dry: Annotated[bool, typer.Option(help="tiny shapes on the CPU, nothing written")] = False,
    label: str = "",
) -> None:
    if not dry and not torch.cuda.is_available():
        print("gpu_kernels.py needs a CUDA device and torch.cuda finds none: try --dry", file=sys.stderr)
        raise typer.Exit(1)
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        print(f"unknown shapes {', '.join(sorted(unknown))}: choose from {', '.join(SHAPES)}", file=sys.stderr)
        raise typer.Exit(2)
    stop = time.monotonic() + 60 * minutes
    device = torch.device("cpu" if dry else "cuda")
    chosen = DRY_SHAPES if dry else {name: SHAPES[name] for name in shapes.split(",")}
    record: dict[str, Any] = {"minutes": minutes, "rounds": rounds, "tuned": tune_tiles and not dry, **environment()}
    record["cusparselt"] = None if dry or not cusparselt.available(device) else torch.backends.cusparselt.version()
    record["rows"] = rows = []
    record["complete"] = False
    name = label or "cuda-" + (record["device"].lower().replace(" ", "-") if not dry else "dry")
    jobs = list(dict.fromkeys((out, width) for sizes in chosen.values() for out, width in sizes))
    try:
        for out, width in jobs:
            site = Site(out, width, device, COLD_BYTES if not dry else 1)
            for m in ROWS if not dry else (1, 3, 8, 130):
                if time.monotonic() > stop:
                    return
                row = measure(site, m, rounds, compiled and not dry, tune_tiles and not dry)
                rows.append(row)
                print(line(row), flush=True)
        record["complete"] = True
    finally:
        models = {m: [list(s) for s in sizes] for m, sizes in chosen.items()}
        if not dry:
            write_json(RESULTS / f"{name}.json", record | {"shapes": models})


class Site:
    """One weight [out, in], bfloat16 and 2:4, in as many copies as a cold cache takes, in each backend's layout."""

    def __init__(self, out: int, width: int, device: torch.device, cold_bytes: int) -> None:
        weight = torch.randn(out, width, device=device) * width**-0.5
        weight = (weight * hard_mask(weight.abs(), TWO_FOUR)).bfloat16()
        values, meta = to_planes(pack(weight))
        if not torch.equal(planes_to_dense(values, meta, width, weight.dtype), weight):
            raise SparseForgeError(f"packing of {out} x {width} is not exact on this device: report this")
        copies = max(2, min(256, -(-cold_bytes // (values.nbytes + meta.nbytes))))
        self.dense = [weight.clone() for _ in range(copies)]
        self.planes = [(values.clone(), meta.clone()) for _ in range(copies)]
        self.blobs = []
        self.why_no_blob = cusparselt.why_not(out, width, weight.dtype, device)
        if self.why_no_blob is None:
            try:
                self.blobs = [cusparselt.as_blob(pack(w))[0] for w in self.dense]
            except RuntimeError as failure:
                self.why_no_blob = str(failure)[:300]
        self.tensors = []
        self.why_no_tensor = None
        try:  # PyTorch's own class for such weights: it refuses some sides, devices and versions
            self.tensors = [to_sparse_semi_structured(w) for w in self.dense]
        except (RuntimeError, NotImplementedError) as failure:
            self.why_no_tensor = str(failure)[:300]
        self.out, self.width = out, width

    @property
    def weight(self) -> torch.Tensor:
        return self.dense[0]


def candidates(site: Site, m: int, compiled: bool) -> dict[str, list[Call]]:
    """By name: one call per copy of the weight. ``dense`` is what the others are compared with."""
    width = site.width
    calls: dict[str, list[Call]] = {"dense": [partial(F.linear, weight=w) for w in site.dense]}
    if compiled:
        fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls["dense_compiled"] = [partial(_positional, fast, w) for w in site.dense]
    # above the decode kernels' rows this is decompress + dense
    calls["planes"] = [partial(planes_linear, values=v, meta=w, in_features=width) for v, w in site.planes]
    if m <= DECODE_ROWS:
        calls["decompress"] = [partial(_decompressed, values=v, meta=w, width=width) for v, w in site.planes]
    if site.blobs:
        calls["cusparselt_default"] = [partial(cusparselt.linear, blob=b) for b in site.blobs]
        searched = partial(_searched, width=width)
        calls["cusparselt"] = [partial(searched, blob=b) for b in site.blobs]
    if site.tensors:
        calls["torch_semi_structured"] = [partial(F.linear, weight=w) for w in site.tensors]
    return calls


def _searched(x: torch.Tensor, blob: torch.Tensor, width: int) -> torch.Tensor:
    algorithm = cusparselt.search(blob, width, len(x))  # in the first call, which is not timed
    return cusparselt.linear(x, blob, algorithm)


def _positional(linear: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def _decompressed(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, width: int) -> torch.Tensor:
    make = expand_planes if x.is_cuda else planes_to_dense
    return F.linear(x, make(values, meta, width, x.dtype))


def measure(site: Site, m: int, rounds: int, compiled: bool, tune_tiles: bool) -> dict[str, Any]:
    """Correctness, then medians of interleaved rounds in microseconds; a candidate that fails says why."""
    x = torch.randn(m, site.width, device=site.weight.device, dtype=site.weight.dtype)
    row: dict[str, Any] = {"out": site.out, "in": site.width, "m": m, "copies": len(site.dense), "results": {}}
    if site.why_no_blob is not None:
        row["no_cusparselt"] = site.why_no_blob
    if site.why_no_tensor is not None:
        row["no_torch_semi_structured"] = site.why_no_tensor
    if tune_tiles and m <= DECODE_ROWS:
        clock = time.perf_counter()
        try:
            row["tile"] = list(tune(*site.planes[0], site.width, x.dtype, m))
        except Exception as failure:  # the first legal tile is timed then
            row["tune_failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        row["tune_seconds"] = time.perf_counter() - clock
        row["bucket"] = bucket(m)
    runs: dict[str, Callable[[], float]] = {}
    for name, calls in candidates(site, m, compiled).items():
        try:
            row["results"][name] = {"error": relative_error(calls[0], x, site.weight)}
            runs[name] = timer(calls, x)
        except Exception as failure:  # one candidate's failure must not lose the others' numbers
            row["results"][name] = {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(1e6 * run())
    packed_bytes = sum(t.nbytes for t in site.planes[0])
    for name, values in times.items():
        median = statistics.median(values)
        read = site.weight.nbytes if name.startswith("dense") else packed_bytes
        traffic = read + x.nbytes + m * site.out * x.element_size()
        row["results"][name] |= {
            "median_us": median,
            "min_us": min(values),
            "max_us": max(values),
            "gigabytes_per_second": traffic / median / 1e3,  # of what must be moved at least
            "over_dense": statistics.median(times["dense"]) / median if times.get("dense") else None,
        }
    return row


def relative_error(call: Call, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest error over the largest result. Raises SparseForgeError above what bfloat16's rounding explains."""
    expected = x.float() @ weight.float().t()
    got = call(x).float()
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error <= 0.01:  # NaN fails too
        raise SparseForgeError(f"the result is wrong: relative error {error:.3g}")
    return error


def timer(calls: list[Call], x: torch.Tensor) -> Callable[[], float]:
    """A function that gives the seconds of one call: replays of a graph of all calls, or plain calls on a CPU."""
    for call in (calls[0], calls[-1]):
        call(x)  # compile, and let libraries allocate, outside the capture
    if not x.is_cuda:
        return partial(_time_plain, calls, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    graph.replay()
    torch.cuda.synchronize()
    return partial(_time_graph, graph, len(calls))


def _time_graph(graph: torch.cuda.CUDAGraph, calls: int, replays: int = 5) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (replays * calls)


def _time_plain(calls: list[Call], x: torch.Tensor) -> float:
    clock = time.perf_counter()
    for call in calls:
        call(x)
    return (time.perf_counter() - clock) / len(calls)


def line(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {r['median_us']:.1f} us ({r['over_dense']:.2f}x)" if "median_us" in r else f"{name}: {r['failed']}"
        for name, r in row["results"].items()
    ]
    return f"{row['out']} x {row['in']}, {row['m']} rows: " + ", ".join(parts)


if __name__ == "__main__":
    typer.run(main)
