"""The cost gate: weights timed in their formats on the machine that will run them; packed stays where it wins."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, PACKED, SPARSE, Format, parse_format
from sparseforge_fx.kernels.gpu.timing import Replays
from sparseforge_fx.kernels.layouts import Layout, layouts_of
from sparseforge_fx.kernels.packed import Packed, pack, pack_codes
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.progress import counted
from sparseforge_fx.report import environment, write_json

#: token counts (batch x sequence) that matter where nobody says others: decoding, small batches, a prompt
TOKENS = (1, 8, 64, 2048)
NOISE = 0.03  # a ratio within 3 % of one is neither a gain nor a loss
ROTATED_BYTES = 256 << 20  # weights are rotated over so much memory: in a model each is cold when its turn comes
MOST_COPIES = 4096  # of one weight; what is below 64 KiB would else have up to a million, more than a sample has calls
TABLE_VERSION = 3


class Shape(NamedTuple):
    """What a measurement depends on beside the machine."""

    out_features: int
    in_features: int
    dtype: str
    format: Format = SPARSE

    @classmethod
    def of(cls, out_features: int, in_features: int, dtype: torch.dtype, form: Format = SPARSE) -> Shape:
        return cls(out_features, in_features, str(dtype).removeprefix("torch."), form)

    @property
    def rival(self) -> Shape | None:
        """The dense weight of the same bits, which a sparse one must beat; None: that of the model's own dtype."""
        sparse = self.format.is_sparse and self.format.is_quantized
        return self._replace(format=self.format._replace(pattern="dense")) if sparse else None

    @property
    def bytes(self) -> float:
        """Of the weight in its format."""
        bits = self.format.bits(self.in_features, 8 * getattr(torch, self.dtype).itemsize)
        return self.out_features * self.in_features * bits / 8


class Timing(NamedTuple):
    """One row: medians in microseconds with their quartiles, of the packed weight and of the dense one of the model's
    own dtype that was timed beside it; ``ratio`` is dense over packed."""

    shape: Shape
    layout: str
    tokens: int
    dense_us: float
    dense_quartiles: tuple[float, float]
    packed_us: float
    packed_quartiles: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.dense_us / self.packed_us

    def describe(self) -> dict[str, Any]:
        """For the report and for files; ``packed_gb_per_s`` counts the bytes of the packed weight."""
        out, width, dtype, form = self.shape
        return {
            "out": out,
            "in": width,
            "dtype": dtype,
            "format": str(form),
            "layout": self.layout,
            "tokens": self.tokens,
            "dense_us": self.dense_us,
            "dense_quartiles": list(self.dense_quartiles),
            "packed_us": self.packed_us,
            "packed_quartiles": list(self.packed_quartiles),
            "ratio": self.ratio,
            "dense_gb_per_s": self.shape._replace(format=DENSE).bytes / self.dense_us / 1e3,
            "packed_gb_per_s": self.shape.bytes / self.packed_us / 1e3,
        }


#: by tokens, by layout
Timings = dict[str, dict[int, Timing]]
Table = dict[Shape, Timings]


def check_request(tokens: Sequence[int], table: str | Path | Table | None) -> Table | None:
    """The table, read if it is a file. Raises SparseForgeError if ``tokens`` is not a list of token counts."""
    counts = tokens if isinstance(tokens, Iterable) else [tokens]
    if not counts or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise SparseForgeError(f"tokens is {tokens!r}: give a list of token counts of at least 1")
    return load_table(table) if isinstance(table, str | Path) else table


def timings(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    device: torch.device,
    layouts: Sequence[Layout],
    known: Table | None,
) -> Table:
    """What the table knows of these shapes, and of their rivals, or, without a table, what is measured now."""
    wanted = dict.fromkeys(s for shape in shapes for s in (shape, shape.rival) if s is not None)
    if known is not None:
        return {shape: known.get(shape, {}) for shape in wanted}
    by_size: dict[tuple, list[Shape]] = {}
    for shape in wanted:
        by_size.setdefault(shape[:3], []).append(shape)
    found: Table = {}
    with counted("timing products", len(by_size)) as advance:
        for together in by_size.values():
            found |= measure(together, tokens, device, layouts)
            advance()
    return {shape: found[shape] for shape in wanted}


def formats_of(device: torch.device) -> tuple[Format, ...]:
    """All that there are kernels for on this device, beside dense in the model's own dtype."""
    layouts = layouts_of(device)
    return tuple(form for form in PACKED if any(layout.knows(form) for layout in layouts))


@torch.no_grad()
def measure(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    device: torch.device,
    layouts: Sequence[Layout],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
) -> Table:
    """Time ``F.linear`` and the packed operator in every format and layout, interleaved, each sample at least
    ``seconds`` long.

    Args:
        shapes: one size and dtype, in as many formats as there are shapes.

    Weights are random ones, rotated beyond the caches.
    """
    out, width, dtype = shapes[0].out_features, shapes[0].in_features, getattr(torch, shapes[0].dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(out, width, generator=generator, device=device).to(dtype)
    dense = _Rotation(_copies((weight,)), lambda x, copy: F.linear(x, copy[0]), device)
    found: Table = {shape: {} for shape in shapes}
    runs: list[tuple[Shape, Layout, _Rotation]] = []
    for shape in shapes:
        packed = _random(weight, shape.format)
        for layout in layouts:
            if layout.refuses(out, width, dtype, device, shape.format) is None:
                found[shape][layout.name] = {}
                call, tensors = partial(_packed, layout.name), (*layout.convert(packed), packed.scales)
                runs.append((shape, layout, _Rotation(_copies(tensors), call, device)))
    for count in tokens:
        x = torch.randn(count, width, generator=generator, device=device).to(dtype)
        for _, layout, run in runs:
            values, meta, scales = run.copies[0]
            layout.tune(x, values, meta, width, scales)
        turns = [dense, *(run for _, _, run in runs)]
        repeats = [run.calibrate(x, seconds) for run in turns]
        samples: list[list[float]] = [[] for _ in turns]
        for _ in range(rounds):
            for run, repeat, sample in zip(turns, repeats, samples, strict=True):
                sample.append(run.time(x, repeat))
        base, *others = (_summary(s) for s in samples)
        for (shape, layout, _), summary in zip(runs, others, strict=True):
            found[shape][layout.name][count] = Timing(shape, layout.name, count, *base, *summary)
    return found


def _random(weight: Tensor, form: Format) -> Packed:
    """A weight of the format, whatever its values."""
    if form.is_sparse:
        weight = weight * hard_mask(weight.float().abs(), TWO_FOUR)
    if not form.is_quantized:
        return pack(weight)
    rounded = round_weight(weight, form)
    return pack_codes(rounded.codes, rounded.scales, form)


def _copies(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    """So many that together they are beyond the caches."""
    size = sum(t.nbytes for t in tensors if t is not None)
    count = min(max(2, -(-ROTATED_BYTES // size)), MOST_COPIES)
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(count)]


def _packed(layout: str, x: Tensor, copy: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    values, meta, scales = copy
    return OP(x, values, meta, layout, x.shape[-1], None, "none", scales)


class _Rotation:
    """One call after the other, each with the next copy of the weight; on a GPU in a graph, as they are deployed."""

    def __init__(self, copies: Sequence[Any], call: Callable[[Tensor, Any], Any], device: torch.device):
        self.copies, self.call, self.device, self.next = copies, call, device, 0
        self.x: Tensor | None = None

    def time(self, x: Tensor, repeats: int) -> float:
        """Microseconds of one call."""
        if self.device.type == "cuda":
            if self.x is not x:
                self.x, self.replays = x, Replays([partial(self.call, x, copy) for copy in self.copies])
            return 1e6 * self.replays.seconds(-(-repeats // len(self.copies)))
        clock = time.perf_counter()
        for _ in range(repeats):
            self.call(x, self.copies[self.next])
            self.next = (self.next + 1) % len(self.copies)
        return (time.perf_counter() - clock) / repeats * 1e6

    def calibrate(self, x: Tensor, seconds: float) -> int:
        """Warm up; calls that make a sample long enough."""
        self.time(x, 2)
        return max(1, round(seconds * 1e6 / self.time(x, 3)))


def _summary(sample: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
    return middle, (low, high)


def gains(table: Table, shape: Shape, layout: str, rival: Shape | None) -> dict[int, float]:
    """By tokens: how many times as fast a weight is as the best dense one of the rival's bits, or without one as that
    of the model's own dtype."""
    rows = table.get(shape, {}).get(layout, {})
    if rival is None:
        return {tokens: row.ratio for tokens, row in rows.items()}
    rivals = table.get(rival, {}).values()
    best = {t: min(by_tokens[t].packed_us for by_tokens in rivals if t in by_tokens) for r in rivals for t in r}
    return {tokens: best[tokens] / row.packed_us for tokens, row in rows.items() if tokens in best}


def verdict(ratios: dict[int, float], tokens: Sequence[int], rival: str = "dense") -> str | None:
    """None where the weight wins: faster at one of the token counts, slower at none. Otherwise the reason against."""
    missing = [t for t in tokens if t not in ratios]
    if missing:
        return f"not measured at {', '.join(map(str, missing))} tokens"
    worst = min(tokens, key=ratios.__getitem__)
    best = max(tokens, key=ratios.__getitem__)
    if ratios[worst] < 1 - NOISE:
        return f"slower than {rival} at {worst} tokens ({ratios[worst]:.2f}x)"
    if ratios[best] <= 1 + NOISE:
        return f"no faster than {rival} (at best {ratios[best]:.2f}x, at {best} tokens)"
    return None


def choose(
    table: Table, shape: Shape, layouts: Sequence[Layout], tokens: Sequence[int]
) -> tuple[Layout, None] | tuple[None, str]:
    """The layout that gains most over all token counts (geometric mean) among those that :func:`verdict` lets pass;
    without one, the reasons against all."""
    known = [layout for layout in layouts if layout.name in table.get(shape, {})] or list(layouts[:1])
    rival = shape.rival
    if rival is not None and not any(layout.knows(rival.format) for layout in layouts):
        rival = None  # nobody could take it instead on this device
    ratios = {layout.name: gains(table, shape, layout.name, rival) for layout in known}
    beside = str(DENSE if rival is None else rival.format)
    reasons = {name: verdict(found, tokens, beside) for name, found in ratios.items()}
    passing = [layout for layout in known if reasons[layout.name] is None]
    if passing:
        mean = {o.name: statistics.geometric_mean(ratios[o.name][t] for t in tokens) for o in passing}
        return max(passing, key=lambda layout: mean[layout.name]), None
    said = reasons.items()
    return None, "; ".join(f"{name}: {reason}" for name, reason in said) if len(said) > 1 else str(reasons.popitem()[1])


def of_one_layout(found: Iterable[dict[int, Timing]], tokens: Sequence[int]) -> dict[int, Timing]:
    """Of a weight's layouts that which takes least (geometric mean): it is kept in one for all token counts."""
    return min(found, key=lambda by: statistics.geometric_mean(by[t].packed_us for t in tokens))


def describe(table: Table) -> list[dict[str, Any]]:
    """The rows of a table."""
    rows = [t for by_layout in table.values() for by_tokens in by_layout.values() for t in by_tokens.values()]
    return [timing.describe() for timing in rows]


# -- tables in files ---------------------------------------------------------------------------------------------------
def save_table(table: Table, path: str | Path) -> None:
    """Write the measurements, with the machine that they belong to."""
    write_json(Path(path), {"version": TABLE_VERSION, "rows": describe(table), **environment()})


def load_table(path: str | Path) -> Table:
    """What :func:`save_table` wrote. Raises SparseForgeError for a file that is something else."""
    try:
        content = json.loads(Path(path).read_text())
        if "rows" in content and content["version"] != TABLE_VERSION:
            raise SparseForgeError(f"{path} is a cost table of version {content['version']}: measure again")
        return as_table(map(read_row, content["rows"]))
    except SparseForgeError:
        raise
    except OSError as error:
        raise SparseForgeError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise SparseForgeError(f"{path} is not a cost table: {type(error).__name__} {error}") from error


def read_row(row: dict[str, Any]) -> Timing:
    """What :meth:`Timing.describe` gave. Raises ValueError and its like for anything else."""
    try:
        form = parse_format(row["format"])
    except SparseForgeError as error:
        raise ValueError(str(error)) from error
    shape = Shape(_count(row["out"]), _count(row["in"]), row["dtype"], form)
    if shape.dtype not in ("bfloat16", "float16", "float32") or not isinstance(row["layout"], str):
        raise ValueError(f"dtype {str(shape.dtype)[:40]!r}, layout {str(row['layout'])[:40]!r}")
    (dense, *dense_quartiles), (packed, *packed_quartiles) = (
        [_time(t) for t in (row[f"{kind}_us"], *row[f"{kind}_quartiles"])] for kind in ("dense", "packed")
    )
    (low, high), (least, most) = dense_quartiles, packed_quartiles
    return Timing(shape, row["layout"], _count(row["tokens"]), dense, (low, high), packed, (least, most))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e15:
        raise ValueError(f"{str(value)[:40]!r} is no time")
    return float(value)


def as_table(timings: Iterable[Timing]) -> Table:
    """Timings by shape, layout and tokens."""
    table: Table = {}
    for timing in timings:
        if not (timing.dense_us > 0 and timing.packed_us > 0 and timing.tokens > 0):
            raise SparseForgeError(f"a cost table has a time or a token count that is not positive: {timing}")
        table.setdefault(timing.shape, {}).setdefault(timing.layout, {})[timing.tokens] = timing
    return table
