"""What follows from a plan's prices alone: the formats under a budget, and what any budget could buy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format
from sparseforge_fx.knapsack import Option, choose, path
from sparseforge_fx.plans import Plan, PlannedWeight, Price


class OutOfReach(SparseForgeError):
    """No choice of formats keeps a budget.

    Attributes:
        plan: with all prices, and the goal that cannot be met.
        nearest: what the goal could be.
    """

    def __init__(self, text: str, plan: Plan, nearest: float):
        super().__init__(text)
        self.plan, self.nearest = plan, nearest


def decide(made: Plan) -> Plan:
    """The plan with the formats that meet its goal at the least predicted loss (or, with a goal for the loss, the least
    time); weights of a group get the same one. Raises OutOfReach where nothing meets it."""
    (name, aim), *_ = made.goal.items()
    common = [_common(group) for group in made.groups]
    items = _items(made, name)
    limit = {"speedup": 1 / aim, "bytes": aim, "loss": aim}[name]
    chosen = choose(items, limit)
    if chosen is None:
        least = sum(min(o.weight for o in options) for options in items)
        nearest, most = {  # rounded to what can be met
            "speedup": (math.floor(100 / least) / 100, "at most"),
            "bytes": (math.ceil(100 * least) / 100, "at least"),
        }[name]
        told = f"no formats give {name} {aim:g}: with these it is {nearest:.2f} {most}; ask for less"
        raise OutOfReach(told, made, nearest)
    picked = zip(made.groups, common, chosen, strict=True)
    formats = {w.name: forms[k] for group, forms, k in picked for w in group}
    return replace(made, weights=[replace(w, format=formats[w.name]) for w in made.weights])


def frontier(made: Plan) -> list[tuple[float, float]]:
    """(speed-up of the linears, predicted increase of the loss in nats) of the plans on the hull that :func:`decide`
    goes along, from the least loss to the fastest. The speed-up is that of the mean time over the token counts."""
    items = _items(made, "speedup")
    points = []
    for chosen in path(items):
        loss, time = _sum(options[k] for options, k in zip(items, chosen, strict=True))
        points.append((1 / time, loss))
    return points


def standing(made: Plan) -> tuple[float, float]:
    """The same two numbers of the formats that the plan has; NaN where one has no price."""
    loss, time = _sum(_option(w.price, made, "speedup") for w in made.weights)
    return 1 / time, loss


def everywhere(made: Plan, form: Format) -> Plan:
    """The plan with one format on all weights; a weight that cannot be sparse keeps the values alone, else dense."""
    choices = (form, form._replace(pattern="dense"))
    return replace(
        made,
        weights=[replace(w, format=next((f for f in choices if f in w.prices), DENSE)) for w in made.weights],
    )


def _common(group: Sequence[PlannedWeight]) -> list[Format]:
    return [form for form in group[0].prices if all(form in w.prices for w in group)]


def _items(made: Plan, goal: str) -> list[list[Option]]:
    """For every group, an option for each format that all of it can have."""
    return [
        [_sum(_option(w.prices[form], made, goal) for w in group) for form in _common(group)] for group in made.groups
    ]


def _sum(options: Iterable[Option]) -> Option:
    return Option(*map(math.fsum, zip(*options, strict=True)))


def _option(price: Price, made: Plan, goal: str) -> Option:
    """What a price is to the goal; times and bytes as shares of all weights' dense ones."""
    dense = [w.prices[DENSE] for w in made.weights]
    time = math.fsum(
        price.microseconds[t] / math.fsum(p.microseconds[t] for p in dense) / len(made.tokens) for t in made.tokens
    )
    if goal == "loss":
        return Option(time, price.loss)
    return Option(price.loss, time if goal == "speedup" else price.bytes / math.fsum(p.bytes for p in dense))
