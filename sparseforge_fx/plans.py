"""A plan: the format of every weight, what each format costs and gains there, and the machine that it was measured on.

Plain data: a json file that can be edited. A weight whose ``format`` is changed by hand has the prices of that format,
which stand beside it; a format without a price is taken, too, and totals are then unknown (NaN).
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format, parse_format
from sparseforge_fx.report import environment, write_json

VERSION = 1


class Price(NamedTuple):
    """What one weight costs in one format.

    Attributes:
        loss: predicted increase of the model's loss, nats per answer.
        bytes: that it takes; a copy of what an embedding keeps counts beside the embedding's own.
        microseconds: of its product, by token count.
    """

    loss: float
    bytes: float
    microseconds: Mapping[int, float]


@dataclass
class PlannedWeight:
    """One weight.

    Attributes:
        shape: (out, in), of a stack (experts, out, in)
        prices: of the dense format, and of all that were weighed against it.
        group: name of the first of the weights that read the same input and are deployed as one product (q, k and v;
            gate and up) while they have the same format. Times are its outputs' share of that product's.
        chosen: of a stack, the experts that multiply each token, which its times are of; None: a matrix, or a plan
            of before this was kept.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    prices: dict[Format, Price]
    group: str = ""
    chosen: int | None = None

    @property
    def price(self) -> Price:
        """Of the format that it has; of NaN where nobody measured it."""
        dense = self.prices[DENSE]
        unknown = Price(math.nan, math.nan, dict.fromkeys(dense.microseconds, math.nan))
        return self.prices.get(self.format, unknown)


@dataclass
class Plan:
    """The formats of a model's weights.

    Attributes:
        weights: those that had a choice.
        tokens: token counts (batch x sequence) that times are of.
        goal: what was asked for: ``speedup``, ``bytes`` or ``loss``, and how much.
        machine, threads: that times were measured on; ``machine`` None: it is not to be looked at.
        versions: of the libraries.
        skipped: the other linears, with the reason.
        notes: what the user must know.
    """

    weights: list[PlannedWeight]
    tokens: tuple[int, ...]
    goal: dict[str, float]
    machine: str | None
    threads: int
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[list[PlannedWeight]]:
        """The weights, those together that are deployed as one product while they have the same format."""
        found: dict[str, list[PlannedWeight]] = {}
        for w in self.weights:
            found.setdefault(w.group or w.name, []).append(w)
        return list(found.values())

    # -- what it promises --------------------------------------------------------------------------------------------
    @property
    def formats(self) -> dict[str, Format]:
        """By the weight's name."""
        return {w.name: w.format for w in self.weights}

    @property
    def speedups(self) -> dict[int, float]:
        """By token count: time of all dense weights over that of the planned ones. What lies between the linears is
        not counted."""
        return {
            t: sum(w.prices[DENSE].microseconds[t] for w in self.weights)
            / sum(w.price.microseconds[t] for w in self.weights)
            for t in self.tokens
        }

    @property
    def speedup(self) -> float:
        """Geometric mean over the token counts."""
        found = list(self.speedups.values())
        return math.nan if any(map(math.isnan, found)) else statistics.geometric_mean(found)

    @property
    def bytes(self) -> float:
        """Share of the dense weights' bytes."""
        return sum(w.price.bytes for w in self.weights) / sum(w.prices[DENSE].bytes for w in self.weights)

    @property
    def loss(self) -> float:
        """Predicted increase, nats per answer: the sum over the weights."""
        return sum(w.price.loss for w in self.weights)

    def __str__(self) -> str:
        """A table; weights that differ in the numbers in their names share a row."""
        groups: dict[tuple[str, str, str], list[PlannedWeight]] = {}
        for w in self.weights:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", w.name)
            groups.setdefault((name, _sides(w.shape), str(w.format)), []).append(w)
        heads = ("weights", "out x in", "format", "count", "loss", "MB", *(f"us at {t}" for t in self.tokens))
        rows = [heads]
        for (name, shape, form), group in groups.items():
            prices = [w.price for w in group]
            times = (f"{sum(p.microseconds[t] for p in prices):.0f}" for t in self.tokens)
            size = f"{sum(p.bytes for p in prices) / 1e6:.2f}"
            rows.append((name, shape, form, str(len(group)), f"{sum(p.loss for p in prices):.4f}", size, *times))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = 3  # columns of text
        lines = [
            "  ".join(c.ljust(n) if i < left else c.rjust(n) for i, (c, n) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        speed = ", ".join(f"{s:.2f}x at {t}" for t, s in self.speedups.items())
        total = f"linears: {speed} tokens; {self.bytes:.1%} of the dense bytes; loss {self.loss:+.4f} nats predicted"
        return "\n".join((*lines, total, *self.notes))

    # -- as a file -----------------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """As plain values, which :meth:`from_plain` takes."""
        return {
            "version": VERSION,
            "goal": self.goal,
            "machine": self.machine,
            "threads": self.threads,
            "versions": self.versions,
            "tokens": list(self.tokens),
            "weights": [
                {
                    "name": w.name,
                    "shape": list(w.shape),
                    "format": str(w.format),
                    "group": w.group,
                    **({} if w.chosen is None else {"chosen": w.chosen}),
                    "prices": {
                        str(form): {"loss": p.loss, "bytes": p.bytes, "us": {str(t): u for t, u in p[2].items()}}
                        for form, p in w.prices.items()
                    },
                }
                for w in self.weights
            ],
            "skipped": self.skipped,
            "notes": self.notes,
        }

    def save(self, path: str | Path) -> None:
        """Write it as json."""
        write_json(Path(path), self.describe())

    @classmethod
    def from_plain(cls, plain: Any) -> Plan:
        """Raises SparseForgeError, with the name of the entry, for anything that :meth:`describe` cannot give."""
        if not isinstance(plain, Mapping) or plain.get("version") != VERSION:
            raise SparseForgeError(f"a plan is a mapping with version {VERSION}: make it with sf.plan")
        try:
            tokens = tuple(int(t) for t in plain["tokens"])
            weights = [_weight(entry, tokens) for entry in plain["weights"]]
            machine, goal = plain["machine"], {str(k): float(v) for k, v in plain["goal"].items()}
            rest = (int(plain["threads"]), dict(plain["versions"]), dict(plain["skipped"]), list(plain["notes"]))
        except SparseForgeError:  # a ValueError, too
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SparseForgeError(f"a plan lacks or garbles an entry: {type(error).__name__} {error}") from error
        names = [w.name for w in weights]
        if twice := {n for n in names if names.count(n) > 1}:
            raise SparseForgeError(f"the plan names {sorted(twice)[0]} twice: keep one of them")
        if not weights or not tokens or not isinstance(machine, str | None):
            raise SparseForgeError("a plan has weights, tokens, and as machine a text or null")
        return cls(weights, tokens, goal, machine, *rest)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """From a file. Raises SparseForgeError where there is none, or where it is no plan."""
        try:
            return cls.from_plain(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise SparseForgeError(f"{path} cannot be read: {error.strerror or error}") from error
        except SparseForgeError as error:
            raise SparseForgeError(f"{path} is not a plan: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SparseForgeError(f"{path} is not a plan: {type(error).__name__} {error}") from error

    def check_machine(self) -> None:
        """Raise a SparseForgeError if it was measured on another machine than this one."""
        here = environment()["device"]
        if self.machine not in (None, here):
            raise SparseForgeError(
                f"the plan was measured on {self.machine} and this is {here}: plan again here, or set its machine to "
                "null if the model is meant for there"
            )


def planned_formats(plan: Any, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Format]:
    """The formats that a plan gives the weights of a model, by the names that it has for them.

    Args:
        plan: a :class:`Plan`, the path of one, or formats by the weights' names.
        shapes: (out, in), or (experts, out, in), of what a plan may name, by every name that it has; None: not known.

    Raises SparseForgeError if it was measured on another machine, names a weight that the model has not or has in
    another shape, or gives one a format that its width does not fit.
    """
    if isinstance(plan, str | Path):
        plan = Plan.read(plan)
    if not isinstance(plan, Plan | Mapping):
        raise SparseForgeError(f"plan is {plan!r}: give a Plan, the path of one, or formats by the weights' names")
    theirs: dict[str, tuple[int, ...]] = {}
    if isinstance(plan, Plan):
        plan.check_machine()
        theirs = {w.name: w.shape for w in plan.weights}
        plan = plan.formats
    formats = {name: parse_format(form) for name, form in plan.items()}
    for name, form in formats.items():
        if name not in shapes:
            raise SparseForgeError(f"the plan names {name}, which is no linear of the model: plan again for this model")
        here = shapes[name]
        if here is None:
            continue
        if (there := theirs.get(name, here)) != here:
            raise SparseForgeError(
                f"{name} is {_sides(there)} in the plan and {_sides(here)} in the model: plan again for this model"
            )
        if (reason := form.why_not(here[-1])) is not None:
            raise SparseForgeError(f"{name} of the plan cannot be {form}: {reason}")
    return formats


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _weight(entry: Any, tokens: Sequence[int]) -> PlannedWeight:
    name, group = entry["name"], entry.get("group", "")
    try:
        shape = tuple(int(n) for n in entry["shape"])
        form = parse_format(entry["format"])
        prices = {parse_format(key): _price(price, tokens) for key, price in entry["prices"].items()}
    except SparseForgeError as error:
        raise SparseForgeError(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparseForgeError(f"{name} of the plan: {type(error).__name__} {error}") from error
    if DENSE not in prices:
        raise SparseForgeError(f"{name} of the plan has no price as dense, which the others are compared with")
    if not isinstance(name, str) or not isinstance(group, str):
        raise SparseForgeError(f"{name} of the plan: name and group are names of weights")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise SparseForgeError(f"{name} of the plan: its shape is out and in, of a stack experts, out and in")
    if reason := form.why_not(shape[-1]):
        raise SparseForgeError(f"{name} of the plan cannot be {form}: {reason}")
    chosen = entry.get("chosen")
    if chosen is not None and (len(shape) != 3 or type(chosen) is not int or not 0 < chosen <= shape[0]):
        raise SparseForgeError(f"{name} of the plan: chosen is a number of experts, of a stack, from 1 to all of them")
    return PlannedWeight(name, shape, form, prices, group, chosen)


def _price(price: Any, tokens: Sequence[int]) -> Price:
    times = {t: _number(price["us"][str(t)]) for t in tokens}
    return Price(_number(price["loss"]), _number(price["bytes"]), times)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e18:
        raise ValueError(f"{str(value)[:40]!r} is no number from 0 up")
    return float(value)
