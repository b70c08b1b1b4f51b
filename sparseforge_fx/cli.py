"""The command line. Commands import torch when they run, so that ``--help`` is quick.

Bad input ends in one sentence on standard error and exit code 2, with nothing written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseforge_fx.errors import SparseForgeError

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
STATE, STATE_OF = "training-state.pt", "training-state.json"  # what a run under way keeps in its output folder
BF16_BYTES = 2

app = typer.Typer(
    name="sparseforge-fx",
    help="Make PyTorch models exactly 2:4 sparse, and keep their accuracy by distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Compile(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a GGUF file.", show_default=False)]
TRAINING_TEXT = (
    "Training text: a hub id owner/name[:config][:split], a text, jsonl or parquet file, or a folder; "
    "'self': drawn from the model."
)
OTHER_FIELD = "Any other field of SparseForgeConfig (repeatable)."
PatternOption = Annotated[str, typer.Option("--pattern", help="Keep at most N of every M weights along the input.")]
Include = Annotated[
    list[str], typer.Option("--include", help="Only weights or modules that match this glob (repeatable).")
]
Exclude = Annotated[list[str], typer.Option("--exclude", help="Keep what matches this glob dense (repeatable).")]


def main() -> None:
    """Entry point of ``sparseforge-fx``."""
    app()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose expected errors become one line on standard error."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (SparseForgeError, OSError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {text}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from error

    return app.command()(guarded)


# -- inspect ---------------------------------------------------------------------------------------------------------
@command
def inspect(
    model: Model,
    pattern: PatternOption = "2:4",
    include: Include = [],  # noqa: B006  (typer wants a list and copies it)
    exclude: Exclude = [],  # noqa: B006
    meta: Annotated[bool, typer.Option("--meta/--weights", help="Look at shapes only, or load the weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print every linear as json.")] = False,
) -> None:
    """Which linears are eligible, which not and why; bytes dense and sparse. Needs no weights."""
    from sparseforge_fx.capture import capture
    from sparseforge_fx.models import load_model, load_skeleton
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.pattern import Pattern
    from sparseforge_fx.report import describe_sites

    shape = Pattern.parse(pattern)
    _quiet()
    loaded = load_skeleton(model) if meta else load_model(model)[0]
    program = capture(loaded)
    sites = find_linears(program, shape, include, exclude)
    found = describe_sites(sites)
    parameters = sum(p.numel() for p in loaded.parameters())  # a tied one comes once
    in_sites = found["site_parameters"]
    factor = shape.density + 1 / 16  # the survivors, and one bit per weight that says where they are
    dense = parameters * BF16_BYTES
    result = {
        "model": model,
        "pattern": str(shape),
        "parameters": parameters,
        "site_parameters": in_sites,
        "bytes_dense_bf16": dense,
        "bytes_sparse_bf16": round(dense - in_sites * BF16_BYTES * (1 - factor)),
        "capture_notes": list(program.notes),
        "sites": found["sites"],
        "skipped": found["skipped"],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console = _console()
    table = Table(title=f"{model}: {len(found['sites'])} eligible linears", title_justify="left")
    for name in ("weights", "count", "out x in", "parameters", "bf16", str(shape)):
        table.add_column(name, justify="left" if name == "weights" else "right", overflow="fold")
    for (name, out, width), group in _grouped(found["sites"], lambda s: (s["out"], s["in"])).items():
        numel = out * width * len(group)
        shown = f"{out} x {width}"
        size = numel * BF16_BYTES
        table.add_row(name, str(len(group)), shown, f"{numel:,}", _bytes(size), _bytes(size * factor))
    console.print(table)
    if found["skipped"]:
        skipped = Table(title=f"{len(found['skipped'])} stay dense", title_justify="left")
        for name in ("weights", "count", "shape", "reason"):
            skipped.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for (name, size, reason), group in _grouped(
            found["skipped"], lambda s: (tuple(s["shape"]), s["reason"])
        ).items():
            skipped.add_row(name, str(len(group)), " x ".join(map(str, size)), reason)
        console.print(skipped)
    for note in program.notes:
        console.print(f"note: {note}", markup=False)
    share = in_sites / max(1, parameters)
    console.print(f"{parameters:,} parameters, {share:.1%} of them in eligible linears", highlight=False)
    console.print(
        f"bf16 {_bytes(dense)} dense, {_bytes(result['bytes_sparse_bf16'])} with the eligible linears {shape} "
        f"(values and one bit per weight: {factor:.4g} of dense)",
        highlight=False,
    )


def _grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows that differ only in the numbers in their names, under the name with the numbers as ``*``."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), *key(row)), []).append(row)
    return {(v[0]["name"], *k[1:]) if len(v) == 1 else k: v for k, v in groups.items()}


# -- sparsify --------------------------------------------------------------------------------------------------------
@command
def sparsify(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, report.json and curves.png.")],
    data: Annotated[str | None, typer.Option(help=TRAINING_TEXT)] = None,
    method: Annotated[str | None, typer.Option(help="sparseforge (default with data), sparsegpt, magnitude.")] = None,
    preset: Annotated[str, typer.Option(help="Of sparseforge: tuned or paper.")] = "tuned",
    tokens: Annotated[str | None, typer.Option(help="Training tokens, e.g. 500k, 20M, 1.5B; default 60 steps.")] = None,
    pattern: PatternOption = "2:4",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    calibration: Annotated[int, typer.Option(min=1, help="Sequences for layer-wise pruning.")] = 64,
    curvature: Annotated[str | None, typer.Option(help="The estimator, e.g. gauss_newton.")] = None,
    change: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=OTHER_FIELD)] = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of data order and sampling.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default the checkpoint's.")] = None,
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
        "method": method,
        "preset": preset,
        "tokens": tokens,
        "pattern": pattern,
        "lr": lr,
        "batch_size": batch_size,
        "length": length,
        "accumulate": accumulate,
        "calibration": calibration,
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

    from sparseforge_fx import models
    from sparseforge_fx.pattern import Pattern
    from sparseforge_fx.report import plot_curves, write_json
    from sparseforge_fx.sparsify import METHODS, PRESETS
    from sparseforge_fx.sparsify import sparsify as run
    from sparseforge_fx.text import open_sources

    # everything that can be known to be wrong before a model is loaded
    models.finish_replacement(output)
    _check_run_folder(output, shape_of_run, resume=resume, overwrite=overwrite)
    if method is not None and method not in METHODS:
        raise SparseForgeError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if preset not in PRESETS:
        raise SparseForgeError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    Pattern.parse(pattern)
    changes = _changes(change) | ({"curvature": curvature} if curvature else {})
    if data is not None and data != "self":
        open_sources(data)
    where = _device(device)

    _quiet()
    loaded, tokenizer = models.load_model(model, dtype)
    loaded.to(where)
    state, started = output / STATE, output / STATE_OF
    if overwrite:
        state.unlink(missing_ok=True)
        started.unlink(missing_ok=True)
    tracker = _Tracker(log_with, output, shape_of_run)

    def on_step(step: int, row: dict[str, float]) -> None:
        if not started.exists():  # from the first step on, and not before, there is something to resume
            write_json(started, shape_of_run)
        tracker.log(row, step)

    result = run(
        loaded,
        data,
        method=method,
        preset=preset,
        pattern=pattern,
        include=include,
        exclude=exclude,
        tokenizer=tokenizer,
        tokens=count,
        batch_size=batch_size,
        length=length,
        accumulate=accumulate,
        lr=lr,
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
    report = {"command": shape_of_run, **result.report}
    with models.new_folder(output, overwrite=True) as folder:
        models.write_checkpoint(result.model.cpu(), tokenizer, folder)
        if report.get("curves"):
            plot_curves(report["curves"], folder / "curves.png")
        write_json(folder / "report.json", report)
        if tracker.folder.exists():
            shutil.copytree(tracker.folder, folder / tracker.folder.name)
    console = _console()
    console.print(_summary(report))
    console.print(
        f"wrote {output}; next: sparseforge-fx evaluate {output} --dense {model}", markup=False, highlight=False
    )
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
    from sparseforge_fx.models import check_output

    if resume and overwrite:
        raise SparseForgeError("--resume goes on with a run and --overwrite forgets it: give one of the two")
    started = output / STATE_OF
    if resume and started.is_file():
        try:
            before = json.loads(started.read_text())
        except ValueError as error:
            raise SparseForgeError(f"{started} cannot be read ({error}): start anew with --overwrite") from error
        different = [k for k in wanted if before.get(k) != wanted[k]]
        if different:
            told = "; ".join(f"{k} was {before.get(k)!r} and is now {wanted[k]!r}" for k in different)
            raise SparseForgeError(
                f"the run in {output} is another one ({told}): repeat its options, or start anew with --overwrite"
            )
        return
    if resume and (output / "config.json").exists():
        raise SparseForgeError(f"the run in {output} is finished: there is nothing to resume")
    if not overwrite and started.is_file():
        raise SparseForgeError(
            f"{output} holds a run that was not finished: give --resume to go on with it or --overwrite to start anew"
        )
    check_output(output, overwrite=overwrite)


def _changes(assignments: list[str]) -> dict[str, Any]:
    """``--set name=value`` as values of the types that SparseForgeConfig declares."""
    from sparseforge_fx.methods.soft_mask import SparseForgeConfig

    hints = typing.get_type_hints(SparseForgeConfig)
    names = {f.name: f for f in dataclasses.fields(SparseForgeConfig) if f.name not in ("steps", "pattern")}
    out: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise SparseForgeError(f"--set {text}: write NAME=VALUE with one of {', '.join(names)}")
        kind = hints[name]
        choices = typing.get_args(kind)
        try:
            if kind is bool:
                out[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif kind in (int, float):
                out[name] = kind(value)
            elif choices and value not in choices:
                raise ValueError(value)
            else:
                out[name] = value
        except (ValueError, KeyError) as error:
            expected = f"one of {', '.join(map(str, choices))}" if choices else f"a {getattr(kind, '__name__', kind)}"
            raise SparseForgeError(f"--set {text}: the value must be {expected}") from error
    return out


class _Tracker:
    """``accelerate``'s trackers, if one is asked for; their files go to ``logs`` in the output folder."""

    def __init__(self, name: str | None, output: Path, run: dict[str, Any]):
        self.folder = output / "logs"
        self.accelerator: Any = None
        if name is None:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        available = [str(getattr(t, "value", t)) for t in get_available_trackers()]
        if name not in available:
            raise SparseForgeError(
                f"the tracker {name} is not installed; installed are: {', '.join(available) or 'none'}"
            )
        self.accelerator = Accelerator(log_with=name, project_dir=str(self.folder))
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


# -- evaluate --------------------------------------------------------------------------------------------------------
@command
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Evaluation text, as for sparsify.")] = WIKITEXT,
    dense: Annotated[str | None, typer.Option(help="Another model, measured beside it on the same tokens.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per window; default 1024, or the model's positions if fewer.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: they do not overlap.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    pattern: PatternOption = "2:4",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default cuda where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers there.")] = None,
) -> None:
    """Perplexity, dense beside sparse, and whether every linear is exactly N:M."""
    from sparseforge_fx.evaluate import compare, perplexity, text_tokens
    from sparseforge_fx.models import load_model
    from sparseforge_fx.pattern import Pattern
    from sparseforge_fx.report import environment, write_json
    from sparseforge_fx.text import open_sources

    shape = Pattern.parse(pattern)
    open_sources(data)
    where = _device(device)
    _quiet()
    measured = {}
    text = None
    linears: list[dict[str, Any]] = []
    for role, name in (("dense", dense), ("model", model)):
        if name is None:
            continue
        loaded, tokenizer = load_model(name, dtype)
        if tokenizer is None:
            raise SparseForgeError(f"{name} has no vocabulary: perplexity needs a language model")
        ids = text_tokens(data, tokenizer)
        if text is not None and not (ids.shape == text.shape and bool((ids == text).all())):
            raise SparseForgeError(
                f"{dense} and {model} cut the text into different tokens: their perplexities cannot be compared"
            )
        text = ids
        positions = getattr(loaded.config, "max_position_embeddings", None) or 1024
        window = context or min(1024, positions)
        measured[role] = perplexity(
            loaded.to(where),
            ids,
            context=window,
            stride=stride,
            max_windows=max_windows,
            batch_size=batch_size,
            progress=True,
        )
        if role == "model":
            linears = _check_linears(loaded.cpu(), shape)
        del loaded
    table = Table(title=f"perplexity of {data}", title_justify="left")
    for column in ("", "perplexity", "nats per token", "tokens scored", "windows", "context", "stride", "seconds"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    names = {"dense": dense, "model": model}
    for role, p in measured.items():
        numbers = (f"{p.tokens_scored:,}", f"{p.windows:,}", f"{p.context:,}", f"{p.stride:,}", f"{p.seconds:.1f}")
        table.add_row(str(names[role]), f"{p.perplexity:.4g}", f"{p.nll_per_token:.4f}", *numbers)
    console = _console()
    console.print(table)
    result: dict[str, Any] = {"model": model, "dense": dense, "data": data, "linears": linears, **environment()}
    result["perplexity"] = {role: dataclasses.asdict(p) for role, p in measured.items()}
    if dense is not None:
        both = compare(measured["dense"], measured["model"])
        result |= {"ratio": both["ratio"], "nll_increase": both["nll_increase"]}
        console.print(f"perplexity x {both['ratio']:.3f} ({both['nll_increase']:+.4f} nats per token)", highlight=False)
    _print_linears(console, linears, shape)
    if json_file is not None:
        write_json(json_file, result)


def _check_linears(model: Any, pattern: Any) -> list[dict[str, Any]]:
    """Every linear of the graph: share of zeros, and whether it keeps the pattern (None where it has none to keep)."""
    from sparseforge_fx.capture import capture
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.pattern import check_pattern, density

    program = capture(model)
    rows = []
    for site in find_linears(program, pattern):
        if not site.uses or len(site.shape) != 2:
            continue
        if site.fqn in program.state:
            weight = program.tensor(site.fqn)
            fits = site.in_features % pattern.m == 0
            exact = check_pattern(weight, pattern, site.reduction_dim) if fits else None
            rows.append({"name": site.fqn, "zeros": 1 - density(weight), "exact": exact, "reason": site.reason})
    return rows


def _print_linears(console: Console, rows: list[dict[str, Any]], pattern: Any) -> None:
    wanted = [r for r in rows if r["reason"] is None]
    exact = [r for r in wanted if r["exact"]]
    console.print(f"{len(exact)} of {len(wanted)} eligible linears are exactly {pattern}", highlight=False)
    others = [r for r in rows if not r["exact"]]
    if not others:
        return
    table = Table(title=f"not {pattern}", title_justify="left")
    for column in ("weights", "count", "zeros", "note"):
        table.add_column(column, justify="right" if column in ("count", "zeros") else "left", overflow="fold")
    for (name, reason), group in _grouped(others, lambda r: (r["reason"],)).items():
        zeros = sum(r["zeros"] for r in group) / len(group)
        table.add_row(name, str(len(group)), f"{zeros:.1%}", reason or "")
    console.print(table)


# -- report ----------------------------------------------------------------------------------------------------------
@command
def report(folder: Annotated[Path, typer.Argument(help="Output folder of sparsify, or a report.json.")]) -> None:
    """The summary of a run."""
    file = folder / "report.json" if folder.is_dir() else folder
    if not file.is_file():
        raise SparseForgeError(f"there is no report.json in {folder}: name the output folder of a finished run")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise SparseForgeError(f"{file} is not json ({error})") from error
    if not isinstance(content, dict) or "method" not in content or "sites" not in content:
        raise SparseForgeError(f"{file} is not a report of sparseforge-fx")
    console = _console()
    console.print(_summary(content))
    for (name, reason), group in _grouped(content["skipped"], lambda s: (s["reason"],)).items():
        console.print(f"stays dense: {name} ({len(group)}): {reason}", markup=False, highlight=False)


def _summary(report: dict[str, Any]) -> Table:
    """A report as a table of two columns."""
    densities = list(report.get("density", {}).values())
    curves = report.get("curves") or []
    rows: dict[str, Any] = {
        "model": report.get("command", {}).get("model"),
        "method": " ".join(filter(None, (report["method"], report.get("preset")))),
        "pattern": report.get("pattern"),
        "sites": f"{len(report['sites'])} linears, {report.get('site_parameters', 0):,} weights",
        "stay dense": len(report["skipped"]),
        "non-zero in sites": f"{min(densities):.2%} to {max(densities):.2%}" if densities else None,
        "training tokens": f"{report['tokens']:,} in {len(curves)} steps" if curves else None,
        "calibration": f"{report['calibration_sequences']} sequences" if report.get("calibration_sequences") else None,
        "loss": f"{curves[0]['loss']:.3f} -> {curves[-1]['loss']:.3f}" if curves else None,
        "KL to dense": f"{curves[0]['kl']:.3f} -> {curves[-1]['kl']:.3f}" if curves else None,
        "learning rate": f"{report['lr']:g}" if "lr" in report else None,
        "seed": report.get("seed"),
        "seconds": f"{report['seconds']:.1f}" if "seconds" in report else None,
        "peak memory": _bytes(report["peak_memory_bytes"]) if "peak_memory_bytes" in report else None,
        "device": report.get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items()),
        "commit": report.get("commit"),
        "notes": "; ".join(report.get("capture_notes", [])) or None,
    }
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None and value != "":
            table.add_row(name, str(value))
    return table


# -- shared ----------------------------------------------------------------------------------------------------------
def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SparseForgeError(f"the device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _quiet() -> None:
    """Loading bars, advice and warnings of the libraries below would drown the one line that matters."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


def _console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


if __name__ == "__main__":
    main()
