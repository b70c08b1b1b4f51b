"""Where results lie, and what tables.py and plots.py read and write of them. Without torch: neither needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / "results"
NONE = "_no runs yet_"


#: what presets were called, and what of a label goes with them, in runs that were made before the presets of today; the
#: constants that ``paper`` then had are those of ``annealed``, AST's and SR-STE's were others than theirs are now
PRESETS = {"tuned": "alps+kd", "paper": "annealed"}
LABELS = {
    "sparseforge-tuned": "alps+kd", "tuned": "alps+kd", "sparseforge-paper": "sparseforge-annealed", "paper": "annealed",
    "ast": "ast-earlier", "sr-ste": "sr-ste-earlier",
}  # fmt: skip
#: of a commit in a table
DIRTY = "A + after a commit: the run's tree had changes that no commit holds, so that it cannot be made again exactly."


def read(folder: str) -> list[dict]:
    """Every json of results/FOLDER, by name, with its label and preset as they are called today."""
    return [today(json.loads(p.read_text())) for p in sorted((RESULTS / folder).glob("*.json"))]


def today(run: dict) -> dict:
    """Runs of presets that had other names or constants say so: ``earlier`` is what a reader is told."""
    run = _renamed(run)
    if not plain(run) or "tokens_per_parameter" in run:  # the study's methods have names of their own
        return run
    label = re.sub(r"^(sweep-|ablation-|)alps\+kd(?!-plain)(?=-)", r"\1alps+kd-plain", run.get("label", ""))
    return run | {"label": label}


def plain(run: dict) -> bool:
    """Is it of alps+kd without blocks that learn before the run, as the preset was, or was asked to be?"""
    report = run.get("report") or {}
    return report.get("preset") == "alps+kd" and not report.get("config", {}).get("reconstruct")


def _renamed(run: dict) -> dict:
    report = run.get("report") or {}
    if not report.get("preset") or "settings" in report or run["method"] not in ("sparseforge", "ast", "sr-ste"):
        return run  # the presets of today write their settings
    names = "|".join(sorted(LABELS, key=len, reverse=True))
    label = re.sub(rf"^(sweep-|ablation-|)({names})(?=-)", lambda m: m[1] + LABELS[m[2]], run.get("label", ""))
    if run["method"] != "sparseforge":
        return run | {"label": label, "earlier": "earlier constants"}
    told = {"earlier": "then called paper"} if report["preset"] == "paper" else {}
    return run | told | {"label": label, "report": report | {"preset": PRESETS[report["preset"]]}}


def table(names: Sequence[str], sides: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; ``sides`` has one letter a column, l or r. Without rows: that there are no runs."""
    rows = [list(row) for row in rows]
    if wrong := {len(row) for row in (sides, *rows)} - {len(names)}:
        raise ValueError(f"{len(names)} columns ({', '.join(names)}) and a row, or sides, of {wrong.pop()}")
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
