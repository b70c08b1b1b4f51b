"""``sparseforge-fx sparsify``: from a checkpoint to a sparse one."""

from __future__ import annotations

import json
import re
import shutil
import sys
import typing
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import (
    DtypeOption,
    Exclude,
    Include,
    Model,
    PatternOption,
    command,
    pick_device,
    stdout,
)
from sparseforge_fx.cli.report import summary
from sparseforge_fx.errors import SparseForgeError

METHODS_HELP = (
    "sparseforge (default with data), gmp, imp, sr-ste, ast, cast, maskllm, maskpro; "
    "without training: alps, sparsegpt, wanda, magnitude."
)
STATE, STATE_OF = "training-state.pt", "training-state.json"  # what a run under way keeps in its output folder
LOGS = "logs"
TRAINING_TEXT = (
    "Training text: a hub id owner/name[:config][:split], a text, jsonl or parquet file, or a folder; "
    "'self': drawn from the model."
)
OTHER_FIELD = "Any other option of the method (repeatable)."


class Compile(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


@command
def sparsify(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, report.json and curves.png.")],
    data: Annotated[str | None, typer.Option(help=TRAINING_TEXT)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text; default: found.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between documents; default: the tokenizer's end.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Of token files; default: the Hugging Face home.")] = None,
    method: Annotated[str | None, typer.Option(help=METHODS_HELP)] = None,
    preset: Annotated[str | None, typer.Option(help="Of sparseforge: tuned (default) or paper.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, e.g. 500k, 20M, 1.5B; default 60 steps.")] = None,
    pattern: PatternOption = "2:4",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    calibration: Annotated[int, typer.Option(min=1, help="Sequences for layer-wise pruning.")] = 64,
    slorb_block: Annotated[
        int | None, typer.Option(min=1, help="Inputs per column of a low-rank branch (SLoRB); default: no branch.")
    ] = None,
    curvature: Annotated[str | None, typer.Option(help="The estimator, e.g. gauss_newton.")] = None,
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=OTHER_FIELD)] = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of data order and sampling.")] = 0,
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cuda where there is one.")] = None,
    compile: Annotated[Compile, typer.Option(help="torch.compile; auto: where the run is long.")] = Compile.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the end.")] = False,
    save_seconds: Annotated[float, typer.Option(min=0, help="Seconds between two saved training states.")] = 600.0,
    log_with: Annotated[str | None, typer.Option(help="A tracker of accelerate: tensorboard, wandb, ...")] = None,
) -> None:
    """Train a model to exact N:M sparsity, and write it as a plain Hugging Face checkpoint with a report."""
    shape_of_run = {
        "model": model,
        "data": data,
        "text_column": text_column,
        "separator": separator,
        "method": method,
        "preset": preset,
        "tokens": tokens,
        "pattern": pattern,
        "lr": lr,
        "batch_size": batch_size,
        "length": length,
        "accumulate": accumulate,
        "calibration": calibration,
        "slorb_block": slorb_block,
        "curvature": curvature,
        "set": sorted(change),
        "include": sorted(include),
        "exclude": sorted(exclude),
        "seed": seed,
        "dtype": dtype,
    }
    count = None if tokens is None else parse_tokens(tokens)
    if count is not None and count < batch_size * length * accumulate:
        step = batch_size * length * accumulate
        raise SparseForgeError(
            f"--tokens {tokens} is less than one step of {step} tokens: raise it, or lower --batch-size or --length"
        )

    import torch

    from sparseforge_fx.data.text import open_sources
    from sparseforge_fx.methods.catalog import find_options
    from sparseforge_fx.models import dense as models
    from sparseforge_fx.models.compute_dtype import ComputeDtype, cast, choose_dtype, dtype_of
    from sparseforge_fx.pattern import parse_pattern
    from sparseforge_fx.report import plot_curves, write_json
    from sparseforge_fx.training.processes import Processes
    from sparseforge_fx.training.sparsify import sparsify as run

    # everything that can be known to be wrong before a model is loaded
    processes = Processes()
    processes.first_does(lambda: _check_run_folder(output, shape_of_run, resume=resume, overwrite=overwrite))
    options = find_options(method or ("magnitude" if data is None else "sparseforge"), preset)
    parse_pattern(pattern)
    changes = _changes(change, options) | ({"curvature": curvature} if curvature else {})
    if data is not None and data != "self":
        open_sources(data)
    where = pick_device(device)
    wanted = models.find_dtype(dtype)

    loaded, tokenizer = models.load_model(model)
    state, started = output / STATE, output / STATE_OF
    begun = json.loads(started.read_text()) if resume and started.is_file() else {}
    if "compute_dtype" in begun or (begun and state.is_file()):  # a second measurement might choose otherwise
        computing = ComputeDtype.read(begun.get("compute_dtype"))
    else:
        computing = choose_dtype(dtype_of(loaded), where, wanted)
    restore_dtype = cast(loaded, computing.dtype)
    loaded.to(where)

    def forget() -> None:
        for leftover in (state, started):
            leftover.unlink(missing_ok=True)

    if overwrite:
        processes.first_does(forget)
    tracker = _Tracker(log_with, output, shape_of_run)

    def on_step(step: int, row: dict[str, float]) -> None:
        # from the first step on, and not before, there is something to resume
        if processes.first and (not started.exists() or ("compute_dtype" not in begun and step == 0)):
            write_json(started, {**shape_of_run, "compute_dtype": computing.describe()})
        tracker.log(row, step)

    result = _saying_how_to_go_on(run, output)(
        loaded,
        data,
        method=method,
        preset=preset,
        pattern=pattern,
        include=include,
        exclude=exclude,
        tokenizer=tokenizer,
        text_column=text_column,
        separator=separator,
        cache_dir=cache_dir,
        tokens=count,
        batch_size=batch_size,
        length=length,
        accumulate=accumulate,
        lr=lr,
        slorb_block=slorb_block,
        calibration=calibration,
        seed=seed,
        compile="auto" if compile is Compile.auto else compile is Compile.on,
        resume_from=state,
        save_seconds=save_seconds,
        accelerator=tracker.accelerator,
        on_step=on_step,
        **changes,
    )
    tracker.end()
    report = {"command": shape_of_run, "compute_dtype": computing.describe(), **result.report}
    report["notes"] = computing.notes() + report["notes"]
    restore_dtype()

    def write() -> None:
        with models.new_folder(output, overwrite=True) as folder:
            models.write_checkpoint(result.model.cpu(), tokenizer, folder)
            if report.get("curves"):
                plot_curves(report["curves"], folder / "curves.png")
            write_json(folder / "report.json", report)
            if tracker.folder.exists():
                shutil.copytree(tracker.folder, folder / tracker.folder.name)
        console = stdout()
        console.print(summary(report))
        next_step = f"next: sparseforge-fx evaluate {output} --dense {model}"
        console.print(f"wrote {output}; {next_step}", markup=False, highlight=False)

    processes.first_does(write)
    torch.cuda.empty_cache()


def parse_tokens(text: str) -> int:
    """``20M`` -> 20000000; k, M and B (or G), any case. Raises SparseForgeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg]?)", text.strip(), re.IGNORECASE)
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    count = round(float(match[1]) * scale[match[2].lower()]) if match else 0
    if count < 1:
        raise SparseForgeError(f"{text!r} is not a number of tokens: write for example 500k, 20M or 1.5B")
    return count


def _check_run_folder(output: Path, wanted: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Is the output folder free, or the run in it this one?"""
    from sparseforge_fx.models.dense import check_output, finish_replacement

    if resume and overwrite:
        raise SparseForgeError("--resume goes on with a run and --overwrite forgets it: give one of the two")
    finish_replacement(output)
    state, started = output / STATE, output / STATE_OF
    if resume and started.is_file():
        try:
            before = dict(json.loads(started.read_text()))
        except (ValueError, TypeError) as error:
            raise SparseForgeError(f"{started} cannot be read ({error}): start anew with --overwrite") from error
        different = [k for k in wanted if before.get(k) != wanted[k]]
        if different:
            told = "; ".join(f"{k} was {before.get(k)!r} and is now {wanted[k]!r}" for k in different)
            raise SparseForgeError(
                f"the run in {output} is another one ({told}): repeat its options, or start anew with --overwrite"
            )
    inside = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    unfinished = bool(inside & {name + end for name in (STATE, STATE_OF) for end in ("", ".partial")})
    if unfinished and not (resume or overwrite):
        raise SparseForgeError(
            f"{output} holds a run that was not finished: give --resume to go on with it or --overwrite to start anew"
        )
    if resume and not unfinished and "config.json" in inside:
        raise SparseForgeError(f"the run in {output} is finished: there is nothing to resume")
    unfinished |= resume and inside <= {LOGS}
    check_output(output, overwrite=overwrite or unfinished)
    if resume and not state.exists():
        print(f"nothing was saved in {output} yet: starting anew", file=sys.stderr)


def _saying_how_to_go_on(run: Callable[..., Any], output: Path) -> Callable[..., Any]:
    """``run``, whose interruption names the way to resume it."""

    def running(*args: Any, **options: Any) -> Any:
        try:
            return run(*args, **options)
        except KeyboardInterrupt as error:
            if (output / STATE).exists():
                error.add_note(f"go on with the same command and --resume, {output} holds the run")
            raise

    return running


def _changes(assignments: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """``--set name=value`` as values of the types that the method declares."""
    out: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in options:
            raise SparseForgeError(f"--set {text}: write NAME=VALUE with one of {', '.join(options) or 'no option'}")
        kinds = [k for k in typing.get_args(options[name]) or (options[name],) if k is not type(None)]
        try:
            if kinds == [bool]:
                out[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif kinds in ([int], [float]):
                out[name] = kinds[0](value)
            elif value not in kinds:
                raise ValueError(value)
            else:
                out[name] = value
        except (ValueError, KeyError) as error:
            single = kinds[0] if len(kinds) == 1 else None
            expected = (
                f"of type {single.__name__}" if isinstance(single, type) else f"one of {', '.join(map(str, kinds))}"
            )
            raise SparseForgeError(f"--set {text}: the value must be {expected}") from error
    return out


class _Tracker:
    """``accelerate``'s trackers, if one is asked for; their files go to ``logs`` in the output folder."""

    def __init__(self, name: str | None, output: Path, run: dict[str, Any]):
        self.folder = output / LOGS
        self.accelerator: Any = None
        if name is None:
            return
        from accelerate.tracking import get_available_trackers

        from sparseforge_fx.training.processes import accelerator

        available = [str(getattr(t, "value", t)) for t in get_available_trackers()]
        if name not in available:
            raise SparseForgeError(
                f"the tracker {name} is not installed; installed are: {', '.join(available) or 'none'}"
            )
        self.accelerator = accelerator(log_with=name, project_dir=str(self.folder))
        self._run = {k: v if isinstance(v, int | float | str) else str(v) for k, v in run.items()}
        self._open = False

    def log(self, row: dict[str, float], step: int) -> None:
        if self.accelerator is not None:
            if not self._open:
                self.accelerator.init_trackers("sparsify", config=self._run)
                self._open = True
            self.accelerator.log(row, step=step)

    def end(self) -> None:
        if self.accelerator is not None and self._open:
            self.accelerator.end_training()
