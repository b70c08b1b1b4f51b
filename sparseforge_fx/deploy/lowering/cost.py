"""The cost gate: weight shapes timed dense and sparse on the machine that will run them; sparse stays where it wins."""

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
from sparseforge_fx.kernels.layouts import Layout
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.report import environment, write_json

#: token counts (batch x sequence) that matter where nobody says others: decoding, small batches, a prompt
TOKENS = (1, 8, 64, 2048)
NOISE = 0.03  # a ratio within 3 % of one is neither a gain nor a loss
ROTATED_BYTES = 256 << 20  # weights are rotated over so much memory: in a model each is cold when its turn comes
TABLE_VERSION = 2


class Shape(NamedTuple):
    """What a measurement depends on beside the machine."""

    out_features: int
    in_features: int
    dtype: str

    @classmethod
    def of(cls, out_features: int, in_features: int, dtype: torch.dtype) -> Shape:
        return cls(out_features, in_features, str(dtype).removeprefix("torch."))


class Timing(NamedTuple):
    """One row: medians in microseconds with their quartiles; ``ratio`` is dense over sparse."""

    shape: Shape
    layout: str
    tokens: int
    dense_us: float
    dense_quartiles: tuple[float, float]
    sparse_us: float
    sparse_quartiles: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.dense_us / self.sparse_us

    def describe(self) -> dict[str, Any]:
        """For the report and for files; ``weight_gb_per_s`` counts the bytes of the packed weight."""
        out, width, dtype = self.shape
        size = out * width * getattr(torch, dtype).itemsize
        packed = size / 2 + out * width / 8
        return {
            "out": out,
            "in": width,
            "dtype": dtype,
            "layout": self.layout,
            "tokens": self.tokens,
            "dense_us": self.dense_us,
            "dense_quartiles": list(self.dense_quartiles),
            "sparse_us": self.sparse_us,
            "sparse_quartiles": list(self.sparse_quartiles),
            "ratio": self.ratio,
            "dense_gb_per_s": size / self.dense_us / 1e3,
            "sparse_gb_per_s": packed / self.sparse_us / 1e3,
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
    """What the table knows of these shapes or, without a table, what is measured now."""
    return {
        shape: measure(shape, tokens, device, layouts) if known is None else known.get(shape, {})
        for shape in dict.fromkeys(shapes)
    }


@torch.no_grad()
def measure(
    shape: Shape,
    tokens: Sequence[int],
    device: torch.device,
    layouts: Sequence[Layout],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
) -> Timings:
    """Time ``F.linear`` and the sparse operator in every layout that takes the shape, interleaved, each sample at least
    ``seconds`` long.

    Weights are random 2:4 ones, rotated beyond the caches.
    """
    out, width, dtype = shape.out_features, shape.in_features, getattr(torch, shape.dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(out, width, generator=generator, device=device)
    weight = (weight * hard_mask(weight.abs(), TWO_FOUR)).to(dtype)
    usable = [layout for layout in layouts if layout.refuses(out, width, dtype, device) is None]
    packed = [layout.convert(pack(weight)) for layout in usable]
    dense_copies = [weight.clone() for _ in range(max(2, -(-ROTATED_BYTES // weight.nbytes)))]
    copies = [[(v.clone(), m.clone()) for _ in range(-(-ROTATED_BYTES // (v.nbytes + m.nbytes)))] for v, m in packed]
    found: Timings = {layout.name: {} for layout in usable}
    for count in tokens:
        x = torch.randn(count, width, generator=generator, device=device).to(dtype)
        runs = [_Rotation(dense_copies, partial(F.linear, x), device)]
        for layout, (values, meta), each in zip(usable, packed, copies, strict=True):
            layout.tune(values, meta, width, count)
            runs.append(_Rotation(each, partial(_sparse, x, layout.name), device))
        repeats = [run.calibrate(seconds) for run in runs]
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, repeat, sample in zip(runs, repeats, samples, strict=True):
                sample.append(run.time(repeat))
        dense, *sparse = (_summary(s) for s in samples)
        for layout, summary in zip(usable, sparse, strict=True):
            found[layout.name][count] = Timing(shape, layout.name, count, *dense, *summary)
    return found


def _sparse(x: Tensor, layout: str, packed: tuple[Tensor, Tensor]) -> Tensor:
    return OP(x, *packed, layout, x.shape[-1], None, "none")


class _Rotation:
    """One call after the other, each with the next copy of the weight."""

    def __init__(self, copies: Sequence[Any], call: Callable[[Any], Any], device: torch.device):
        self.copies, self.call, self.device, self.next = copies, call, device, 0

    def time(self, repeats: int) -> float:
        """Microseconds of one call."""
        self._wait()
        clock = time.perf_counter()
        for _ in range(repeats):
            self.call(self.copies[self.next])
            self.next = (self.next + 1) % len(self.copies)
        self._wait()
        return (time.perf_counter() - clock) / repeats * 1e6

    def calibrate(self, seconds: float) -> int:
        """Warm up; calls that make a sample long enough."""
        self.time(2)
        return max(1, round(seconds * 1e6 / self.time(3)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _summary(sample: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
    return middle, (low, high)


def verdict(timings: dict[int, Timing], tokens: Sequence[int]) -> str | None:
    """None where sparse wins: faster at one of the token counts, slower at none. Otherwise the reason to stay dense."""
    missing = [t for t in tokens if t not in timings]
    if missing:
        return f"not measured at {', '.join(map(str, missing))} tokens"
    ratios = {t: timings[t].ratio for t in tokens}
    worst = min(ratios, key=ratios.__getitem__)
    best = max(ratios, key=ratios.__getitem__)
    if ratios[worst] < 1 - NOISE:
        return f"slower than dense at {worst} tokens ({ratios[worst]:.2f}x)"
    if ratios[best] <= 1 + NOISE:
        return f"no faster than dense (at best {ratios[best]:.2f}x, at {best} tokens)"
    return None


def choose(
    timings: Timings, layouts: Sequence[Layout], tokens: Sequence[int]
) -> tuple[Layout, None] | tuple[None, str]:
    """The layout that gains most over all token counts (geometric mean) among those that :func:`verdict` lets pass;
    without one, the reasons to stay dense."""
    known = [layout for layout in layouts if layout.name in timings] or layouts[:1]
    reasons = {layout.name: verdict(timings.get(layout.name, {}), tokens) for layout in known}
    passing = [layout for layout in known if reasons[layout.name] is None]
    if passing:
        gains = {o.name: statistics.geometric_mean(timings[o.name][t].ratio for t in tokens) for o in passing}
        return max(passing, key=lambda layout: gains[layout.name]), None
    said = reasons.items()
    return None, "; ".join(f"{name}: {reason}" for name, reason in said) if len(said) > 1 else str(reasons.popitem()[1])


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
        if content["version"] != TABLE_VERSION:
            raise SparseForgeError(f"{path} is a cost table of version {content['version']}: measure again")
        return as_table(map(read_row, content["rows"]))
    except SparseForgeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise SparseForgeError(f"{path} is not a cost table: {type(error).__name__} {error}") from error


def read_row(row: dict[str, Any]) -> Timing:
    """What :meth:`Timing.describe` gave. Raises ValueError and its like for anything else."""
    shape = Shape(_count(row["out"]), _count(row["in"]), row["dtype"])
    if shape.dtype not in ("bfloat16", "float16", "float32") or not isinstance(row["layout"], str):
        raise ValueError(f"dtype {str(shape.dtype)[:40]!r}, layout {str(row['layout'])[:40]!r}")
    (dense, *dense_quartiles), (sparse, *sparse_quartiles) = (
        [_time(t) for t in (row[f"{kind}_us"], *row[f"{kind}_quartiles"])] for kind in ("dense", "sparse")
    )
    (low, high), (least, most) = dense_quartiles, sparse_quartiles
    return Timing(shape, row["layout"], _count(row["tokens"]), dense, (low, high), sparse, (least, most))


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
        if not (timing.dense_us > 0 and timing.sparse_us > 0 and timing.tokens > 0):
            raise SparseForgeError(f"a cost table has a time or a token count that is not positive: {timing}")
        table.setdefault(timing.shape, {}).setdefault(timing.layout, {})[timing.tokens] = timing
    return table
