"""What every way of packing a model reports: lowering a graph, lowering modules, writing a checkpoint."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.kernels.packed import Packed

PackedSite = TypedDict(
    "PackedSite",
    {"name": str, "experts": NotRequired[int], "out": int, "in": int, "format": str, "layout": str, "bytes": int},
)


class DenseSite(TypedDict):
    """A linear that stayed dense, and why."""

    name: str
    reason: str
    shape: NotRequired[list[int]]


class PackingReport(TypedDict):
    """The packed linears, the others, and the bytes of those that are 2:4 before and after.

    ``scratch_bytes``: the largest packed weight in dense form. Where the cost gate decided: the token counts, the rows
    of its table, the records of the passes, and the machine (see ``sparseforge_fx.report.environment``). Of an export:
    its format, the bytes of the file and of a generator's cache for one sequence, and what the user must know.
    """

    sites: list[PackedSite]
    skipped: list[DenseSite]
    dense_bytes: int
    lowered_bytes: int
    scratch_bytes: int
    tokens: NotRequired[list[int]]
    table: NotRequired[list[dict[str, Any]]]
    passes: NotRequired[list[dict[str, Any]]]
    versions: NotRequired[dict[str, str]]
    device: NotRequired[str]
    threads: NotRequired[int]
    commit: NotRequired[str | None]
    format: NotRequired[str]
    notes: NotRequired[list[str]]
    file_bytes: NotRequired[int]
    cache_bytes: NotRequired[int]


def stored_site(name: str, packed: Packed, layout: str = ROWS.name) -> PackedSite:
    """Of a packed linear or stack of experts; the layout is that of the disk if nothing is said."""
    *stack, out, width = packed.shape
    site: PackedSite = {
        "name": name,
        "out": out,
        "in": width,
        "format": str(packed.format),
        "layout": layout,
        "bytes": packed.nbytes,
    }
    return {**site, "experts": stack[0]} if stack else site
