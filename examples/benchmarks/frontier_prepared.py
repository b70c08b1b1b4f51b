"""What of a frontier's point is made once: its perplexity, its zero-shot accuracy, its exported file.

Each is a json beside the points, which says what was asked and at which commit, and is made anew where something else
is asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import CONTEXT, token_ids, windowed_perplexity
from frontier_points import Point
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.evaluation.zero_shot import zero_shot
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.report import environment, write_json

HERE = Path(__file__).parent


def prepared(
    point: Point, folder: Path, text: Path, batch: Sequence[int], windows: int, tasks: int, max_length: int
) -> dict[str, Any]:
    """What the record says of the point beside its speed, from the folder if it is there.

    Args:
        text: test text. The first ``windows`` windows are scored.
        tasks: documents of each zero-shot task; 0: none.
        batch, max_length: of the exported generator.
    """
    ways: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
        "perplexity": (_perplexity, {"text": text.name, "windows": windows, "context": CONTEXT})
    }
    if not point.is_gguf:
        ways["export"] = (_export, {"batch": list(batch), "max_length": max_length})
    if tasks:
        ways["zero_shot"] = (_zero_shot, {"tasks": tasks})
    found: dict[str, Any] = {"name": point.name, "runtime": "llama.cpp" if point.is_gguf else "ours"}
    found |= {"zero_shot": None, "zero_shot_mean": None}
    asked: dict[str, Any] = {"path": point.path, "dtype": point.dtype}
    for name, (make, wanted) in ways.items():
        file = folder / f"{point.label}.{name}.json"
        wanted = {"path": point.path, "dtype": point.dtype, **wanted}
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("asked") != wanted:
            known = {"asked": wanted, f"{name}_commit": environment()["commit"], **make(point, folder, text, wanted)}
            write_json(file, known)
            print(point.name, name, {k: v for k, v in known.items() if isinstance(v, float)}, flush=True)
        asked |= wanted
        found |= known
    return found | {"asked": asked}


def _perplexity(point: Point, folder: Path, text: Path, asked: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = sf.load(point.path, dtype=point.dtype)
    ids = token_ids(text, tokenizer)
    windows = ids[: asked["windows"] * CONTEXT].view(-1, CONTEXT)
    torch.save(windows, folder / "windows.pt")
    found = windowed_perplexity(model, ids, asked["windows"])
    if not point.is_gguf:
        return {"perplexity": found}
    torch.save({"windows": windows, "threads": torch.get_num_threads()}, folder / "request.pt")
    return {**llama_cpp("perplexity", point, folder), "perplexity_of_weights": found}


def _zero_shot(point: Point, folder: Path, text: Path, asked: dict[str, Any]) -> dict[str, Any]:
    del folder, text
    model, tokenizer = sf.load(point.path, dtype=point.dtype)
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        model = model.dequantize()  # of the weights alone, as a GGUF's is
    scores = zero_shot(model, tokenizer, limit=asked["tasks"])
    return {"zero_shot": scores, "zero_shot_mean": mean(s["acc"] for s in scores.values())}


def _export(point: Point, folder: Path, text: Path, asked: dict[str, Any]) -> dict[str, Any]:
    del text
    model, tokenizer = sf.load(point.path, dtype=point.dtype)
    table = None
    if not any(isinstance(m, SparseLinear) or _is_two_four(m) for m in model.modules()):
        # a generator is of a 2:4 model: zeros are as slow as other values, and by an empty table all stays dense
        sf.sparsify(model)
        table = {}
    report = sf.export_generator(
        model, folder / f"{point.label}.pt2", tokenizer, format="aoti", max_length=asked["max_length"],
        tokens=asked["batch"], table=table,
    )  # fmt: skip
    gated = [s for s in report["skipped"] if s["reason"].startswith("gate")]
    return {"file_bytes": report["file_bytes"], "packed": len(report["sites"]), "kept_dense_by_gate": len(gated)}


def _is_two_four(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and check_pattern(module.weight, TWO_FOUR)


def held_bytes(point: Point) -> int:
    """Bytes of what the loaded model holds, tied weights once."""
    model, _ = sf.load(point.path, dtype=point.dtype)
    sizes: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):  # an empty one may stand where the next begins
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
    return sum(sizes.values())


def llama_cpp(command: str, point: Point, folder: Path) -> dict[str, Any]:
    """What llamacpp.py says to the request in the folder."""
    result = folder / "result.json"
    arguments = [HERE / "llamacpp.py", command, point.path, folder / "request.pt", result]
    subprocess.run([sys.executable, *map(str, arguments)], check=True)
    return json.loads(result.read_text())
