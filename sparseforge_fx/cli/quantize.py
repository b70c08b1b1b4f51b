"""``sparseforge-fx quantize``: a model in few bits, as a packed folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseforge_fx.cli.app import AsJson, DryRun, Exclude, Include, Model, command, examples, pick_device, tell_packed
from sparseforge_fx.cli.assignments import read_assignments
from sparseforge_fx.cli.dry_run import of_quantize, tell

if TYPE_CHECKING:
    from torch import Tensor, nn

READING: dict[str, Any] = {
    "calibration": int, "length": int, "batch_size": int, "seed": int, "text_column": str, "separator": str,
}  # fmt: skip
READING_HELP = f"What of the data is read (repeatable): {', '.join(READING)}."


def scales_of(model: str, others: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The scales that lie in the model's folder, unless other options ask for values of their own; and a note then."""
    from safetensors.torch import load_file

    from sparseforge_fx.errors import SparseForgeError
    from sparseforge_fx.training.sparsify import SCALES

    file = Path(model) / SCALES
    if not file.is_file():
        return {}, []
    given = [name for name, value in others.items() if value]
    if given:
        return {}, [f"{SCALES} of the folder is not used: {', '.join(given)} asks for values of its own"]
    try:
        scales = load_file(file)
    except Exception as error:  # an open set: whatever safetensors says of a damaged file
        raise SparseForgeError(f"{file} cannot be read ({error}): run sparsify again, or delete it") from error
    return scales, []


def values_of(model: nn.Module, scales: Mapping[str, Tensor], asked: str | None) -> str:
    """What weights of such scales are kept in. Raises SparseForgeError unless that is what was asked for, if anything
    was."""
    from sparseforge_fx.errors import SparseForgeError
    from sparseforge_fx.scales import group_of

    name, found = next(iter(scales.items()))
    group = group_of(found, model.get_parameter(name).numel() // found.shape[0])
    values = "int8" if group is None else f"int4/{group}"
    if asked not in (None, values, values.removesuffix("/32")):
        raise SparseForgeError(f"the weights are on a grid of {values}, not {asked}: leave --values out")
    return values


@command
@examples(
    "quantize out --data train.jsonl --plan plan.json -o packed",
    "quantize out --values int4 --data train.jsonl -o packed",
    "quantize ./model --values int8 -o packed --dry-run",
)
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The packed folder.")],
    values: Annotated[
        str | None, typer.Option(help="int8 (default), int4, int4/128 or int4/16; 2:4 weights stay 2:4.")
    ] = None,
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
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL packed, its linears in 8 or 4 bits, 2:4 ones without their zeros: all in one kind, or by a plan.

    A folder that sparsify wrote with values on a grid has their scales: it is packed by them, exactly.
    """
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.checkpoints.save import save_packed
    from sparseforge_fx.deploy.lowering.quantize import quantize as run
    from sparseforge_fx.files import check_output
    from sparseforge_fx.models.companions import companions

    reading = read_assignments(change, READING)
    check_output(output)
    where = pick_device(device)
    scales, notes = scales_of(model, {"data": data, "plan": plan, "include": include, "exclude": exclude})
    if dry_run:
        walked = None if data is None or scales else reading
        tell(of_quantize(model, output, values, plan, include, exclude, walked, device, dtype), as_json)
        return
    loaded, tokenizer = load(model, dtype=dtype)
    beside = companions(model)
    if scales:
        values, include = values_of(loaded, scales, values), list(scales)
    report = run(
        loaded.to(where), values, data, plan=plan, include=include, exclude=exclude, scales=scales or None,
        tokenizer=tokenizer if data is not None else None, **reading,
    )  # fmt: skip
    written = save_packed(loaded, tokenizer, output, beside=beside)
    written["notes"] = notes + report["notes"]
    tell_packed(written, output, as_json)
