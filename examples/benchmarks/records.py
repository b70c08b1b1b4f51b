"""Where results lie, and what tables.py and plots.py read and write of them. Without torch: neither needs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / "results"
NONE = "_no runs yet_"


def read(folder: str) -> list[dict]:
    """Every json of results/FOLDER, by name."""
    return [json.loads(p.read_text()) for p in sorted((RESULTS / folder).glob("*.json"))]


def table(names: Sequence[str], sides: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; ``sides`` has one letter a column, l or r. Without rows: that there are no runs."""
    lines = [_row(names), "|" + "".join("---|" if side == "l" else "---:|" for side in sides)]
    lines += [_row(map(str, row)) for row in rows]
    return "\n".join(lines) if len(lines) > 2 else NONE


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def blocks(parts: Iterable[tuple[str, str]]) -> str:
    """Tables, each under its own line of text."""
    return "\n\n".join(f"{text}\n\n{body}" for text, body in parts) or NONE


def with_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def machine(run: dict) -> str:
    return f"{run['device']}, {run['threads']}"
