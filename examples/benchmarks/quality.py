"""Perplexity after sparsification at an equal number of training tokens: one run, one json, resumable after a kill.

    python examples/benchmarks/quality.py MODEL --data c4.jsonl --data reviews.jsonl.xz --data books.jsonl.xz \\
        --valid valid.txt --test test.txt --preset tuned --tokens 122880 --seed 0

The sources are mixed evenly by documents (books cut into pieces of 3,000 characters). Perplexity is that of the first
``--windows`` windows of 1,024 tokens. Choose by the validation text, quote the test text.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparseforge_fx as sf
from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.evaluation.zero_shot import zero_shot
from sparseforge_fx.methods.catalog import TRAINED
from sparseforge_fx.report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "quality"


def main(
    model: str,
    data: Annotated[list[str], typer.Option(help="text source; give several to mix them evenly by documents")],
    valid: Annotated[Path, typer.Option(help="validation text, for choosing", exists=True)],
    test: Annotated[Path, typer.Option(help="test text, for quoting", exists=True)],
    method: str = "sparseforge",
    preset: str = "tuned",
    tokens: int = 122_880,
    seed: int = 0,
    lr: float = 5e-4,
    batch_size: int = 2,
    length: int = 512,
    calibration: int = 128,
    windows: int = 16,
    w_task: float = 1.0,
    w_kl: float = 1.0,
    threads: int = 0,
    label: str = "",
    folder: Annotated[Path, typer.Option(help="where the json goes")] = RESULTS,
    tasks: Annotated[int, typer.Option(help="documents of each zero-shot task; 0: no tasks")] = 0,
    quantize: Annotated[str, typer.Option(help="bits by commas: score the sparse model so quantised, too")] = "",
    compile: str = "auto",
    options: Annotated[str, typer.Option(help="json of further fields of the method's config")] = "{}",
    dense_from: Annotated[
        Path | None, typer.Option(help="record of a run, for the dense model's perplexity", exists=True)
    ] = None,
) -> None:
    """Run one (method, preset, seed, budget), or "dense", and write results/quality/NAME.json."""
    if threads:
        torch.set_num_threads(threads)
    try:
        settings = json.loads(options)
    except json.JSONDecodeError as error:
        sys.exit(f"--options is not json ({error}): give fields of the method's config as '{{\"name\": value}}'")
    kind = preset if method == "sparseforge" else "paper" if method in TRAINED else "oneshot"
    name = label or f"{method}-{kind}-{tokens}-seed{seed}"
    out = folder / f"{name}.json"
    if out.exists():
        print(f"{out} is there already")
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    texts = {"valid": valid, "test": test}
    ids = {k: tokenizer(p.read_text(), return_tensors="pt", verbose=False).input_ids[0] for k, p in texts.items()}

    def score(which: str) -> float:
        return perplexity(net, ids[which], context=1024, max_windows=windows).perplexity

    if dense_from is not None and (known := json.loads(dense_from.read_text()))["windows"] == windows:
        dense = known["dense_perplexity"]
    else:
        dense = {which: score(which) for which in texts}
    corpus = tokenize(list(data), tokenizer, length=length, seed=seed, limit_tokens=tokens, separator="\n\n")

    def on_step(step: int, row: dict) -> None:
        print(
            json.dumps({k: row[k] for k in ("step", "loss", "task", "kl", "seconds", "flip_rate")}),
            flush=True,
        )

    if method in TRAINED:
        settings |= {
            "preset": preset if method == "sparseforge" else None,
            "tokens": tokens,
            "w_task": w_task,
            "w_kl": w_kl,
            "lr": lr,
        }
        settings["resume_from"] = folder / f"{name}.state"
    how: bool | str = {"on": True, "off": False}.get(compile, compile)
    if method == "dense":
        report = {"sites": [], **environment()}
        sparse = dense
    else:
        report = sf.sparsify(
            net, corpus if method != "magnitude" else None, method=method, batch_size=batch_size, length=length, calibration=calibration,
            seed=seed, compile=how, show_progress=False, on_step=on_step, **settings,
        ).report  # fmt: skip
        report.pop("density")
        sparse = {which: score(which) for which in texts}
    accuracy = zero_shot(net, tokenizer, limit=tasks) if tasks else None
    quantized = {}
    for bits in filter(None, quantize.split(",")):
        whole, net = net, copy.deepcopy(net)  # score() reads net
        sf.quantize(net, int(bits))
        quantized[bits] = {which: score(which) for which in texts}
        net = whole
    record = {
        "label": name,
        "model": Path(model).name,
        "method": method,
        "tokens": report.get("tokens", 0),
        "data": [Path(d).name for d in data],
        "windows": windows,
        "context": 1024,
        "dense_perplexity": dense,
        "sparse_perplexity": sparse,
        "zero_shot": accuracy,
        "quantized_perplexity": quantized,
        "report": {k: v for k, v in report.items() if k not in ("sites", "skipped", "passes")}
        | {"sites": len(report["sites"])},
    }
    write_json(out, record)
    (folder / f"{name}.state").unlink(missing_ok=True)
    print(f"{name}: dense {dense}, sparse {sparse}")


if __name__ == "__main__":
    typer.run(main)
