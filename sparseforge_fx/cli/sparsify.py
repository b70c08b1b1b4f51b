"""``sparseforge-fx sparsify``: from a checkpoint to a sparse one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparseforge_fx.cli.app import (
    AsJson,
    DryRun,
    DtypeOption,
    Exclude,
    Include,
    command,
    examples,
    pick_device,
    print_json,
    stdout,
)
from sparseforge_fx.cli.assignments import read_assignments
from sparseforge_fx.cli.dry_run import tell_of_sparsify
from sparseforge_fx.cli.on_disk import DISK, activation_limit, check_before, healing, on_disk, run_on_disk, suggest
from sparseforge_fx.cli.report import summary
from sparseforge_fx.cli.run_folder import RunFolder
from sparseforge_fx.cli.tracker import Tracker
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.training.recipe import Recipe

METHODS_HELP = (
    "sparseforge (default with data), gmp, imp, sr-ste, ast, cast, maskllm, maskpro; "
    "without training: alps, sparsegpt, wanda, magnitude."
)
TRAINING_TEXT = (
    "Training text: a hub id owner/name[:config][:split], a text, jsonl or parquet file, or a folder; "
    "'self': drawn from the model."
)
PRESETS = (
    "Of sparseforge: alps+kd (default: a layer-wise solution, fixed masks, distillation), paper or paper-universal "
    "(the authors' scripts), annealed (their method, our constants)."
)
OTHER_FIELD = "Any other option of the method (repeatable)."
CONFIG = "A recipe (YAML), or the output folder of a run, which holds its own; options given beside it go before it."
CURVATURE = (
    "The estimator: gauss_newton, fisher (labels drawn from the model), activation, squared_gradient, hutchinson."
)
DEVICE = (
    "cpu, cuda, cuda:1, ...; default cuda where there is one. disk: weights stay there, those of one block at a time "
    "in memory (methods that do not train; trained ones by processes that share the model under FSDP2)."
)
TEACHER = (
    "Where MODEL is 2:4 already: the model before that, which it is distilled from; --set start=magnitude takes its "
    "masks as they are."
)
CHECKPOINTING = "Blocks are computed again backwards: less memory."
ACTIVATIONS = "With --device disk: 2GB, 500MB, ... of activations stay in memory, the others in files; default: all do."
SAVE_SECONDS = 600.0
MODEL = "A Hugging Face folder, a hub id, or a GGUF file; default: the recipe's."


class Compile(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


@command
@examples(
    "sparsify ./model --data train.jsonl --tokens 20M -o out",
    "sparsify ./model --data train.jsonl --method alps -o out",
    "sparsify ./model --data train.jsonl --plan plan.json -o out",
    "sparsify --config out -o again",
    "sparsify ./model --data train.jsonl --tokens 20M -o out --dry-run",
)
def sparsify(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, report.json and report.html.")],
    model: Annotated[str | None, typer.Argument(help=MODEL, show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG)] = None,
    data: Annotated[str | None, typer.Option(help=TRAINING_TEXT)] = None,
    teacher: Annotated[str | None, typer.Option(help=TEACHER)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text; default: found.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between documents; default: the tokenizer's end.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Of token files; default: the Hugging Face home.")] = None,
    method: Annotated[str | None, typer.Option(help=METHODS_HELP)] = None,
    preset: Annotated[str | None, typer.Option(help=PRESETS)] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, e.g. 500k, 20M, 1.5B; default 60 steps.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N of every M weights stay; default 2:4.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default 0.0005.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per micro-batch; default 4.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per sequence; default 512.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Micro-batches per step; default 1.")] = None,
    calibration: Annotated[int | None, typer.Option(min=1, help="Sequences for layer-wise work; default 64.")] = None,
    slorb_block: Annotated[
        int | None,
        typer.Option(min=0, help="Inputs per column of a low-rank branch (SLoRB), 0: none; default: the preset's."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="AdamW's, of matrices; default: the preset's, or 0.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (default), or adamw8bit, its moments in 8 bits (torchao).")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the distillation; default: the preset's, or 1.")] = None,
    curvature: Annotated[str | None, typer.Option(help=CURVATURE)] = None,
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=OTHER_FIELD)] = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    plan: Annotated[str | None, typer.Option(help="A plan (json): only what it makes sparse is trained.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and sampling; default 0.")] = None,
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    compile: Annotated[Compile, typer.Option(help="torch.compile; auto: where the run is long.")] = Compile.auto,
    activation_checkpointing: Annotated[bool, typer.Option("--activation-checkpointing", help=CHECKPOINTING)] = False,
    activation_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help=ACTIVATIONS)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the end.")] = False,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds between two saved training states.")
    ] = SAVE_SECONDS,
    log_with: Annotated[str | None, typer.Option(help="A tracker of accelerate: tensorboard, wandb, ...")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a model to exact N:M sparsity, and write it as a plain Hugging Face checkpoint with a report."""
    asked = {
        "model": model, "data": data, "text_column": text_column, "separator": separator, "method": method,
        "preset": preset, "tokens": tokens, "pattern": pattern, "lr": lr, "batch_size": batch_size, "length": length,
        "accumulate": accumulate, "calibration": calibration, "slorb_block": slorb_block, "include": sorted(include),
        "exclude": sorted(exclude), "plan": plan, "seed": seed, "dtype": dtype,
        "weight_decay": weight_decay, "optimizer": optimizer, "teacher": teacher,
    }  # fmt: skip
    recipe, folder = _recipe(config, asked, change, curvature, temperature), RunFolder(output)
    of_training = {"log_with": log_with, "compile": compile is Compile.on, "save_seconds": save_seconds != SAVE_SECONDS}
    from_disk = not _shared(device, recipe) and on_disk(
        device, **of_training, activation_checkpointing=activation_checkpointing
    )
    _check_trains(recipe, of_training)
    limit = activation_limit(activation_bytes, from_disk)
    walk: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "activation_bytes": limit}
    if dry_run:
        if from_disk:
            check_before(recipe, output, **walk)
        else:
            folder.check(recipe.describe(), resume=resume, overwrite=overwrite)
        tell_of_sparsify(recipe, output, device, as_json, activation_checkpointing)
        return
    if from_disk:
        run_on_disk(recipe, output, as_json=as_json, cache_dir=cache_dir, **walk)
        return
    _run(
        recipe, folder, as_json=as_json, device=device, resume=resume, overwrite=overwrite, log_with=log_with,
        cache_dir=cache_dir, save_seconds=save_seconds, activation_checkpointing=activation_checkpointing,
        compile="auto" if compile is Compile.auto else compile is Compile.on,
    )  # fmt: skip


def _recipe(
    config: Path | None, asked: dict[str, Any], change: list[str], curvature: str | None, temperature: float | None
) -> Recipe:
    """The recipe of a file with what was asked for beside it. Raises SparseForgeError for all that can be known to be
    wrong before a model is loaded."""
    from dataclasses import replace

    from sparseforge_fx.data.opening import LENGTH
    from sparseforge_fx.data.sources import open_sources
    from sparseforge_fx.methods.base import TrainedConfig
    from sparseforge_fx.methods.catalog import find_options, find_preset
    from sparseforge_fx.plans import Plan
    from sparseforge_fx.training.recipe import Recipe

    recipe = Recipe() if config is None else Recipe.read(config)
    given = {name: value for name, value in asked.items() if value not in (None, [])}
    recipe = recipe.changed(**given)
    has_data = recipe.data is not None
    chosen = recipe.name(has_data)
    find_preset(chosen, recipe.preset)
    if temperature is not None:
        loss = recipe.settings(has_data).objective
        recipe = recipe.changed(objective=replace(loss, temperature=temperature))
    recipe = recipe.changed(**read_assignments(change, find_options(chosen)))
    if curvature is not None:
        recipe = recipe.changed(curvature=curvature)
    constants = recipe.config(has_data)
    if recipe.model is None:
        raise SparseForgeError("there is no model: name a folder, a hub id or a GGUF file, or a --config that does")
    if isinstance(constants, TrainedConfig) and recipe.length != LENGTH:  # of that, no more than the model takes
        recipe.check_one_step()
    if isinstance(recipe.plan, str):
        Plan.read(recipe.plan).check_machine()
    if recipe.data is not None and recipe.data != "self":
        open_sources(recipe.data)
    return recipe.resolved(has_data)


def _check_trains(recipe: Recipe, of_training: dict[str, Any]) -> None:
    """Raise SparseForgeError for what only a run that trains has a use for."""
    from sparseforge_fx.methods.catalog import ONE_SHOT

    given = [f"--{name.replace('_', '-')}" for name, value in of_training.items() if value]
    if recipe.method in ONE_SHOT and given:
        raise SparseForgeError(f"{recipe.method} does not train and has no use for {given[0]}: leave it out")


def _shared(device: str | None, recipe: Recipe) -> bool:
    """Is this a run of processes that share a model, which they read from disk?"""
    if device != DISK:
        return False
    from sparseforge_fx.cli.opened import shares

    return shares(recipe)


def _run(
    recipe: Recipe, folder: RunFolder, *, as_json: bool, device: str | None, resume: bool, overwrite: bool,
    log_with: str | None, **how: Any,
) -> None:  # fmt: skip
    """Load, sparsify, write; ``how`` goes to :func:`sparseforge_fx.sparsify`."""
    import torch

    from sparseforge_fx.cli.opened import Opened
    from sparseforge_fx.methods.catalog import ONE_SHOT
    from sparseforge_fx.models.compute_dtype import ComputeDtype, choose_dtype
    from sparseforge_fx.models.dense import find_dtype
    from sparseforge_fx.training.processes import Processes
    from sparseforge_fx.training.sparsify import sparsify as run

    plain = recipe.describe()
    processes = Processes()
    processes.first_does(lambda: folder.check(plain, resume=resume, overwrite=overwrite))
    where, wanted = pick_device(None if device == DISK else device), find_dtype(recipe.dtype)
    assert recipe.model is not None
    if recipe.method in ONE_SHOT:
        suggest(recipe.model)
    opened = Opened(recipe, where, device == DISK)
    begun = folder.begun(resume)
    if "compute_dtype" in begun or (begun and folder.saved()):  # a second measurement might choose otherwise
        computing = ComputeDtype.read(begun.get("compute_dtype"))
    else:
        computing = choose_dtype(opened.dtype, where, wanted)
    opened.compute_in(computing.dtype)
    if overwrite:
        processes.first_does(folder.forget)
    tracker = Tracker(log_with, folder.output, plain)

    def on_step(step: int, row: dict[str, float]) -> None:
        if processes.first and (not folder.started.exists() or ("compute_dtype" not in begun and step == 0)):
            folder.begin(plain, computing.describe())
        tracker.log(row, step)

    if recipe.method not in ONE_SHOT:
        how |= {"state_path": folder.state, "accelerator": tracker.accelerator, "on_step": on_step}
    result = folder.telling(run)(
        opened.model, recipe=recipe, tokenizer=None if recipe.data is None else opened.tokenizer, **how
    )
    tracker.end()
    result.report["compute_dtype"] = computing.describe()
    result.report["notes"] = computing.notes() + result.report["notes"]
    opened.restore(result.model)

    def save() -> None:
        logs = [tracker.folder] if tracker.folder.exists() else []
        result.save(folder.output, opened.tokenizer, overwrite=True, beside=[*opened.beside, *logs])

    def write() -> None:
        if result.in_parts is None:
            save()
        if as_json:
            print_json(result.report)
        console = stdout(quiet=as_json)
        console.print(summary(result.report))
        next_step = f"next: sparseforge-fx evaluate {folder.output} --dense {recipe.teacher or recipe.model}"
        if recipe.method in ONE_SHOT:
            next_step += f"; train it: sparseforge-fx {healing(folder.output, recipe)}"
        if isinstance(recipe.plan, str):
            next_step += f"; in the plan's formats: sparseforge-fx {_packing(recipe.plan, recipe.data, folder.output)}"
        console.print(f"wrote {folder.output}, with report.html; {next_step}", highlight=False)

    if result.in_parts is not None:  # all have a part of it
        save()
    processes.first_does(write)
    torch.cuda.empty_cache()


def _packing(plan: str, data: Any, folder: Path) -> str:
    """The command that packs the sparse model as its plan says."""
    from sparseforge_fx.plans import Plan

    if not any(form.is_quantized for form in Plan.read(plan).formats.values()):
        return f"export {folder} --format safetensors -o packed"
    text = f"--data {data} " if isinstance(data, str) else ""
    return f"quantize {folder} {text}--plan {plan} -o packed"
