"""``sparseforge-fx quantize``: a model in few bits, as a packed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import Exclude, Include, Model, command, pick_device, tell_packed
from sparseforge_fx.cli.assignments import read_assignments

READING: dict[str, Any] = {
    "calibration": int, "length": int, "batch_size": int, "seed": int, "text_column": str, "separator": str,
}  # fmt: skip
READING_HELP = f"What of the data is read (repeatable): {', '.join(READING)}."


@command
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The packed folder.")],
    values: Annotated[str | None, typer.Option(help="int8 (default), int4 or int4/128; 2:4 weights stay 2:4.")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan (json): exactly its formats; after sparsify --plan.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Calibration text, as of sparsify; without any each weight gets its own nearest values."),
    ] = None,
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=READING_HELP)] = [],  # noqa: B006
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
) -> None:
    """Write MODEL packed, its linears in 8 or 4 bits, 2:4 ones without their zeros: all in one kind, or by a plan."""
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.checkpoints.save import save_packed
    from sparseforge_fx.deploy.lowering.quantize import quantize as run
    from sparseforge_fx.files import check_output

    reading = read_assignments(change, READING)
    check_output(output)
    where = pick_device(device)
    loaded, tokenizer = load(model, dtype=dtype)
    report = run(
        loaded.to(where), values, data, plan=plan, include=include, exclude=exclude,
        tokenizer=tokenizer if data is not None else None, **reading,
    )  # fmt: skip
    written = save_packed(loaded, tokenizer, output)
    written["notes"] = report["notes"]
    tell_packed(written, output)
