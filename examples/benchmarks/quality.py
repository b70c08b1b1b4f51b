"""Perplexity after sparsification at an equal number of training tokens: one run, one json, resumable after a kill.

    python examples/benchmarks/quality.py MODEL --data c4.jsonl --data reviews.jsonl.xz --data books.jsonl.xz \\
        --valid valid.txt --test test.txt --preset alps+kd --tokens 122880 --seed 0

With ``--rotate 300`` the model is first turned into another basis (``sf.rotate``, so many steps, on 32 sequences of the
same data); MODEL may also be a folder of ``sparseforge-fx rotate``. The record tells of either. With ``--method alps --keep START``
the pruned checkpoint stays, and START with ``--teacher MODEL`` is trained on from there.

The sources are mixed evenly by documents (books cut into pieces of 3,000 characters). Perplexity is that of the first
``--windows`` windows of 1,024 tokens. Choose by the validation text, quote the test text.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import CONTEXT, language_model, token_ids, use, windowed_perplexity
from records import RESULTS
from transformers import AutoTokenizer, PreTrainedModel

import sparseforge_fx as sf
from sparseforge_fx.data.tokens import TokenData, tokenize
from sparseforge_fx.evaluation.zero_shot import zero_shot
from sparseforge_fx.methods.catalog import TRAINED
from sparseforge_fx.report import environment, write_json

Score = Callable[[PreTrainedModel], dict[str, float]]


def main(
    model: str,
    data: Annotated[list[str], typer.Option(help="text source; give several to mix them evenly by documents")],
    valid: Annotated[Path, typer.Option(help="validation text, for choosing", exists=True)],
    test: Annotated[Path, typer.Option(help="test text, for quoting", exists=True)],
    method: str = "sparseforge",
    preset: str = "alps+kd",
    tokens: int = 122_880,
    seed: int = 0,
    lr: float = 5e-4,
    batch_size: int = 2,
    length: int = 512,
    calibration: int = 128,
    windows: int = 16,
    w_task: Annotated[float | None, typer.Option(help="of the cross-entropy; default: the preset's")] = None,
    w_kl: Annotated[float | None, typer.Option(help="of the KL; default: the preset's")] = None,
    temperature: Annotated[float | None, typer.Option(help="of the KL; default: the preset's")] = None,
    features: Annotated[str | None, typer.Option(help="distance of intermediate values (sf.Distillation's)")] = None,
    threads: int = 0,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="of the checkpoint and its scores")] = "bfloat16",
    teacher: Annotated[
        Path | None, typer.Option(help="checkpoint that MODEL was pruned from, and that is distilled from", exists=True)
    ] = None,
    rotate: Annotated[int, typer.Option(help="steps of learning another basis before; 0: none")] = 0,
    keep: Annotated[Path | None, typer.Option(help="folder for the pruned checkpoint")] = None,
    label: str = "",
    folder: Annotated[Path, typer.Option(help="where the json goes")] = RESULTS / "quality",
    tasks: Annotated[int, typer.Option(help="documents of each zero-shot task; 0: no tasks")] = 0,
    quantize: Annotated[str, typer.Option(help="values by commas (int8,int4): score the model so quantised, too")] = "",
    dense_too: Annotated[bool, typer.Option(help="quantise what is not 2:4, too, as a head of its own")] = True,
    compile: str = "auto",
    options: Annotated[str, typer.Option(help="json of further fields of the method's config")] = "{}",
    dense_from: Annotated[
        Path | None, typer.Option(help="record of a run, for the dense model's perplexity", exists=True)
    ] = None,
) -> None:
    """Run one (method, preset, seed, budget), or "dense", and write results/quality/NAME.json."""
    use(device, threads)
    settings = read_options(options) | ({"preset": preset} if method == "sparseforge" else {})
    kind = preset if method == "sparseforge" else "paper" if method in TRAINED else "oneshot"
    name = label or f"{method}-{kind}-{tokens}-seed{seed}"
    out, state = folder / f"{name}.json", folder / f"{name}.state"
    if out.exists():
        return print(f"{out} is there already")
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = language_model(model, getattr(torch, dtype), device)
    original = language_model(str(teacher), getattr(torch, dtype), device) if teacher else None
    ids = {"valid": token_ids(valid, tokenizer), "test": token_ids(test, tokenizer)}
    score = partial(scores, ids, windows)
    dense = known_score(dense_from, windows) or score(original or net)
    corpus = tokenize(list(data), tokenizer, length=length, seed=seed, tokens=tokens, separator="\n\n")
    rotation = rotated(net, corpus, rotate, length, seed) if rotate else rotation_of(Path(model))
    if method in TRAINED:
        settings["objective"] = loss(method, settings, task=w_task, kl=w_kl, temperature=temperature, features=features)
        settings |= {"tokens": tokens, "lr": lr, "state_path": state, "teacher": original}
    report, sparse = {"sites": [], **environment()}, score(net) if method == "dense" and teacher else dense
    if method != "dense":
        result = sf.sparsify(
            net, corpus if method != "magnitude" else None, method=method, batch_size=batch_size, length=length, calibration=calibration,
            seed=seed, compile={"on": True, "off": False}.get(compile, compile), show_progress=False, on_step=print_step, **settings,
        )  # fmt: skip
        report, sparse = {k: v for k, v in result.report.items() if k != "density"}, score(net)
        if keep:
            result.save(keep, tokenizer, overwrite=True)
    record = {
        "label": name,
        **about(model, teacher, method, data, windows),
        "rotation": rotation,
        "tokens": report.get("tokens", 0),
        "dense_perplexity": dense,
        "sparse_perplexity": sparse,
        "zero_shot": zero_shot(net, tokenizer, limit=tasks) if tasks else None,
        "quantized_perplexity": quantized_scores(net, quantize, score, corpus, calibration=calibration, dense=dense_too),
        "report": {k: v for k, v in report.items() if k not in ("skipped", "passes")} | {"sites": len(report["sites"])},
    }
    write_json(out, record)
    shutil.rmtree(state, ignore_errors=True)
    print(f"{name}: dense {dense}, sparse {sparse}")


def scores(ids: dict[str, torch.Tensor], windows: int, model: PreTrainedModel) -> dict[str, float]:
    """Perplexity of each text."""
    return {which: windowed_perplexity(model, tokens, windows) for which, tokens in ids.items()}


def about(model: str, teacher: Path | None, method: str, data: list[str], windows: int) -> dict[str, Any]:
    """What a record says of the run that it is of."""
    return {
        "model": Path(model).name,
        "teacher": teacher.name if teacher else None,
        "method": method,
        "data": [Path(d).name for d in data],
        "windows": windows,
        "context": CONTEXT,
    }


def rotated(model: PreTrainedModel, corpus: TokenData, steps: int, length: int, seed: int) -> dict[str, Any]:
    """The report of having turned the model, by products of float32."""
    dtype = model.dtype
    report = sf.rotate(model.float(), corpus, length=length, seed=seed, steps=steps)
    model.to(dtype)
    return report


def rotation_of(model: Path) -> dict[str, Any] | None:
    """What ``sparseforge-fx rotate`` wrote beside it; None for a model in its own basis."""
    told = model / "rotation.json"
    return json.loads(told.read_text()) if told.is_file() else None


def loss(method: str, settings: dict[str, Any], **changes: float | str | None) -> sf.Distillation | None:
    """The preset's with these fields; None where none is given."""
    given = {name: value for name, value in changes.items() if value is not None}
    chosen = sf.Recipe(method=method, preset=settings.get("preset")).settings(True).objective
    return replace(chosen, **given) if given else None


def read_options(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        sys.exit(f"--options is not json ({error}): give fields of the method's config as '{{\"name\": value}}'")


def known_score(record: Path | None, windows: int) -> dict[str, float] | None:
    """The dense model's, if that run scored as many windows."""
    known = json.loads(record.read_text()) if record is not None else {}
    return known["dense_perplexity"] if known.get("windows") == windows else None


def quantized_scores(
    model: PreTrainedModel, values: str, score: Score, corpus: TokenData, **how: Any
) -> dict[str, dict[str, Any]]:
    """Perplexities by each of the values that ``sf.quantize`` takes, and the seconds that the rounding took; ``weights``:
    those of the rounded weights alone, without what kernels make of activations."""
    found = {}
    for name in filter(None, values.split(",")):
        rounded, clock = copy.deepcopy(model), time.monotonic()
        sf.quantize(rounded, name, corpus, **how)
        found[name] = {"seconds": time.monotonic() - clock, **score(rounded)}
        found[name]["weights"] = score(rounded.dequantize())
    return found


def print_step(step: int, row: dict[str, float]) -> None:
    print(json.dumps({k: row[k] for k in ("step", "loss", "task", "kl", "seconds", "flip_rate")}), flush=True)


if __name__ == "__main__":
    typer.run(main)
