"""``sparseforge-fx plan``: which format each weight should have on this machine, under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from sparseforge_fx.cli.app import PROGRAM, AsJson, DtypeOption, command, examples, pick_device, print_json, stdout
from sparseforge_fx.cli.assignments import read_assignments
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.plans import Plan

MODEL_OR_PLAN = "A Hugging Face folder, a hub id, or a GGUF file; or a plan (.json), for another budget by its prices."
READING_HELP = (
    "What is read (repeatable): calibration (sequences; default 16), length, batch_size, seed, text_column, separator; "
    "include, exclude: a glob over weights or modules."
)


@command
@examples(
    "plan ./model --data train.jsonl --speedup 1.6 -o plan.json",
    "plan ./model --data train.jsonl --bytes 0.4 --tokens 1 -o plan.json",
    'plan ./model --data train.jsonl --loss 0.05 --format int8 --format "2:4 int8" -o plan.json',
    "plan plan.json --speedup 1.4 -o smaller.json",
)
def plan(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the plan there (json).")],
    data: Annotated[
        str | None, typer.Option(help="Text: a hub id, a text, jsonl or parquet file, a folder, or 'self'.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Of the linears together, at least.")] = None,
    bytes: Annotated[float | None, typer.Option("--bytes", help="Share of the dense bytes, at most.")] = None,
    loss: Annotated[float | None, typer.Option(help="Predicted increase in nats per token, at most.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", help="Token counts that speed is of (repeatable); default 1 and 8.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="That may be chosen, e.g. '2:4 int8' (repeatable); default: all there are."),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Times to go by, which lower --output wrote.")] = None,
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=READING_HELP)] = [],  # noqa: B006
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a format for every linear: times measured here, the loss predicted from the text."""
    from sparseforge_fx.decision import OutOfReach
    from sparseforge_fx.files import check_parent
    from sparseforge_fx.planning import make
    from sparseforge_fx.training.recipe import Recipe

    hints = get_type_hints(Recipe)
    reading = read_assignments(
        change, {name: str if name in ("include", "exclude") else hints[name] for name in make.READING}
    )
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name a file")
    check_parent(output)
    goal = make.check_goal(speedup=speedup, bytes=bytes, loss=loss)
    how: dict[str, Any] = {"tokens": tokens, "formats": formats, "table": table, **goal, **reading}
    again = model.endswith(".json")
    beside: dict[str, Any] = {name: value for name, value in (("dtype", dtype), ("device", device)) if value}
    try:
        made = make.plan(Path(model), data, **how, **beside) if again else _measured(model, data, dtype, device, how)
    except OutOfReach as error:
        if again:
            raise
        ((name, _),) = goal.items()
        error.plan.save(kept := output.with_suffix(".prices.json"))
        told = f"{PROGRAM} plan {kept} --{name} {error.nearest:g} -o {output}"
        raise SparseForgeError(f"{error}. What was measured is kept: {told}") from error
    made.save(output)
    if as_json:
        print_json(made.describe())
    console = stdout(quiet=as_json)
    console.print(str(made), highlight=False)
    source = ("MODEL", "DATA") if again or data is None else (model, data)
    console.print(f"wrote {output}; next: {next_steps(made, *source, output)}", highlight=False)


def _measured(model: str, data: str | None, dtype: str | None, device: str | None, how: dict[str, Any]) -> Plan:
    from sparseforge_fx.models.compute_dtype import cast, choose_dtype, dtype_of
    from sparseforge_fx.models.dense import find_dtype, load_dense
    from sparseforge_fx.planning import make

    if data is None:
        raise SparseForgeError("a plan of a model needs text, which the loss is predicted by: give --data")
    where = pick_device(device)
    loaded, tokenizer = load_dense(model)
    computing = choose_dtype(dtype_of(loaded), where, find_dtype(dtype))
    cast(loaded, computing.dtype)
    made = make.plan(loaded.to(where), data, tokenizer=tokenizer, **how)
    made.notes += computing.notes()
    return made


def next_steps(made: Plan, model: str, data: str, path: Path) -> str:
    """The commands that apply the plan."""
    steps = []
    if any(form.is_sparse for form in made.formats.values()):
        steps.append(f"sparseforge-fx sparsify {model} --data {data} --plan {path} -o sparse")
        model = "sparse"
    if any(form.is_quantized for form in made.formats.values()):
        steps.append(f"sparseforge-fx quantize {model} --data {data} --plan {path} -o packed")
    return "; then ".join(steps) or "nothing, it keeps every weight as it is"
