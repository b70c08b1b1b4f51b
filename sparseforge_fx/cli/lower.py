"""``sparseforge-fx lower``: which linears of a 2:4 model run faster packed on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseforge_fx.cli.app import (
    AsJson,
    Model,
    Tokens,
    command,
    examples,
    grouped,
    pick_device,
    print_json,
    readable_bytes,
    stdout,
)
from sparseforge_fx.cli.beside import Beside

OUTPUT = "Write the measured table there (json); default: costs.json of MODEL, if that is the folder of a run."


@command
@examples(
    "lower out",
    "lower out --tokens 1 --tokens 8 -o costs.json",
    "lower out --table costs.json --json",
)
def lower(
    model: Model,
    tokens: Tokens = None,
    target: Annotated[str, typer.Option(help="auto, or the device whose kernels are meant.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    table: Annotated[
        Path | None, typer.Option(help="Decide by a table that --output wrote, without measuring.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT)] = None,
    as_json: AsJson = False,
) -> None:
    """Time every 2:4 linear dense and packed, and say which would run packed, which dense, and why."""
    from sparseforge_fx.deploy.lowering import cost, cost_table
    from sparseforge_fx.deploy.lowering.lower import lower as lower_model
    from sparseforge_fx.models.dense import load_dense

    _, known = cost.check_request(tokens or None, table)
    # a table that was read is not measured again: nothing new to keep
    kept = Beside.of(model, "costs.json", output) if table is None or output is not None else Beside(None, None)
    loaded = load_dense(model, dtype=dtype)[0].to(pick_device(device))
    report = lower_model(loaded, target=target, tokens=tokens or None, table=known).report
    assert isinstance(report, dict)
    console = stdout(quiet=as_json)
    measured = cost_table.as_table(cost_table.read_row(row) for row in report["table"])
    tell = partial(print_json, report) if as_json else partial(_tell, report, console)
    kept.write(lambda file: cost_table.save_table(measured, file), tell, console)


def _tell(report: dict[str, Any], console: Console) -> None:
    """The tables of what was timed, of what would run packed, and of what stays dense."""
    from sparseforge_fx.report import readable_sides

    timings = Table(title="microseconds, dense and packed", title_justify="left")
    for name in ("out x in", "dtype", "layout", "tokens", "dense", "packed", "dense over packed"):
        timings.add_column(name, justify="right")
    for row in report["table"]:
        times = f"{row['dense_us']:.1f}", f"{row['packed_us']:.1f}", f"{row['ratio']:.2f}x"
        timings.add_row(readable_sides(row), row["dtype"], row["layout"], str(row["tokens"]), *times)
    console.print(timings)
    for title, rows in (("packed", report["sites"]), ("dense", report["skipped"])):
        chosen = Table(title=f"{len(rows)} {title}", title_justify="left")
        for name in ("weights", "count", "reason" if title == "dense" else "out x in"):
            chosen.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        where = lambda r: (f"{readable_sides(r)}, {r['layout']}",)  # noqa: E731
        why = where if title == "packed" else lambda r: (r["reason"],)
        for (name, reason), group in grouped(rows, why).items():
            chosen.add_row(name, str(len(group)), reason)
        console.print(chosen)
    before, after = readable_bytes(report["dense_bytes"]), readable_bytes(report["lowered_bytes"])
    console.print(f"2:4 linears: {before} dense, {after} lowered", highlight=False)
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False)
