"""2:4 products on this GPU, in 16, 8 and 4 bits, against the dense ones that a user would take; one json.

    python examples/benchmarks/gpu_kernels.py [--minutes 8] [--compiled] [--no-tune] [--shapes llama-7b,opt-6.7b]

Candidates whose names begin with "dense" are the contenders: cuBLAS in bfloat16; fp8 and int8 products of rows of x
that are rounded on the way (cuBLAS's and torch._int_mm); a weight in int8 that a compiled linear expands (gpt-fast's
way); PyTorch's int4 product. With rows enough for a prompt TileLang's 2:4 product of bfloat16 takes part, where
TileLang is installed (tile_lang.py). Every candidate is first compared with a float64 product; one that is wrong gets
no time.
Times are those of CUDA-graph replays over as many copies of the weight as exceed the L2 cache, in interleaved rounds.
When the minutes are over, what was measured is written. --dry runs the same code on tiny CPU tensors and writes
nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import tile_lang
import torch
import torch.nn.functional as F
import typer
from common import in_turn, random_two_four, save
from torch.sparse import to_sparse_semi_structured

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels.gpu import cusparselt
from sparseforge_fx.kernels.gpu.eight_bits import round_rows
from sparseforge_fx.kernels.gpu.planes import planes_to_dense, to_planes
from sparseforge_fx.kernels.gpu.planes_linear import expand_planes, planes_linear, tune
from sparseforge_fx.kernels.gpu.tiles import DECODE_ROWS, bucket
from sparseforge_fx.kernels.gpu.timing import Replays
from sparseforge_fx.kernels.packed import Packed, pack, pack_codes, unpack
from sparseforge_fx.methods.rounding import round_weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
FORMATS = ("2:4", "2:4 int8", "2:4 int4/32")
PROMPT_ROWS = 128  # what TileLang's tiles are for; below, most of a tile is empty
FP8 = torch.float8_e4m3fn
#: of the largest answer: what rounding of bfloat16 explains, and of x to 8 bits
TOLERANCE, ROUNDED = 0.01, 0.06
SHAPES = {  # out, in; q/k/v and gate/up as one linear each, as the deployed graph merges them
    "llama-7b": ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (11008, 4096)),
    "llama-3-8b": ((6144, 4096), (28672, 4096), (4096, 14336)),
    "opt-6.7b": ((16384, 4096), (4096, 16384)),
    "opt-1.3b": ((2048, 2048), (6144, 2048), (8192, 2048), (2048, 8192)),
    "opt-125m": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "smollm2-135m": ((576, 576), (960, 576), (3072, 576), (576, 1536)),
}
DRY_SHAPES = {"dry": ((32, 64), (48, 96))}
COLD_BYTES = 256 << 20  # of weights between two uses of the same one; more than five times an H200's L2

Call = Callable[[torch.Tensor], torch.Tensor]
Shapes = Mapping[str, Sequence[tuple[int, int]]]


def main(
    minutes: float = 8.0,
    rounds: int = 7,
    shapes: str = ",".join(SHAPES),
    formats: str = ",".join(FORMATS),
    counts: str = ",".join(map(str, ROWS)),
    compiled: Annotated[
        bool, typer.Option(help="also time torch.compile(mode='max-autotune') of the dense linears, which takes long")
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
        sweep(DRY_SHAPES, FORMATS, (1, 3, 8, 130), torch.device("cpu"), None, cold_bytes=1, rounds=rounds)
        return
    if not torch.cuda.is_available():
        print("gpu_kernels.py needs a CUDA device and torch.cuda finds none: try --dry", file=sys.stderr)
        raise typer.Exit(1)
    sweep(
        {name: SHAPES[name] for name in shapes.split(",")},
        formats.split(","),
        [int(count) for count in counts.split(",")],
        torch.device("cuda"),
        label or "cuda-" + torch.cuda.get_device_name().lower().replace(" ", "-"),
        minutes=minutes,
        rounds=rounds,
        compiled=compiled,
        tune_tiles=tune_tiles,
    )


def sweep(
    shapes: Shapes,
    formats: Sequence[str],
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
            for form in map(parse_format, formats):
                site = Site(out, width, form, device, cold_bytes)
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
    """One 2:4 weight [out, in] of a format, in as many copies as a cold cache takes, in each backend's layout."""

    def __init__(self, out: int, width: int, form: Format, device: torch.device, cold_bytes: int) -> None:
        self.packed = random_packed(out, width, form, device)
        self.weight = unpack(self.packed).bfloat16()
        values, meta = to_planes(self.packed)
        found = planes_to_dense(values, meta, width, torch.bfloat16, self.packed.scales)
        if not torch.equal(found, self.weight):
            raise SparseForgeError(f"packing of {out} x {width} is not exact on this device: report this")
        self.copies = max(2, min(256, -(-cold_bytes // self.packed.nbytes)))
        few = max(2, min(256, -(-cold_bytes // self.weight.nbytes)))
        self.dense = [self.weight.clone() for _ in range(few)]
        self.planes = [(values.clone(), meta.clone()) for _ in range(self.copies)]
        self.blobs, self.tensors = [], []
        self.why: dict[str, str] = {}
        unfit = "it has no 4-bit products" if form.values == "int4" else None
        if reason := unfit or cusparselt.why_not(out, width, torch.bfloat16, device, form):
            self.why["no_cusparselt"] = reason
        else:
            try:
                self.blobs = [cusparselt.as_blob(self.packed)[0] for _ in range(self.copies)]
            except RuntimeError as failure:
                self.why["no_cusparselt"] = str(failure)[:300]
        if not form.is_quantized:
            try:  # PyTorch's own class for such weights: it refuses some sides, devices and versions
                self.tensors = [to_sparse_semi_structured(w) for w in self.dense]
            except (RuntimeError, NotImplementedError) as failure:
                self.why["no_torch_semi_structured"] = str(failure)[:300]
        self.tiles: list[tile_lang.Compressed] = []
        if reason := "it is for 16 bits here" if form.is_quantized else tile_lang.why_not(self.weight):
            self.why["no_tilelang"] = reason
        else:
            self.tiles = [tile_lang.compress(w) for w in self.dense]
        self.form, self.out, self.width = form, out, width


def random_packed(out: int, width: int, form: Format, device: torch.device) -> Packed:
    weight = random_two_four(out, width, device, scale=width**-0.5)
    if not form.is_quantized:
        return pack(weight.bfloat16())
    rounded = round_weight(weight, form)
    return pack_codes(rounded.codes, rounded.scales, form)


def candidates(site: Site, m: int, compiled: bool) -> dict[str, list[Call]]:
    """By name: one call per copy of the weight. ``dense`` is what the others are compared with."""
    width, scales = site.width, site.packed.scales
    calls: dict[str, list[Call]] = {"dense": [partial(F.linear, weight=w) for w in site.dense]}
    if compiled:
        fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls["dense compiled"] = [partial(_positional, fast, w) for w in site.dense]
    if site.weight.is_cuda:
        calls |= CONTENDERS[site.form.values](site, m, compiled)
    # above the decode kernels' rows this is decompress + dense
    calls["planes"] = [
        partial(planes_linear, values=v, meta=w, in_features=width, scales=scales) for v, w in site.planes
    ]
    if m <= DECODE_ROWS and scales is None:
        calls["decompress"] = [partial(_decompressed, values=v, meta=w, width=width) for v, w in site.planes]
    if site.blobs:
        if scales is None:
            calls["cusparselt_default"] = [partial(cusparselt.linear, blob=b) for b in site.blobs]
        searched = partial(_searched, width=width, scales=scales)
        calls["cusparselt"] = [partial(searched, blob=b) for b in site.blobs]
    if site.tensors:
        calls["torch_semi_structured"] = [partial(F.linear, weight=w) for w in site.tensors]
    if site.tiles and m >= PROMPT_ROWS:
        calls["tilelang"] = [partial(tile_lang.linear, weight=w) for w in site.tiles]
    return calls


# -- what else a user would take --------------------------------------------------------------------------------------
def _of_int8(site: Site, m: int, compiled: bool) -> dict[str, list[Call]]:
    """Dense weights in 8 bits. Rows of x are rounded on the way, but for the compiled one."""
    scale = site.weight.float().abs().amax(1, keepdim=True) / 127
    codes = [(site.weight.float() / scale).round().to(torch.int8) for _ in range(site.copies)]
    eights = [(site.weight.float() / scale * 3.5).to(FP8) for _ in range(site.copies)]
    calls: dict[str, list[Call]] = {}
    if m == 1 or compiled:  # other numbers of rows need max-autotune, which takes seconds for each
        mode = "default" if m == 1 else "max-autotune-no-cudagraphs"
        fast = torch.compile(_expanded, mode=mode, dynamic=False)
        calls["dense int8 compiled"] = [partial(fast, codes=c, scale=scale.bfloat16().t()) for c in codes]
    if m > 16:
        calls["dense int8 int_mm"] = [
            partial(_int_mm, codes=c, scale=scale, finish=torch.compile(_finish, dynamic=True)) for c in codes
        ]
    to_fp8 = torch.compile(_to_fp8, dynamic=True)
    calls["dense fp8"] = [partial(_fp8, weight=w, scale=scale.t() / 3.5, rounded=to_fp8) for w in eights]
    calls["dense fp8 product alone"] = [partial(_fp8, weight=w, scale=scale.t() / 3.5, rounded=_Once()) for w in eights]
    return calls


def _expanded(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.linear(x, codes.to(x.dtype)) * scale


def _int_mm(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, finish: Any) -> torch.Tensor:
    rows, factors = round_rows(x)
    return finish(torch._int_mm(rows, codes.t()), scale.t(), factors[:, None])


def _finish(sums: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (sums * scale * factors).bfloat16()


def _to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scale).to(FP8), scale


class _Once:
    """The rounded x, made at the first call: for a product without what surrounds it."""

    found: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.found = self.found or _to_fp8(x)
        return self.found


def _fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, rounded: Any) -> torch.Tensor:
    rows, factors = rounded(x)
    return torch._scaled_mm(rows, weight.t(), factors, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def _of_int4(site: Site, m: int, compiled: bool) -> dict[str, list[Call]]:
    """PyTorch's int4 product, scales for each 32 inputs; the weight's codes are those of ours."""
    codes = (site.weight.float().unflatten(1, (-1, 32)) / site.packed.scales.float()[..., None]).round().flatten(1)
    low, high = (codes.int() + 8)[:, 1::2], (codes.int() + 8)[:, ::2]
    packed = torch._convert_weight_to_int4pack((high << 4 | low).to(torch.uint8), 8)
    scales = site.packed.scales.bfloat16().t()
    both = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
    copies = [packed.clone() for _ in range(site.copies)]
    return {"dense int4": [partial(_tinygemm, weight=w, scales=both) for w in copies]}


def _tinygemm(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch._weight_int4pack_mm(x, weight, 32, scales)


CONTENDERS = {"float": lambda *_: {}, "int8": _of_int8, "int4": _of_int4}


def _searched(x: torch.Tensor, blob: torch.Tensor, width: int, scales: torch.Tensor | None) -> torch.Tensor:
    return cusparselt.blob_product(x, blob, blob, width, None, "none", scales)  # the first call, not timed, searches


def _positional(linear: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def _decompressed(x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, width: int) -> torch.Tensor:
    make = expand_planes if x.is_cuda else planes_to_dense
    return F.linear(x, make(values, meta, width, x.dtype))


def measure(site: Site, m: int, rounds: int, compiled: bool, tune_tiles: bool) -> dict[str, Any]:
    """Correctness, then medians of interleaved rounds in microseconds; a candidate that fails says why."""
    x = torch.randn(m, site.width, device=site.weight.device, dtype=site.weight.dtype)
    row: dict[str, Any] = {"out": site.out, "in": site.width, "format": str(site.form), "m": m, "results": {}}
    row |= {"copies": site.copies, **site.why}
    if tune_tiles and m <= DECODE_ROWS:
        clock = time.perf_counter()
        try:
            row["tile"] = list(tune(*site.planes[0], site.width, x.dtype, m, scales=site.packed.scales))
        except Exception as failure:  # the first legal tile is timed then
            row["tune_failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        row["tune_seconds"] = time.perf_counter() - clock
        row["bucket"] = bucket(m)
    runs: dict[str, Callable[[], float]] = {}
    for name, calls in candidates(site, m, compiled).items():
        try:
            tolerance = ROUNDED if site.form.is_quantized and name != "dense" else TOLERANCE
            row["results"][name] = {"error": relative_error(calls[0], x, site.weight, tolerance)}
            runs[name] = timer(calls, x)
        except Exception as failure:  # one candidate's failure must not lose the others' numbers
            row["results"][name] = {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    times = {name: [1e6 * t for t in seconds] for name, seconds in in_turn(runs, rounds).items()}
    for name, values in times.items():
        median = statistics.median(values)
        bits = 4.5 if "int4" in name else 8 if "8" in name else 16
        read = site.weight.numel() * bits / 8 if name.startswith("dense") else site.packed.nbytes
        traffic = read + x.nbytes + m * site.out * x.element_size()
        row["results"][name] |= {
            "median_us": median,
            "min_us": min(values),
            "max_us": max(values),
            "gigabytes_per_second": traffic / median / 1e3,  # of what must be moved at least
            "over_dense": statistics.median(times["dense"]) / median if times.get("dense") else None,
        }
    return row


def relative_error(call: Call, x: torch.Tensor, weight: torch.Tensor, tolerance: float) -> float:
    """Largest error over the largest result. Raises SparseForgeError above the tolerance."""
    expected = x.double() @ weight.double().t()
    got = call(x).double()
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error <= tolerance:  # NaN fails too
        raise SparseForgeError(f"the result is wrong: relative error {error:.3g}")
    return error


def timer(calls: list[Call], x: torch.Tensor) -> Callable[[], float]:
    """A function that gives the seconds of one call: replays of a graph of all calls, or plain calls on a CPU."""
    if not x.is_cuda:
        calls[0](x)
        return partial(_time_plain, calls, x)
    return partial(Replays([partial(call, x) for call in calls]).seconds, 5)


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
    return f"{row['out']} x {row['in']} {row['format']}, {row['m']} rows: " + ", ".join(parts)


if __name__ == "__main__":
    typer.run(main)
