"""The points of the frontier that come of one dense model: every format on all of its linears, and plans.

``made`` writes packed folders, each once; prices are measured once, for all plans. The prediction of a point is of its
linears: their time at each token count, from the plan's prices.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sparseforge_fx as sf
from sparseforge_fx.decision import decide, everywhere
from sparseforge_fx.deploy.lowering import cost
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format, parse_format
from sparseforge_fx.kernels.layouts import layouts_of
from sparseforge_fx.report import write_json

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTIZED = {"int8": "int8", "int4": "int4/32"}


class Point(NamedTuple):
    """What ``sf.load`` takes, if need be with the dtype to load it in; ``predicted`` where it was made here."""

    name: str
    path: str
    dtype: str | None = None
    predicted: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The name as a file's."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def is_gguf(self) -> bool:
        return self.path.endswith(".gguf")


def made(
    model: str,
    data: str,
    folder: Path,
    recipe: sf.Recipe,
    rounding: int,
    dtype: str,
    batch: Sequence[int],
    speedups: Sequence[float],
) -> list[Point]:
    """Dense, and 2:4, in floats, int8 and int4, and a plan for each speed-up of the linears, in ``folder``.

    Args:
        data: text of the plan's predictions, of the training and of the rounding.
        recipe: makes sparse what is to be sparse, by a plan or everywhere.
        rounding: sequences that values are rounded on.
        dtype: of the floats. Rounding is done in float32, making sparse in the recipe's dtype (default: float32).
    """
    asked = {
        "model": model,
        "data": data,
        "recipe": recipe.describe(),
        "rounding": rounding,
        "dtype": dtype,
        "batch": list(batch),
    }
    before = folder / "made-of.json"
    if before.exists() and json.loads(before.read_text()) != asked:
        sys.exit(f"{folder} holds points of another model, data, recipe, rounding, dtype or batch ({before}): name a new folder")
    write_json(before, asked)
    prices = _once(folder / "prices.json", lambda path: _price(model, data, recipe, dtype, batch).save(path))
    plan = sf.Plan.read(prices)
    points = [Point(f"dense {SHORT[dtype]}", model, dtype, predicted(plan))]
    if dtype != "float32":
        points.append(Point("dense fp32", model, "float32"))

    def sparse(path: Path, **how: Any) -> None:
        loaded, tokenizer = sf.load(model, dtype=recipe.dtype or "float32")
        sf.sparsify(loaded, data, recipe, tokenizer=tokenizer, **how).save(path, tokenizer)

    def rounded(source: str | Path, path: Path, **how: Any) -> None:
        loaded, tokenizer = sf.load(source, dtype="float32")
        reading = {n: getattr(recipe, n) for n in ("length", "batch_size", "seed", "text_column")}
        sf.quantize(loaded, data=data, tokenizer=tokenizer, calibration=rounding, **reading, **how)
        sf.save_packed(loaded.to(getattr(torch, dtype)), tokenizer, path)

    def packed(source: Path, path: Path) -> None:
        loaded, tokenizer = sf.load(source, dtype=dtype)
        sf.save_packed(loaded, tokenizer, path)

    two_four = _once(folder / "2-4", sparse)
    path = _once(folder / "2-4-packed", lambda at: packed(two_four, at))
    points.append(Point(f"2:4 {SHORT[dtype]}", str(path), None, predicted(everywhere(plan, Format("2:4")))))
    for pattern, source in (("dense", model), ("2:4", two_four)):
        for name, values in QUANTIZED.items():
            label, form = f"{pattern.replace(':', '-')}-{name}", parse_format(f"{pattern} {values}")
            path = _once(folder / label, lambda at, s=source, v=values: rounded(s, at, values=v, include="*"))
            points.append(Point(f"{pattern} {name}", str(path), None, predicted(everywhere(plan, form))))
    for speedup in speedups:
        label = f"plan-{speedup:g}x"
        try:
            decided = decide(replace(plan, goal={"speedup": speedup}))
        except SparseForgeError as error:  # beyond what the formats reach here
            print(label, error, flush=True)
            continue
        decided.save(written := folder / f"{label}-formats.json")
        source, forms = model, decided.formats.values()
        if any(form.is_sparse for form in forms):
            source = str(_once(folder / f"{label}-sparse", lambda at, p=written: sparse(at, plan=str(p))))
        if any(form.is_quantized for form in forms):
            source = str(_once(folder / label, lambda at, s=source, p=written: rounded(s, at, plan=str(p))))
        elif source != model:
            source = str(_once(folder / label, lambda at, s=source: packed(s, at)))
        points.append(Point(f"plan {speedup:g}x", source, dtype if source == model else None, predicted(decided)))
    return points


def _price(model: str, data: str, recipe: sf.Recipe, dtype: str, batch: Sequence[int]) -> sf.Plan:
    """A plan whose budget binds nothing: of every format that has kernels here, what it costs."""
    loaded, tokenizer = sf.load(model, dtype=dtype)
    reading = {n: getattr(recipe, n) for n in ("length", "batch_size", "seed", "text_column")}
    return sf.plan(loaded, data, bytes=1.0, tokens=batch, tokenizer=tokenizer, **reading)


def _once(path: Path, write: Callable[[Path], object]) -> Path:
    if not path.exists():
        write(path)
        print(f"wrote {path}", flush=True)
    return path


def predicted(plan: sf.Plan) -> dict[str, Any]:
    """Of the linears: speed-up and microseconds by token count, bytes, loss; and how many weights have which format."""
    found = [str(form) for form in plan.formats.values()]
    return {
        "speedup": {str(t): s for t, s in plan.speedups.items()},
        "microseconds": {str(t): sum(w.price.microseconds[t] for w in plan.weights) for t in plan.tokens},
        "dense_microseconds": {str(t): sum(w.prices[DENSE].microseconds[t] for w in plan.weights) for t in plan.tokens},
        "bytes": plan.bytes,
        "loss": plan.loss,
        "formats": {form: found.count(form) for form in sorted(set(found))},
    }


def drift(plan: sf.Plan, dtype: str) -> dict[str, float]:
    """By token count, how many times as long as in the plan's prices the dense linears take now: memory is shared with
    whoever else is on the machine."""
    sizes = Counter((sum(w.shape[0] for w in group), group[0].shape[1]) for group in plan.groups)
    device, form = torch.device("cpu"), parse_format("dense int8")  # any that is timed beside dense
    took = dict.fromkeys(plan.tokens, 0.0)
    for (out, width), count in sizes.items():
        shape = cost.Shape.of(out, width, getattr(torch, dtype), form)
        rows = next(iter(cost.measure([shape], plan.tokens, device, layouts_of(device))[shape].values()))
        for t in plan.tokens:
            took[t] += count * rows[t].dense_us
    before = {t: sum(w.prices[DENSE].microseconds[t] for w in plan.weights) for t in plan.tokens}
    return {str(t): took[t] / before[t] for t in plan.tokens}


def expected_speed(
    prediction: dict[str, Any], dense: dict[str, float], drifted: dict[str, float]
) -> dict[str, float | None]:
    """Tokens per second by batch, if what lies between the linears takes as long as in the dense model; None where the
    prices save more than its whole step takes.

    Args:
        dense: measured tokens per second of the dense model in the same dtype, by batch.
        drifted: what :func:`drift` said in the same run; prices are multiplied by it.
    """
    speeds: dict[str, float | None] = {}
    for batch, speed in dense.items():
        saved = drifted[batch] * (prediction["dense_microseconds"][batch] - prediction["microseconds"][batch])
        seconds = int(batch) / speed - saved / 1e6
        speeds[batch] = int(batch) / seconds if seconds > 0 else None
    return speeds


def recipe_of(path: Path | None) -> sf.Recipe:
    """Of a file, without the model and data that it names; without one SparseGPT's solution, untrained."""
    return sf.Recipe(method="sparsegpt") if path is None else sf.Recipe.read(path).changed(model=None, data=None)
