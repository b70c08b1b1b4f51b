"""``sparseforge-fx evaluate``: perplexity, dense beside sparse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

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
from sparseforge_fx.errors import SparseForgeError

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


@command
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Evaluation text, as for sparsify.")] = WIKITEXT,
    text_column: Annotated[str | None, typer.Option(help="Column of the text; default: found.")] = None,
    dense: Annotated[str | None, typer.Option(help="Another model, measured beside it on the same tokens.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per window; default 1024, or the model's positions if fewer.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: they do not overlap.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    tasks: Annotated[str, typer.Option(help="Zero-shot tasks of lm-eval, by commas; 'all': the seven of AST.")] = "",
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents per task: a fixed random subset.")] = None,
    pattern: PatternOption = "2:4",
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default cuda where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers there.")] = None,
) -> None:
    """Perplexity, dense beside sparse, and whether every linear is exactly N:M."""
    from sparseforge_fx.data.text import open_sources
    from sparseforge_fx.evaluation.perplexity import compare, perplexity, text_tokens
    from sparseforge_fx.evaluation.zero_shot import TASKS, check_tasks, zero_shot
    from sparseforge_fx.models.compute_dtype import cast, choose_dtype, dtype_of
    from sparseforge_fx.models.dense import find_dtype, load_model
    from sparseforge_fx.pattern import parse_pattern
    from sparseforge_fx.report import environment, write_json

    shape = parse_pattern(pattern)
    open_sources(data)
    where = pick_device(device)
    forced = find_dtype(dtype)
    computing = None
    measured = {}
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    wanted = tuple(TASKS) if tasks == "all" else tuple(t.strip() for t in tasks.split(",") if t.strip())
    check_tasks(wanted)
    text = None
    linears: list[dict[str, Any]] = []
    for role, name in (("dense", dense), ("model", model)):
        if name is None:
            continue
        loaded, tokenizer = load_model(name)
        computing = computing or choose_dtype(dtype_of(loaded), where, forced)
        cast(loaded, computing.dtype)  # one for both
        if tokenizer is None:
            raise SparseForgeError(f"{name} has no vocabulary: perplexity needs a language model")
        ids = text_tokens(data, tokenizer, text_column=text_column)
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
        if wanted:
            accuracy[role] = zero_shot(loaded, tokenizer, wanted, limit=task_limit)
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
    assert computing is not None
    console = stdout()
    console.print(table)
    for note in computing.notes() or [f"computed in {str(computing.dtype).removeprefix('torch.')}"]:
        console.print(note, markup=False, highlight=False)
    result: dict[str, Any] = {"model": model, "dense": dense, "data": data, "linears": linears, **environment()}
    result["compute_dtype"] = computing.describe()
    result["perplexity"] = {role: dataclasses.asdict(p) for role, p in measured.items()}
    if dense is not None:
        both = compare(measured["dense"], measured["model"])
        result |= {"ratio": both["ratio"], "nll_increase": both["nll_increase"]}
        console.print(f"perplexity x {both['ratio']:.3f} ({both['nll_increase']:+.4f} nats per token)", highlight=False)
    if accuracy:
        console.print(_accuracy_table(accuracy, names))
        result["zero_shot"] = accuracy
    _print_linears(console, linears, shape)
    if json_file is not None:
        write_json(json_file, result)


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


def _check_linears(model: Any, pattern: Any) -> list[dict[str, Any]]:
    """Every linear of the graph: share of zeros, and whether it keeps the pattern (None where it has none to keep)."""
    from sparseforge_fx.graph.capture import capture
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.pattern import check_pattern, density

    program = capture(model)
    rows = []
    for site in find_linears(program, pattern):
        if not site.uses or len(site.shape) != 2:
            continue
        if site.fqn in program.state:
            weight = program.tensor(site.fqn)
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
