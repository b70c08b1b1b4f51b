"""One 2:4 model through every format, each in a fresh process; one json.

    python examples/benchmarks/formats.py MODEL [--dtype float32]

MODEL is a folder that sparsify wrote, or a dense one, which is made 2:4 by magnitude here (its text is bad then; bytes
and speed do not depend on it). A process gets no environment, and those of the formats that promise to run without
sparseforge_fx cannot import it. Logits and greedy text are compared with the masked dense model's; the dense format
runs first and last. Formats without a cache generate by computing the whole sequence for each token.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sparseforge_fx as sf
from sparseforge_fx.deploy.throughput import random_prompts
from sparseforge_fx.report import environment, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "formats"
WITHOUT_US = ("dense", "pt2-portable", "aoti")


def main(
    model: str,
    dtype: str = "bfloat16",
    batch: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    prompt: int = 16,
    text_tokens: int = 64,
    tokens: int = 32,
    rounds: int = 3,
    threads: int = 0,
    formats: Annotated[str, typer.Option(help="by commas; default: all")] = "",
    label: str = "",
) -> None:
    loaded, tokenizer = sf.load_model(model, dtype=dtype)
    try:
        report = sf.lower(loaded, batch=batch).report
    except sf.SparseForgeError:
        sf.sparsify(loaded)
        report = sf.lower(loaded, batch=batch).report
    vocabulary = loaded.config.get_text_config().vocab_size
    request = {
        "ids": random_prompts(1, prompt, vocabulary),
        "text_tokens": text_tokens,
        "tokens": tokens,
        "rounds": rounds,
        "batch": list(batch),
        "threads": threads or torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        writers = _writers(loaded, tokenizer, Path(folder), list(batch), prompt + text_tokens)
        chosen = [f for f in formats.split(",") if f] or list(writers)
        torch.save(request, f"{folder}/request.pt")
        runs: dict[str, list[dict[str, Any]]] = {}
        written = {}
        for kind in ["dense", *(k for k in chosen if k != "dense"), "dense"]:
            path = Path(folder) / kind
            if kind not in written:
                path = written[kind] = writers[kind](path)
            runs.setdefault(kind, []).append(_run(kind, written[kind], folder))
            print(kind, _sizes(written[kind]), runs[kind][-1]["tokens_per_second"], flush=True)
        reference = runs["dense"][0].pop("outputs")
        rows = {k: _row(found, reference, _sizes(written[k]), batch) for k, found in runs.items()}
    for row in rows.values():
        row["ratio"] = {b: row["tokens_per_second"][b] / rows["dense"]["tokens_per_second"][b] for b in row["ratio"]}
    record = {
        "model": Path(model).name,
        "dtype": dtype,
        **{k: v for k, v in request.items() if k != "ids"},
        "prompt": prompt,
        "formats": rows,
        "sites": {"dense": report["dense_bytes"], "lowered": report["lowered_bytes"], "packed": len(report["sites"])},
        **environment(),
    }
    write_json(RESULTS / f"{label or f'{Path(model).name}-{dtype}'}.json", record)


def _writers(model: Any, tokenizer: Any, folder: Path, batch: list[int], length: int) -> dict[str, Callable]:
    def packed(path: Path) -> Path:
        sf.save_packed(model, tokenizer, path)
        return path

    def dense(path: Path) -> Path:
        sf.save_model(model, tokenizer, path)
        return path

    def graph(**options: Any) -> Callable[[Path], Path]:
        def write(path: Path) -> Path:
            sf.export(model, path.with_suffix(".pt2"), batch=batch, **options)
            return path.with_suffix(".pt2")

        return write

    def generator(**options: Any) -> Callable[[Path], Path]:
        def write(path: Path) -> Path:
            sf.export_generator(model, path.with_suffix(".pt2"), batch=batch, max_length=length, **options)
            return path.with_suffix(".pt2")

        return write

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


def _run(kind: str, path: Path, folder: str) -> dict[str, Any]:
    """The worker's json and its outputs."""
    result = Path(folder) / "result.json"
    hide = "sys.modules['sparseforge_fx'] = None; " if kind in WITHOUT_US else ""
    start = f"import runpy, sys; {hide}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [HERE / "formats_worker.py", kind, path, f"{folder}/request.pt", result]
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
