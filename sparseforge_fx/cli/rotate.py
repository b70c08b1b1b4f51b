"""``sparseforge-fx rotate``: the same model in a basis in which pruning loses less."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sparseforge_fx.cli.app import AsJson, DtypeOption, command, examples, pick_device, print_json, stdout
from sparseforge_fx.cli.assignments import read_assignments

MODEL = "A Hugging Face folder, a hub id, or a GGUF file; dense."
READING_HELP = (
    "What is read and learned (repeatable): calibration (sequences; default 32), length, batch_size, seed, "
    "text_column, separator; include, exclude: a glob over weights or modules; steps (300) and lr (0.01) of learning."
)


@command
@examples(
    "rotate ./model --data train.jsonl -o rotated",
    "rotate ./model --data train.jsonl --set calibration=64 --set steps=1000 -o rotated",
)
def rotate(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    data: Annotated[str, typer.Option(help="Text: a hub id, a text, jsonl or parquet file, a folder, or 'self'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the rotated model.")],
    pattern: Annotated[str, typer.Option(help="That it is to be pruned to.")] = "2:4",
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=READING_HELP)] = [],  # noqa: B006
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL in another basis: it answers as before, and pruned afterwards it loses less.

    The products that turn it are of float32, unless --dtype says otherwise; the folder has the checkpoint's own.
    """
    import torch

    from sparseforge_fx.files import check_output, new_folder
    from sparseforge_fx.models.companions import companions, copy_companions
    from sparseforge_fx.models.compute_dtype import cast
    from sparseforge_fx.models.dense import find_dtype, load_dense, write_checkpoint
    from sparseforge_fx.planning import rotate as home
    from sparseforge_fx.report import write_json
    from sparseforge_fx.training.recipe import Recipe

    hints = get_type_hints(Recipe)
    kinds: dict[str, Any] = {n: str if n in ("include", "exclude") else hints[n] for n in home.READING}
    how = read_assignments(change, kinds | {"steps": int, "lr": float})
    check_output(output, overwrite=overwrite)
    where = pick_device(device)
    loaded, tokenizer = load_dense(model)
    beside = companions(model)
    back = cast(loaded, find_dtype(dtype) or torch.float32)
    report = home.rotate(loaded.to(where), data, pattern=pattern, tokenizer=tokenizer, **how)
    back()
    loaded.cpu()
    with new_folder(output, overwrite=overwrite) as partial:
        write_checkpoint(loaded, tokenizer, partial)
        write_json(partial / "rotation.json", report)
        copy_companions(beside, partial)
    if as_json:
        print_json(report)
    console = stdout(quiet=as_json)
    for space in report["spaces"]:
        told = f"{space['width']} wide, read by {space['readers']} linears: {pattern} loses {space['lost_before']:.2%}"
        console.print(f"{told} of what they compute before, {space['lost_after']:.2%} after, as predicted")
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False)
    wanted = "" if report["pattern"] == "2:4" else f"--pattern {pattern} "
    next_step = f"sparseforge-fx sparsify {output} --data {data} {wanted}-o sparse"
    console.print(f"wrote {output}; next: {next_step}", highlight=False)
