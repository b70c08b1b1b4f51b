"""The cost table: what was timed, of which shape in which format, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, SPARSE, Format, parse_format
from sparseforge_fx.passes.find_routing import Routing
from sparseforge_fx.report import environment, write_json

TABLE_VERSION = 3


class Shape(NamedTuple):
    """What a measurement depends on beside the machine. With a routing it is a stack of such weights."""

    out_features: int
    in_features: int
    dtype: str
    format: Format = SPARSE
    routing: Routing | None = None

    @classmethod
    def of(
        cls,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        form: Format = SPARSE,
        routing: Routing | None = None,
    ) -> Shape:
        return cls(out_features, in_features, str(dtype).removeprefix("torch."), form, routing)

    @property
    def rival(self) -> Shape | None:
        """The dense weight of the same bits, which a sparse one must beat; None: that of the model's own dtype."""
        sparse = self.format.is_sparse and self.format.is_quantized
        return self._replace(format=self.format._replace(pattern="dense")) if sparse else None

    @property
    def bytes(self) -> float:
        """Of the weight, or of the whole stack, in its format."""
        bits = self.format.bits(self.in_features, 8 * getattr(torch, self.dtype).itemsize)
        count = 1 if self.routing is None else self.routing.experts
        return count * self.out_features * self.in_features * bits / 8

    def bytes_read(self, tokens: int) -> float:
        """By one product: of a stack those of the experts that some token is expected to go to, if all are alike."""
        if self.routing is None:
            return self.bytes
        experts, chosen = self.routing
        return self.bytes * (1 - (1 - chosen / experts) ** tokens)


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
        """For the report and for files; ``packed_gb_per_s`` counts the bytes that are read of the packed weight."""
        out, width, dtype, form, routing = self.shape
        return {
            "out": out,
            "in": width,
            "dtype": dtype,
            "format": str(form),
            **(routing._asdict() if routing else {}),
            "layout": self.layout,
            "tokens": self.tokens,
            "dense_us": self.dense_us,
            "dense_quartiles": list(self.dense_quartiles),
            "packed_us": self.packed_us,
            "packed_quartiles": list(self.packed_quartiles),
            "ratio": self.ratio,
            "dense_gb_per_s": self.shape._replace(format=DENSE).bytes_read(self.tokens) / self.dense_us / 1e3,
            "packed_gb_per_s": self.shape.bytes_read(self.tokens) / self.packed_us / 1e3,
        }


#: by tokens, by layout
Timings = dict[str, dict[int, Timing]]
Table = dict[Shape, Timings]


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
    routing = Routing(_count(row["experts"]), _count(row["chosen"])) if "experts" in row else None
    if routing is not None and routing.chosen > routing.experts:
        raise ValueError(f"{routing.chosen} of {routing.experts} experts are chosen")
    shape = Shape(_count(row["out"]), _count(row["in"]), row["dtype"], form, routing)
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
