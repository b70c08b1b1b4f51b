"""Values of weights as tables of blocks by projections, which is how people think of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDEST = 16  # columns; beyond, those that differ in a number share one
ELSEWHERE = "outside the blocks"


@dataclass(frozen=True)
class Cell:
    """What one weight says, and how much colour it has, 0 to 1."""

    text: str
    heat: float


@dataclass(frozen=True)
class Heat:
    """One table: ``rows`` are (block, a cell or None for each column)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def place(name: str) -> tuple[str, str, str]:
    """(what holds the blocks, block, projection) of a weight's name."""
    found = re.match(r"(.*?)\.?\b(\d+)\.(.+)$", name.removesuffix(".weight"))
    return (found[1], found[2], found[3]) if found else ("", ELSEWHERE, name.removesuffix(".weight"))


def tables(values: Mapping[str, Cell]) -> list[Heat]:
    """A table for everything that holds blocks."""
    places = {name: place(name) for name in values}
    found = []
    for holder in dict.fromkeys(p[0] for p in places.values()):
        mine = {name: (block, part) for name, (h, block, part) in places.items() if h == holder}
        columns = list(dict.fromkeys(part for _, part in mine.values()))
        if len(columns) > WIDEST:
            mine = {name: (block, re.sub(r"\d+", "*", part)) for name, (block, part) in mine.items()}
            columns = list(dict.fromkeys(part for _, part in mine.values()))
        cells: dict[str, dict[str, list[Cell]]] = {}
        for name, (block, part) in mine.items():
            cells.setdefault(block, {}).setdefault(part, []).append(values[name])
        rows = [(block, [_merged(by_part.get(c)) for c in columns]) for block, by_part in cells.items()]
        found.append(Heat(holder or ELSEWHERE, [_short(c, columns) for c in columns], rows))
    return found


def _merged(cells: Sequence[Cell] | None) -> Cell | None:
    """Several that share a place: the middle one."""
    return sorted(cells, key=lambda c: c.heat)[len(cells) // 2] if cells else None


def _short(column: str, columns: Sequence[str]) -> str:
    """The last part of a name where that tells it from the others."""
    last = column.rpartition(".")[2]
    return last if sum(c.rpartition(".")[2] == last for c in columns) == 1 else column


def of_numbers(values: Mapping[str, float], shown: str = "{:.3g}", *, log: bool = False) -> dict[str, Cell]:
    """Cells whose colour goes from the smallest to the largest value."""
    scaled = {n: math.log(max(v, 1e-30)) if log else v for n, v in values.items()}
    low, high = min(scaled.values()), max(scaled.values())
    return {
        n: Cell(shown.format(values[n]), (s - low) / (high - low) if high > low else 0.5) for n, s in scaled.items()
    }


def of_formats(formats: Mapping[str, Any], bits: Mapping[str, float]) -> dict[str, Cell]:
    """Cells whose colour is deeper the fewer bits a weight takes."""
    most, least = max(bits.values(), default=1.0), min(bits.values(), default=0.0)
    span = (most - least) or 1.0
    return {n: Cell(str(form), (most - bits[n]) / span) for n, form in formats.items()}
