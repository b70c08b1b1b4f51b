"""One 2:4 model through every format, each in a fresh process; one json.

    python examples/benchmarks/formats.py MODEL [--dtype float32] [--device cuda] [--folder FILES [--prepare]]

MODEL is a folder that sparsify wrote, or a dense one, which is made 2:4 by magnitude here (its text is bad then; bytes
and speed do not depend on it). A process gets no environment, and those of the formats that promise to run without
sparseforge_fx cannot import it. Logits and greedy text are compared with the masked dense model's; the dense format
runs first and last. Formats without a cache generate by computing the whole sequence for each token. Most of the time
goes into compiling: --prepare writes the files alone, and with the same --folder they are measured later, in quiet.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, language_model, save, use
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.export.throughput import random_prompts
from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.models.dense import write_checkpoint
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

HERE = Path(__file__).parent
WITHOUT_US = ("dense", "pt2-portable", "aoti")


def main(
    model: str,
    dtype: str = "bfloat16",
    device: str = "cpu",
    batch: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    prompt: int = 16,
    text_tokens: int = 64,
    tokens: int = 32,
    rounds: int = 3,
    threads: int = 0,
    formats: Annotated[str, typer.Option(help="by commas; default: all")] = "",
    folder: Annotated[Path | None, typer.Option(help="keep the files there, and take those that are there")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="write the files and measure nothing but the gate")
    ] = False,
    label: str = "",
) -> None:
    use(device)
    loaded, tokenizer = (language_model(model), None) if model in SHAPES else sf.load(model, dtype=dtype)
    if not any(check_pattern(m.weight, TWO_FOUR) for m in loaded.modules() if isinstance(m, nn.Linear)):
        sf.sparsify(loaded)
    loaded.to(device)
    vocabulary = loaded.config.get_text_config().vocab_size
    request = {
        "ids": random_prompts(1, prompt, vocabulary),
        "text_tokens": text_tokens,
        "tokens": tokens,
        "rounds": rounds,
        "batch": list(batch),
        "device": device,
        "threads": threads or torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        # what is kept there must not be taken for another model's
        here = Path(place) / f"{Path(model).name}-{dtype}-{device}"
        here.mkdir(parents=True, exist_ok=True)
        table = here / "table.json"
        report = sf.lower(loaded, tokens=batch, table=table if table.exists() else None).report
        cost_table.save_table(cost_table.as_table(cost_table.read_row(row) for row in report["table"]), table)
        writers = _writers(loaded, tokenizer, list(batch), prompt + text_tokens, table)
        chosen = ["dense", *(f for f in formats.split(",") if f and f != "dense")] if formats else list(writers)
        torch.save(request, here / "request.pt")
        written = {kind: here / f"{kind}{'.pt2' if 'pt2' in kind or 'aoti' in kind else ''}" for kind in chosen}
        for kind, path in written.items():
            if not path.exists():
                writers[kind](path)
                print(kind, _sizes(path), flush=True)
        if prepare:
            return
        runs: dict[str, list[dict[str, Any]]] = {}
        for kind in [*chosen, "dense"]:
            runs.setdefault(kind, []).append(_run(kind, written[kind], here))
            print(kind, runs[kind][-1]["tokens_per_second"], flush=True)
        reference = runs["dense"][0].pop("outputs")
        rows = {k: _row(found, reference, _sizes(written[k]), batch) for k, found in runs.items()}
    for row in rows.values():
        row["ratio"] = {b: row["tokens_per_second"][b] / rows["dense"]["tokens_per_second"][b] for b in row["ratio"]}
    record = {
        "model": Path(model).name,
        "dtype": dtype,
        **{k: v for k, v in request.items() if k not in ("ids", "device")},
        "on": device,
        "prompt": prompt,
        "formats": rows,
        "sites": {"dense": report["dense_bytes"], "lowered": report["lowered_bytes"], "packed": len(report["sites"])},
    }
    name = f"{Path(model).name}-{dtype}{'' if device == 'cpu' else f'-{device}'}"
    save("formats", label or name, record)


def _writers(
    model: Any, tokenizer: Any, batch: list[int], length: int, table: Path
) -> dict[str, Callable[[Path], object]]:
    packed = partial(sf.save_packed, model, tokenizer)
    dense = partial(write_checkpoint, model, tokenizer)

    def graph(**options: Any) -> Callable[[Path], object]:
        timed = {} if "portable" in options else {"tokens": batch, "table": table}
        return lambda path: sf.export(model, path, **timed, **options)

    def generator(**options: Any) -> Callable[[Path], object]:
        return lambda path: sf.export_generator(
            model, path, **{"tokens": batch, "max_length": length, "table": table, **options}
        )

    return {
        "dense": dense,
        "packed": packed,
        "packed-transformers": packed,
        "pt2": graph(),
        "pt2-portable": graph(portable=True),
        "aoti": graph(format="aoti"),
        "generator-pt2": generator(),
        "generator-aoti": generator(format="aoti"),
        # the same compiler and cache without sparse kernels: nothing is in the table, so that all stays dense
        "generator-aoti-dense": generator(format="aoti", table={}),
    }


def _run(kind: str, path: Path, folder: Path) -> dict[str, Any]:
    """The worker's json and its outputs."""
    result = folder / "result.json"
    hide = "sys.modules['sparseforge_fx'] = None; " if kind in WITHOUT_US else ""
    start = f"import runpy, sys; {hide}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [HERE / "formats_worker.py", kind, path.absolute(), folder.absolute() / "request.pt", result.absolute()]
    subprocess.run(
        [sys.executable, "-I", "-c", start, *map(str, arguments)],
        env={"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"]},
        check=True,
        cwd="/",
    )
    found = json.loads(result.read_text())
    return {**found, "outputs": torch.load(f"{result}.pt")}


def _row(runs: list[dict[str, Any]], reference: dict[str, Any], size: int, batch: list[int]) -> dict[str, Any]:
    first = runs[0]
    outputs = first.pop("outputs", reference)
    row = {
        "file_bytes": size,
        "load_seconds": first["load_seconds"],
        "peak_bytes": first["peak_bytes_loaded"],
        "peak_bytes_before": first["peak_bytes_before"],
        "peak_gpu_bytes": first.get("peak_gpu_bytes"),
        "cache": first["cache"],
        "same_greedy_text": bool(torch.equal(outputs["text"], reference["text"])),
        "tokens_per_second": {
            str(b): statistics.median(s for run in runs for s in run["tokens_per_second"][str(b)]) for b in batch
        },
        "rounds": {str(b): [s for run in runs for s in run["tokens_per_second"][str(b)]] for b in batch},
        "ratio": {str(b): 1.0 for b in batch},
    }
    if outputs["logits"] is not None:
        error, scale = (outputs["logits"] - reference["logits"]).float().norm(), reference["logits"].float().norm()
        row["logits_relative_error"] = float(error / scale)
    return row


def _sizes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    typer.run(main)
