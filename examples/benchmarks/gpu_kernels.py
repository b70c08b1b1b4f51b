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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import in_turn, random_two_four, save
from torch.sparse import to_sparse_semi_structured

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.gpu import cusparselt
from sparseforge_fx.kernels.gpu.planes import planes_to_dense, to_planes
from sparseforge_fx.kernels.gpu.planes_linear import expand_planes, planes_linear, tune
from sparseforge_fx.kernels.gpu.tiles import DECODE_ROWS, bucket
from sparseforge_fx.kernels.packed import pack

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
Shapes = Mapping[str, Sequence[tuple[int, int]]]


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
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        print(f"unknown shapes {', '.join(sorted(unknown))}: choose from {', '.join(SHAPES)}", file=sys.stderr)
        raise typer.Exit(2)
    if dry:
        sweep(DRY_SHAPES, (1, 3, 8, 130), torch.device("cpu"), None, cold_bytes=1, rounds=rounds)
        return
    if not torch.cuda.is_available():
        print("gpu_kernels.py needs a CUDA device and torch.cuda finds none: try --dry", file=sys.stderr)
        raise typer.Exit(1)
    sweep(
        {name: SHAPES[name] for name in shapes.split(",")},
        ROWS,
        torch.device("cuda"),
        label or "cuda-" + torch.cuda.get_device_name().lower().replace(" ", "-"),
        minutes=minutes,
        rounds=rounds,
        compiled=compiled,
        tune_tiles=tune_tiles,
    )


def sweep(
    shapes: Shapes,
    counts: Sequence[int],
    device: torch.device,
    name: str | None,
    *,
    cold_bytes: int = COLD_BYTES,
    minutes: float = 8.0,
    rounds: int = 7,
    compiled: bool = False,
    tune_tiles: bool = False,
) -> None:
    """Every shape at every number of rows, until the minutes are over; then results/kernels/NAME.json, if there is a
    name."""
    stop = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    complete = False
    try:
        for out, width in dict.fromkeys(shape for sizes in shapes.values() for shape in sizes):
            site = Site(out, width, device, cold_bytes)
            for m in counts:
                if time.monotonic() > stop:
                    return
                rows.append(measure(site, m, rounds, compiled, tune_tiles))
                print(line(rows[-1]), flush=True)
        complete = True
    finally:
        if name is not None:
            record = {
                "minutes": minutes,
                "rounds": rounds,
                "tuned": tune_tiles,
                "cusparselt": torch.backends.cusparselt.version() if cusparselt.available(device) else None,
                "rows": rows,
                "complete": complete,
                "shapes": {model: [list(shape) for shape in sizes] for model, sizes in shapes.items()},
            }
            save("kernels", name, record)


class Site:
    """One weight [out, in], bfloat16 and 2:4, in as many copies as a cold cache takes, in each backend's layout."""

    def __init__(self, out: int, width: int, device: torch.device, cold_bytes: int) -> None:
        weight = random_two_four(out, width, device, scale=width**-0.5).bfloat16()
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
    times = {name: [1e6 * t for t in seconds] for name, seconds in in_turn(runs, rounds).items()}
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
