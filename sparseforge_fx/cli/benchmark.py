"""``sparseforge-fx benchmark``: what packing gains a 2:4 language model on this machine, in tokens per second."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparseforge_fx.cli.app import (
    AsJson,
    Model,
    Tokens,
    command,
    examples,
    pick_device,
    print_json,
    readable_bytes,
    stdout,
)
from sparseforge_fx.cli.beside import Beside

if TYPE_CHECKING:
    from sparseforge_fx.deploy.lowering.report import PackingReport


OUTPUT = "Write the result there (json); default: benchmark.json of MODEL, if that is the folder of a run."


@command
@examples(
    "benchmark out",
    "benchmark out --batch 1 --batch 16 --new-tokens 64 -o speed.json",
)
def benchmark(
    model: Model,
    batch: Annotated[list[int], typer.Option(help="Sequences that are generated together (repeatable).")] = [1, 8],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated.")] = 32,
    tokens: Tokens = None,
    rounds: Annotated[int, typer.Option(help="Dense and packed take turns so often.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT)] = None,
    as_json: AsJson = False,
) -> None:
    """Generate with MODEL dense and packed in turn."""
    from sparseforge_fx.deploy.export.throughput import compare, random_prompts, with_transformers
    from sparseforge_fx.deploy.lowering.modules import lower_modules
    from sparseforge_fx.errors import SparseForgeError
    from sparseforge_fx.models.dense import load_dense
    from sparseforge_fx.report import environment, write_json

    if min(*batch, prompt, new_tokens, rounds) < 1:
        raise SparseForgeError("batch, prompt, new-tokens and rounds are at least 1")
    kept = Beside.of(model, "benchmark.json", output)
    dense: Any = load_dense(model, dtype=dtype)[0].to(pick_device(device)).eval()
    if not getattr(dense, "can_generate", lambda: False)():
        raise SparseForgeError(f"{model} is no language model that generates text")
    packed = copy.deepcopy(dense)
    report = lower_modules(packed, tokens=tokens or None)
    contenders = {"dense": with_transformers(dense), "packed": with_transformers(packed)}
    table = Table(title=f"{len(report['sites'])} of {_count(report)} 2:4 linears packed", title_justify="left")
    for name in ("batch", "model", "tokens/s", "quartiles", "over dense", "same text"):
        table.add_column(name, justify="right")
    results = {}
    for rows in batch:
        ids = random_prompts(rows, prompt, dense.config.get_text_config().vocab_size, dense.device)
        results[str(rows)] = compare(contenders, ids, new_tokens, rounds)
        for name, found in results[str(rows)].items():
            low, high = found["quartiles"]
            same = "yes" if found["same_greedy_text"] else "no"
            speed = f"{found['tokens_per_second']:.1f}"
            table.add_row(str(rows), name, speed, f"{low:.1f} to {high:.1f}", f"{found['ratio']:.2f}x", same)
    console = stdout(quiet=as_json)
    content = {"model": model, "dtype": dtype, "batches": results, "gate": report["table"], **environment()}

    def tell() -> None:
        if as_json:
            print_json(content)
        console.print(table)
        before, after = readable_bytes(report["dense_bytes"]), readable_bytes(report["lowered_bytes"])
        console.print(f"2:4 linears: {before} dense, {after} lowered", highlight=False)

    kept.write(lambda file: write_json(file, content), tell, console)


def _count(report: PackingReport) -> int:
    return len(report["sites"]) + sum(s["reason"].startswith("gate") for s in report["skipped"])
