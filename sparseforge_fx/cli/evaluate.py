"""``sparseforge-fx evaluate``: perplexity, dense beside sparse."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseforge_fx.cli.app import (
    AsJson,
    DtypeOption,
    Model,
    PatternOption,
    command,
    examples,
    grouped,
    pick_device,
    print_json,
    stdout,
)
from sparseforge_fx.cli.beside import Beside
from sparseforge_fx.cli.generate import check_prompts, go_on
from sparseforge_fx.cli.on_disk import on_disk, windows_at_once
from sparseforge_fx.errors import SparseForgeError, add_sentence
from sparseforge_fx.page.texts import paired_text, with_error

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
BATCH = "Windows per forward pass; default 1, with --device disk what half of the free memory takes."
TASK_DATA = "The documents of a task, as json, jsonl, parquet, csv or arrow: any task without a network (repeatable)."
OUTPUT = "Write all numbers there (json); default: evaluation.json of MODEL, if that is the folder of a run."
PROMPT_TOKENS = 48  # that a prompt is continued by
ZERO_SHOT = "Tasks of lm-eval, by commas; all: the seven of AST. LIMIT: documents of each, a fixed random subset."


@command
@examples(
    "evaluate out --dense ./model",
    'evaluate out --dense ./model --data test.txt --prompt "The sky is"',
    "evaluate out --dense ./model --tasks all:200",
    "evaluate out --tasks piqa --task-data piqa=piqa.jsonl --json",
)
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Evaluation text, as for sparsify.")] = WIKITEXT,
    text_column: Annotated[str | None, typer.Option(help="Column of the text; default: found.")] = None,
    dense: Annotated[str | None, typer.Option(help="Another model, measured beside it on the same tokens.")] = None,
    context: Annotated[str, typer.Option(metavar="CONTEXT[:STRIDE]", help=WINDOWS)] = "",
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help=BATCH)] = None,
    tasks: Annotated[str, typer.Option(metavar="TASKS[:LIMIT]", help=ZERO_SHOT)] = "",
    pattern: PatternOption = "2:4",
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    task_data: Annotated[list[str], typer.Option(metavar="TASK=FILE", help=TASK_DATA)] = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Also go on with this text (repeatable).")] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT)] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity and tasks, dense beside sparse, with standard errors; whether every linear is exactly N:M.

    Of a folder that sparsify wrote, the numbers go into its report.html, too.
    """
    from sparseforge_fx.data.sources import unused_text
    from sparseforge_fx.evaluation.perplexity import perplexity
    from sparseforge_fx.evaluation.zero_shot import answers, check_tasks
    from sparseforge_fx.models.compute_dtype import cast, choose_dtype, dtype_of
    from sparseforge_fx.models.dense import find_dtype
    from sparseforge_fx.models.streamed_forward import StreamedForward
    from sparseforge_fx.pattern import parse_pattern
    from sparseforge_fx.report import environment, write_json

    check_prompts(prompt)
    files = _read_files(task_data)
    kept = Beside.of(model, "evaluation.json", output)
    shape, (window, stride), (wanted, limit) = parse_pattern(pattern), _read_windows(context), _read_tasks(tasks)
    notes = unused_text(data, text_column)
    stays = on_disk(device, tasks=tasks, prompt=prompt)
    where, forced = pick_device("cpu" if stays else device), find_dtype(dtype)
    check_tasks(wanted, files)
    computing = text = None
    measured, accuracy, correct, texts = {}, {}, {}, {}
    linears: list[dict[str, Any]] = []
    names = {"dense": dense, "model": model}
    for role, name in names.items():
        if name is None:
            continue
        loaded, tokenizer, weights = _load_on_disk(name) if stays else (*_load(name), None)
        computing = computing or choose_dtype(dtype_of(loaded), where, forced)
        cast(loaded, computing.dtype)  # one for both
        text = _tokens(data, text_column, tokenizer, text, dense, model, notes)
        width = window or min(1024, getattr(loaded.config, "max_position_embeddings", None) or 1024)
        batch = batch_size or (windows_at_once(loaded.config, computing.dtype, width) if stays else 1)
        measured[role] = perplexity(
            loaded.to(where) if weights is None else StreamedForward(weights), text,
            context=width, stride=stride, max_windows=max_windows, batch_size=batch, progress=True,
        )  # fmt: skip
        if wanted:
            accuracy[role], correct[role] = answers(loaded, tokenizer, wanted, limit=limit, files=files)
        texts[role] = [_continued(loaded, tokenizer, p) for p in prompt]
        if role == "model":
            linears = _check_linears(loaded.cpu() if weights is None else loaded, shape, weights)
        del loaded
    assert computing is not None
    result: dict[str, Any] = {"model": model, "dense": dense, "data": data, "linears": linears, **environment()}
    result |= {"notes": notes, "compute_dtype": computing.describe(), **_compare(measured)}
    answered = [{"prompt": p, **{r: t[i] for r, t in texts.items()}} for i, p in enumerate(prompt)]
    asked: dict[str, Any] = {"zero_shot": accuracy, "paired_tasks": _paired_tasks(correct), "texts": answered}
    result |= {name: found for name, found in asked.items() if found}
    computed = computing.notes() or [f"computed in {str(computing.dtype).removeprefix('torch.')}"]
    console = stdout(quiet=as_json)

    def tell() -> None:
        console.print(_perplexity_table(f"perplexity of {data}", measured, names))
        for line in [*notes, *computed, *_ratio(result)]:
            console.print(line, highlight=False)
        if accuracy:
            console.print(_accuracy_table(accuracy, names, asked["paired_tasks"]))
        _print_texts(console, answered, names)
        _print_linears(console, linears, shape)

    kept.write(lambda file: write_json(file, result), partial(print_json, result) if as_json else tell, console)


def _print_texts(console: Any, texts: list[dict[str, str]], names: dict[str, str | None]) -> None:
    for one in texts:
        for role, text in list(one.items())[1:]:
            console.print(f"{names[role]}: {one['prompt']}{text}", highlight=False)


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
    if colon and not names.strip():
        raise SparseForgeError(f"--tasks {text} names no task before its colon: write all:200, say")
    wanted = tuple(TASKS) if names == "all" else tuple(t.strip() for t in names.split(",") if t.strip())
    return wanted, int(limit) if colon else None


def _read_files(given: list[str]) -> dict[str, str]:
    """``--task-data rte=rte.jsonl`` -> files by task."""
    pairs = [text.partition("=") for text in given]
    for text, (name, _, file) in zip(given, pairs, strict=True):
        if not name or not file:
            raise SparseForgeError(f"--task-data {text} is not TASK=FILE: write piqa=validation.jsonl, say")
    return {name: file for name, _, file in pairs}


def _load(name: str) -> tuple[Any, Any]:
    """A language model with dense weights, those of a packed one unpacked: the same numbers, whatever the kernels."""
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.models.dense import is_packed

    loaded: Any
    loaded, tokenizer = load(name)
    if tokenizer is None:
        raise SparseForgeError(f"{name} has no tokenizer: copy the files of one into the folder of a language model")
    return (loaded.dequantize() if is_packed(loaded.config) else loaded), tokenizer


def _load_on_disk(name: str) -> tuple[Any, Any, Any]:
    """The model without weights, its tokenizer, and where its weights are."""
    from sparseforge_fx.models.streamed import StreamedModel

    found = StreamedModel(name)
    if found.tokenizer is None:
        raise SparseForgeError(f"{name} has no tokenizer: copy the files of one into the folder of a language model")
    return found.skeleton, found.tokenizer, found


def _tokens(
    data: str, column: str | None, tokenizer: Any, before: Any, dense: str | None, model: str, notes: list[str]
) -> Any:
    """The text as this model reads it, and as the one measured ``before`` it did; ``notes`` take what is not read."""
    from sparseforge_fx.evaluation.perplexity import text_tokens

    try:
        ids = text_tokens(data, tokenizer, text_column=column, told=notes)
    except SparseForgeError as error:
        if data == WIKITEXT:  # which nobody asked for by name
            add_sentence(error, "--data takes a text of yours in its place")
        raise
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
        error = None if p.stderr is None else p.stderr * p.perplexity
        nats = with_error(p.nll_per_token, p.stderr, "{:.4f}")
        table.add_row(str(names[role]), with_error(p.perplexity, error, "{:.4g}"), nats, *numbers)
    return table


def _compare(measured: dict[str, Perplexity]) -> dict[str, Any]:
    """What was measured, for json; with both models, their ratio."""
    from sparseforge_fx.evaluation.perplexity import compare

    result: dict[str, Any] = {"perplexity": {role: dataclasses.asdict(p) for role, p in measured.items()}}
    if "dense" in measured:
        both = compare(measured["dense"], measured["model"])
        result |= {name: both[name] for name in ("ratio", "nll_increase", "paired")}
    return result


def _ratio(both: dict[str, Any]) -> list[str]:
    """A sentence on the ratio of both models, if there are both."""
    if "ratio" not in both:
        return []
    told = f"perplexity x {both['ratio']:.3f} ({both['nll_increase']:+.4f}"
    if test := both["paired"]:
        told += f" ± {test['stderr']:.4f}"
    told += " nats per token"
    return [told + (f"; in pairs over {test['pairs']} windows, p = {test['p']:.2g})" if test else ")")]


def _accuracy_table(
    accuracy: dict[str, dict[str, dict[str, float]]], names: dict[str, str | None], paired: dict[str, dict[str, float]]
) -> Table:
    """Tasks by models, with standard errors; length-normalised where the task has that. Of both, the difference."""
    from sparseforge_fx.evaluation.zero_shot import main_metric

    table = Table(title="zero-shot accuracy", title_justify="left")
    table.add_column("task")
    for role in accuracy:
        table.add_column(str(names[role]), justify="right", overflow="fold")
    table.add_column("documents", justify="right")
    if paired:
        table.add_column("difference", justify="right")
    first = next(iter(accuracy.values()))
    for task in first:
        cells = []
        for found in accuracy.values():
            kind = main_metric(found[task])
            cells.append(with_error(found[task][kind], found[task].get(f"{kind}_stderr"), "{:.1%}"))
        last = [paired_text(paired.get(task))] if paired else []
        table.add_row(task, *cells, f"{first[task]['documents']:,}", *last)
    return table


def _paired_tasks(correct: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By task: the sparse model's accuracy above the dense one's, where both were asked the same."""
    from sparseforge_fx.evaluation import paired

    if "dense" not in correct:
        return {}
    both = {task: (correct["dense"][task], found) for task, found in correct["model"].items()}
    return {task: paired.documents(*pair) for task, pair in both.items() if pair[0] and len(pair[0]) == len(pair[1])}


def _continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model finds likeliest after the prompt."""
    from sparseforge_fx.data.prompts import prompt_batch

    batch = prompt_batch(tokenizer, [prompt]).to(model.device)
    return go_on(model.eval(), tokenizer, batch, max_new_tokens=PROMPT_TOKENS, do_sample=False)[0]


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
