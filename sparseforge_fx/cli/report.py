"""``sparseforge-fx report``: the summary of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparseforge_fx.cli.app import (
    AsJson,
    command,
    examples,
    grouped,
    print_json,
    readable_bytes,
    stdout,
)
from sparseforge_fx.errors import SparseForgeError


@command
@examples(
    "report out",
    "report out --html",
    "report out --json",
)
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of sparsify, or a report.json.")],
    page: Annotated[bool, typer.Option("--html", help="Make its report.html again.")] = False,
    as_json: AsJson = False,
) -> None:
    """The summary of a run; or report.html, with what evaluate, benchmark and lower measured since."""
    file = folder / "report.json" if folder.is_dir() else folder
    if not file.is_file():
        raise SparseForgeError(f"there is no report.json in {folder}: name the output folder of a finished run")
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise SparseForgeError(f"{file} is not json ({error})") from error
    if not isinstance(content, dict) or "method" not in content or "sites" not in content:
        raise SparseForgeError(f"{file} is not a report of sparseforge-fx")
    try:
        table = summary(content)
        skipped = grouped(content["skipped"], lambda s: (s["reason"],))
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise SparseForgeError(f"{file} is not a whole report of sparseforge-fx ({error})") from error
    from sparseforge_fx.page.page import write_page

    if page and as_json:
        raise SparseForgeError("--html writes a page and --json prints: give one of the two")

    if as_json:
        print_json(content)
        return
    console = stdout()
    if page:
        console.print(f"wrote {write_page(file.parent)}", highlight=False)
        return
    console.print(table)
    for (name, reason), group in skipped.items():
        console.print(f"stays dense: {name} ({len(group)}): {reason}", highlight=False)


def summary(report: dict[str, Any]) -> Table:
    """A report as a table of two columns."""
    densities = list(report.get("density", {}).values())
    curves = report.get("curves") or []
    experts = [n for of_one in report.get("experts", {}).values() for n in of_one["tokens"]]
    few = sum(len(of_one.get("by_magnitude", [])) for of_one in report.get("experts", {}).values())
    told = f", {few:,} too few: judged by magnitude" if few else ""
    rows: dict[str, Any] = {
        "model": (report.get("recipe") or {}).get("model"),
        "method": " ".join(filter(None, (report["method"], report.get("preset")))),
        "pattern": report.get("pattern"),
        "sites": f"{len(report['sites'])} linears, {report.get('site_parameters', 0):,} weights",
        "stay dense": len(report["skipped"]),
        "non-zero in sites": f"{min(densities):.2%} to {max(densities):.2%}" if densities else None,
        "training tokens": f"{report['tokens']:,} in {len(curves)} steps" if curves else None,
        "calibration": f"{report['calibration_sequences']} sequences" if report.get("calibration_sequences") else None,
        "experts": f"{len(experts)}, each saw {min(experts):,} to {max(experts):,} tokens{told}" if experts else None,
        "loss": f"{curves[0]['loss']:.3f} -> {curves[-1]['loss']:.3f}" if curves else None,
        "KL to dense": f"{curves[0]['kl']:.3f} -> {curves[-1]['kl']:.3f}" if curves else None,
        "learning rate": f"{report['lr']:g}" if "lr" in report else None,
        "seed": report.get("seed"),
        "seconds": f"{report['seconds']:.1f}" if "seconds" in report else None,
        "peak memory": readable_bytes(report["peak_memory_bytes"]) if "peak_memory_bytes" in report else None,
        "device": report.get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
        "commit": report.get("commit"),
        "notes": "; ".join(report.get("notes", [])) or None,
    }
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None and value != "":
            table.add_row(name, str(value))
    return table
