"""The points of the frontier that come of one dense model: every format on all of its linears, and plans.

``made`` writes packed folders, each once; prices are measured once, for all plans. What a plan predicts is of its linears;
``price_now`` times these once more, and with what one point takes for all else ``expected_speed`` says how fast another is.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import sparseforge_fx as sf
from sparseforge_fx.cli.quantize import scales_of
from sparseforge_fx.decision import decide, everywhere
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format, parse_format
from sparseforge_fx.kernels.layouts import layouts_of
from sparseforge_fx.passes.find_routing import Routing
from sparseforge_fx.plans import PlannedWeight
from sparseforge_fx.report import write_json

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTIZED = ("int8", "int4/32", "int4/16")


class Point(NamedTuple):
    """What ``sf.load`` takes, if need be with the dtype to load it in; the ``plan`` of its formats where it was made here."""

    name: str
    path: str
    dtype: str | None = None
    plan: sf.Plan | None = None

    @property
    def label(self) -> str:
        """The name as a file's."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def is_gguf(self) -> bool:
        return self.path.endswith(".gguf")


class Goal(NamedTuple):
    """What a plan is held to: a ``speedup`` of the linears, or a share of their ``bytes``."""

    of: str
    value: float

    @property
    def point(self) -> str:
        return f"plan {self.value:g}x" if self.of == "speedup" else f"plan {100 * self.value:g}% bytes"


@dataclass(frozen=True)
class Maker:
    """Writes packed folders of one dense model.

    Attributes:
        data: text of the plan's predictions, of the training and of the rounding.
        recipe: makes sparse what is to be sparse, by a plan or everywhere, in its dtype (default: float32).
        two_four: a folder of this model made sparse everywhere by other means; if None, the recipe's.
        rounding: sequences that values are rounded on, in float32.
        dtype: of the floats.
    """

    model: str
    data: str
    recipe: sf.Recipe
    rounding: int
    dtype: str
    two_four: str | None = None

    def sparse(self, path: Path, options: Mapping[str, Any] = MappingProxyType({}), **how: Any) -> None:
        """With further ``options`` of the method."""
        loaded, tokenizer = sf.load(self.model, dtype=self.recipe.dtype or "float32")
        sf.sparsify(loaded, self.data, self.recipe.changed(**options), tokenizer=tokenizer, **how).save(path, tokenizer)

    def rounded(self, source: str | Path, path: Path, **how: Any) -> None:
        """By the scales that the source was trained with, where it was."""
        loaded, tokenizer = sf.load(source, dtype="float32")
        reading = {n: getattr(self.recipe, n) for n in ("length", "batch_size", "seed", "text_column")}
        reading |= {"calibration": self.rounding, "scales": scales_of(str(source), {})[0]}
        sf.quantize(loaded, data=self.data, tokenizer=tokenizer, **reading, **how)
        sf.save_packed(loaded.to(getattr(torch, self.dtype)), tokenizer, path)

    def packed(self, source: str | Path, path: Path) -> None:
        loaded, tokenizer = sf.load(source, dtype=self.dtype)
        sf.save_packed(loaded, tokenizer, path)


def made(maker: Maker, folder: Path, batch: Sequence[int], goals: Sequence[Goal], in_loop: bool) -> list[Point]:
    """Dense, and 2:4, in floats, int8 and int4, and a plan for each goal, in ``folder``.

    Args:
        in_loop: a second 2:4 int4 point, trained in these values.
    """
    asked = {**vars(maker), "recipe": maker.recipe.describe(), "batch": list(batch)}
    before = folder / "made-of.json"
    if before.exists() and json.loads(before.read_text()) != asked:
        sys.exit(f"{folder} holds points of another model, data or setting (see {before.name}): name a new folder")
    write_json(before, asked)
    plan = sf.Plan.read(_once(folder / "prices.json", lambda path: _price(maker, batch).save(path)))
    floats = SHORT[maker.dtype]
    points = [Point(f"dense {floats}", maker.model, maker.dtype, plan)]
    if maker.dtype != "float32":
        points.append(Point("dense fp32", maker.model, "float32"))
    two_four = maker.two_four or _once(folder / "2-4", maker.sparse)
    path = _once(folder / "2-4-packed", lambda at: maker.packed(two_four, at))
    points.append(Point(f"2:4 {floats}", str(path), None, everywhere(plan, Format("2:4"))))
    in_few_bits = [(f"dense {name}", maker.model) for name in QUANTIZED] + [
        (f"2:4 {name}", two_four) for name in QUANTIZED
    ]
    if in_loop:
        trained = _once(folder / "2-4-int4-trained-sparse", lambda at: maker.sparse(at, {"values": "int4"}))
        in_few_bits.append(("2:4 int4 trained", trained))
    for name, source in in_few_bits:
        pattern, values = name.split()[:2]
        at = folder / Point(name, "").label
        path = _once(at, lambda at, s=source, v=values: maker.rounded(s, at, values=v, include="*"))
        points.append(Point(name, str(path), None, everywhere(plan, parse_format(f"{pattern} {values}"))))
    return points + [found for goal in goals if (found := _planned(maker, plan, folder, goal)) is not None]


def _planned(maker: Maker, prices: sf.Plan, folder: Path, goal: Goal) -> Point | None:
    """None where no choice of formats is so fast, or so small."""
    name, source = goal.point, maker.model
    label = Point(name, "").label
    try:
        plan = decide(replace(prices, goal={goal.of: goal.value}))
    except SparseForgeError as error:
        print(label, error, flush=True)
        return None
    plan.save(written := folder / f"{label}-formats.json")
    if any(form.is_sparse for form in plan.formats.values()):
        source = str(_once(folder / f"{label}-sparse", lambda at: maker.sparse(at, plan=str(written))))
    if any(form.is_quantized for form in plan.formats.values()):
        source = str(_once(folder / label, lambda at, s=source: maker.rounded(s, at, plan=str(written))))
    elif source != maker.model:
        source = str(_once(folder / label, lambda at, s=source: maker.packed(s, at)))
    return Point(name, source, maker.dtype if source == maker.model else None, plan)


def _price(maker: Maker, batch: Sequence[int]) -> sf.Plan:
    """A plan whose budget binds nothing: of every format that has kernels here, what it costs."""
    loaded, tokenizer = sf.load(maker.model, dtype=maker.dtype)
    reading = {n: getattr(maker.recipe, n) for n in ("length", "batch_size", "seed", "text_column")}
    return sf.plan(loaded, maker.data, bytes=1.0, tokens=batch, tokenizer=tokenizer, **reading)


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
        "bytes": plan.bytes,
        "loss": plan.loss,
        "formats": {form: found.count(form) for form in sorted(set(found))},
    }


Product = tuple[int, int, Routing | None, Format]  # outputs, inputs, of a stack its routing


def products(plan: sf.Plan) -> Counter[Product]:
    """What is multiplied in a step, by how often. Raises SparseForgeError for a stack of which nobody kept how many experts
    a token goes to."""
    found: Counter[Product] = Counter()
    for group in plan.groups:
        outputs: Counter[Format] = Counter()
        for w in group:
            outputs[w.format] += w.shape[-2]
        routing = _routing(group[0])
        found.update((out, group[0].shape[-1], routing, form) for form, out in outputs.items())
    return found


def _routing(weight: PlannedWeight) -> Routing | None:
    if len(weight.shape) == 2:
        return None
    if weight.chosen is None:
        raise SparseForgeError(f"the plan does not say how many experts of {weight.name} a token goes to: plan again")
    return Routing(weight.shape[0], weight.chosen)


def price_now(plans: Sequence[sf.Plan], dtype: str) -> dict[Product, dict[int, float]]:
    """Microseconds of each product of the plans at each token count: memory and clock are shared with whoever else is on
    the machine, so that prices of another hour say little of this one."""
    device, found = torch.device("cpu"), {}
    wanted = {product for plan in plans for product in products(plan)}
    for out, width, routing in {product[:3] for product in wanted}:
        forms = {form for *size, form in wanted if size == [out, width, routing]}
        timed = forms - {DENSE} or {Format("dense", "int8")}  # dense is timed beside any
        shapes = {form: cost_table.Shape.of(out, width, getattr(torch, dtype), form, routing) for form in timed}
        table = cost.measure(list(shapes.values()), plans[0].tokens, device, layouts_of(device), rounds=7)
        rows = {form: list(table[shape].values()) for form, shape in shapes.items()}
        for form in forms:
            of = cost.of_one_layout(rows.get(form) or next(iter(rows.values())), plans[0].tokens)
            times = {t: row.dense_us if form == DENSE else row.packed_us for t, row in of.items()}
            found[out, width, routing, form] = times
    return found


def time_of(plan: sf.Plan, now: Mapping[Product, Mapping[int, float]]) -> dict[str, float]:
    """Microseconds of all linears of a step, by token count."""
    return {str(t): sum(count * now[p][t] for p, count in products(plan).items()) for t in plan.tokens}


def expected_speed(
    linears: Mapping[str, float], known: Mapping[str, float], speed: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second by batch, if all but the linears takes as long as in a model that is known: no less than nothing,
    where its linears alone, timed one by one, take longer than its step.

    Args:
        linears, known: microseconds of the linears, of this one and of the known one.
        speed: measured tokens per second of that.
    """
    rest = {batch: max(0.0, 1e6 * int(batch) / speed[batch] - known[batch]) for batch in speed}
    return {b: 1e6 * int(b) / (rest[b] + linears[b]) for b in speed}


def recipe_of(path: Path | None) -> sf.Recipe:
    """Of a file, without the model and data that it names; without one SparseGPT's solution, untrained."""
    return sf.Recipe(method="sparsegpt") if path is None else sf.Recipe.read(path).changed(model=None, data=None)
