"""``sparseforge-fx evaluate``: perplexity, dense beside sparse."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseforge_fx.cli.app import (
    DtypeOption,
    Model,
    PatternOption,
    command,
    grouped,
    pick_device,
    stdout,
)
from sparseforge_fx.cli.on_disk import DISK, check_unused
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.evaluation.perplexity import Perplexity

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
WINDOWS = (
    "Tokens per window (default 1024, or the model's positions if fewer), and between the starts of those that overlap."
)
DEVICE = (
    "cpu, cuda, ...; default cuda where there is one. disk: weights stay there, those of one block at a time in "
    "memory, read once for each batch of windows."
)
ZERO_SHOT = "Tasks of lm-eval, by commas; all: the seven of AST. LIMIT: documents of each, a fixed random subset."


@command
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Evaluation text, as for sparsify.")] = WIKITEXT,
    text_column: Annotated[str | None, typer.Option(help="Column of the text; default: found.")] = None,
    dense: Annotated[str | None, typer.Option(help="Another model, measured beside it on the same tokens.")] = None,
    context: Annotated[str, typer.Option(metavar="CONTEXT[:STRIDE]", help=WINDOWS)] = "",
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    tasks: Annotated[str, typer.Option(metavar="TASKS[:LIMIT]", help=ZERO_SHOT)] = "",
    pattern: PatternOption = "2:4",
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers there.")] = None,
) -> None:
    """Perplexity, dense beside sparse, and whether every linear is exactly N:M."""
    from sparseforge_fx.data.sources import open_sources
    from sparseforge_fx.evaluation.perplexity import perplexity
    from sparseforge_fx.evaluation.zero_shot import check_tasks, zero_shot
    from sparseforge_fx.models.compute_dtype import cast, choose_dtype, dtype_of
    from sparseforge_fx.models.dense import find_dtype
    from sparseforge_fx.models.streamed_forward import StreamedForward
    from sparseforge_fx.pattern import parse_pattern
    from sparseforge_fx.report import environment, write_json

    shape, (window, stride), (wanted, limit) = parse_pattern(pattern), _read_windows(context), _read_tasks(tasks)
    open_sources(data)
    if on_disk := device == DISK:
        check_unused(tasks=tasks)
        device = "cpu"
    where, forced = pick_device(device), find_dtype(dtype)
    check_tasks(wanted)
    computing = text = None
    measured, accuracy = {}, {}
    linears: list[dict[str, Any]] = []
    names = {"dense": dense, "model": model}
    for role, name in names.items():
        if name is None:
            continue
        loaded, tokenizer, weights = _load_on_disk(name) if on_disk else (*_load(name), None)
        computing = computing or choose_dtype(dtype_of(loaded), where, forced)
        cast(loaded, computing.dtype)  # one for both
        text = _tokens(data, text_column, tokenizer, text, dense, model)
        positions = getattr(loaded.config, "max_position_embeddings", None) or 1024
        measured[role] = perplexity(
            loaded.to(where) if weights is None else StreamedForward(weights), text,
            context=window or min(1024, positions), stride=stride, max_windows=max_windows,
            batch_size=batch_size, progress=True,
        )  # fmt: skip
        if wanted:
            accuracy[role] = zero_shot(loaded, tokenizer, wanted, limit=limit)
        if role == "model":
            linears = _check_linears(loaded.cpu() if weights is None else loaded, shape, weights)
        del loaded
    assert computing is not None
    console = stdout()
    console.print(_perplexity_table(f"perplexity of {data}", measured, names))
    for note in computing.notes() or [f"computed in {str(computing.dtype).removeprefix('torch.')}"]:
        console.print(note, markup=False, highlight=False)
    result: dict[str, Any] = {"model": model, "dense": dense, "data": data, "linears": linears, **environment()}
    result |= {"compute_dtype": computing.describe(), **_compare(console, measured)}
    if accuracy:
        console.print(_accuracy_table(accuracy, names))
        result["zero_shot"] = accuracy
    _print_linears(console, linears, shape)
    if json_file is not None:
        write_json(json_file, result)


def _read_windows(text: str) -> tuple[int | None, int | None]:
    """``1024:512`` -> context and stride, None for what is not there."""
    match = re.fullmatch(r"([1-9]\d*)?(?::([1-9]\d*))?", text)
    if match is None:
        raise SparseForgeError(f"--context {text} is not CONTEXT or CONTEXT:STRIDE: write 1024 or 1024:512, say")
    return (int(match[1]) if match[1] else None), (int(match[2]) if match[2] else None)


def _read_tasks(text: str) -> tuple[tuple[str, ...], int | None]:
    """``boolq,rte:200`` -> names of tasks, and how many documents of each (None: all)."""
    from sparseforge_fx.evaluation.zero_shot import TASKS

    names, colon, limit = text.partition(":")
    if colon and not (limit.isdecimal() and int(limit)):
        raise SparseForgeError(f"--tasks {text} has no number of documents behind its colon: write all:200, say")
    wanted = tuple(TASKS) if names == "all" else tuple(t.strip() for t in names.split(",") if t.strip())
    return wanted, int(limit) if colon else None


def _load(name: str) -> tuple[Any, Any]:
    """A language model with dense weights, those of a packed one unpacked: the same numbers, whatever the kernels."""
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.models.dense import is_packed

    loaded: Any
    loaded, tokenizer = load(name)
    if tokenizer is None:
        raise SparseForgeError(f"{name} has no vocabulary: perplexity needs a language model")
    return (loaded.dequantize() if is_packed(loaded.config) else loaded), tokenizer


def _load_on_disk(name: str) -> tuple[Any, Any, Any]:
    """The model without weights, its tokenizer, and where its weights are."""
    from sparseforge_fx.models.streamed import StreamedModel

    found = StreamedModel(name)
    if found.tokenizer is None:
        raise SparseForgeError(f"{name} has no vocabulary: perplexity needs a language model")
    return found.skeleton, found.tokenizer, found


def _tokens(data: str, column: str | None, tokenizer: Any, before: Any, dense: str | None, model: str) -> Any:
    """The text as this model reads it, and as the one measured ``before`` it did."""
    from sparseforge_fx.evaluation.perplexity import text_tokens

    ids = text_tokens(data, tokenizer, text_column=column)
    if before is not None and not (ids.shape == before.shape and bool((ids == before).all())):
        raise SparseForgeError(
            f"{dense} and {model} cut the text into different tokens: their perplexities cannot be compared"
        )
    return ids


def _perplexity_table(title: str, measured: dict[str, Perplexity], names: dict[str, str | None]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "perplexity", "nats per token", "tokens scored", "windows", "context", "stride", "seconds"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for role, p in measured.items():
        numbers = (f"{p.tokens_scored:,}", f"{p.windows:,}", f"{p.context:,}", f"{p.stride:,}", f"{p.seconds:.1f}")
        table.add_row(str(names[role]), f"{p.perplexity:.4g}", f"{p.nll_per_token:.4f}", *numbers)
    return table


def _compare(console: Console, measured: dict[str, Perplexity]) -> dict[str, Any]:
    """What was measured, for json; with both models, their ratio, which is printed, too."""
    from sparseforge_fx.evaluation.perplexity import compare

    result: dict[str, Any] = {"perplexity": {role: dataclasses.asdict(p) for role, p in measured.items()}}
    if "dense" in measured:
        both = compare(measured["dense"], measured["model"])
        result |= {"ratio": both["ratio"], "nll_increase": both["nll_increase"]}
        console.print(f"perplexity x {both['ratio']:.3f} ({both['nll_increase']:+.4f} nats per token)", highlight=False)
    return result


def _accuracy_table(accuracy: dict[str, dict[str, dict[str, float]]], names: dict[str, str | None]) -> Table:
    """Tasks by models, with standard errors; length-normalised where the task has that."""
    table = Table(title="zero-shot accuracy", title_justify="left")
    table.add_column("task")
    for role in accuracy:
        table.add_column(str(names[role]), justify="right", overflow="fold")
    table.add_column("documents", justify="right")
    first = next(iter(accuracy.values()))
    for task in first:
        cells = []
        for found in accuracy.values():
            kind = "acc_norm" if "acc_norm" in found[task] else "acc"
            cells.append(f"{found[task][kind]:.1%} ± {found[task][kind + '_stderr']:.1%}")
        table.add_row(task, *cells, f"{first[task]['documents']:,}")
    return table


def _check_linears(model: Any, pattern: Any, weights: Any) -> list[dict[str, Any]]:
    """Every linear of the graph: share of zeros, and whether it keeps the pattern (None where it has none to keep).

    weights: where they are, if not in the model.
    """
    from sparseforge_fx.graph.capture import capture
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.pattern import check_pattern, density

    program = capture(model)
    rows = []
    for site in find_linears(program, pattern):
        if not site.uses:
            continue
        if site.fqn in program.state:
            weight = program.tensor(site.fqn) if weights is None else weights.fetch(site.fqn)
            fits = pattern.fits(site.in_features)
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
    for (name, reason), group in grouped(others, lambda r: (r["reason"],)).items():
        zeros = sum(r["zeros"] for r in group) / len(group)
        table.add_row(name, str(len(group)), f"{zeros:.1%}", reason or "")
    console.print(table)
