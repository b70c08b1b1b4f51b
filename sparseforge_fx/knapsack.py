"""Multiple-choice knapsack: one option for every item, the least value together, the weights together under a limit.

The Lagrangian of the limit lets every item choose by itself: value + multiplier * weight is least on the lower convex
hull of its options. As the multiplier grows the items step down their hulls, those first that give up least value for
the weight that they save (Sinha and Zoltners, The Multiple-Choice Knapsack Problem, 1979). The step that reaches the
limit may save more than it must: what is left is filled with the best single exchanges that still fit, options inside
of the hull too. The result is at most one such step's value above the optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What it costs to take it (value), and what it takes of the limit (weight)."""

    value: float
    weight: float


def choose(items: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """The index of an option for every item; None where even the lightest options are above the limit."""
    for chosen in path(items):
        if _weight(items, chosen) <= limit:
            _fill(items, chosen, limit)
            return chosen
    return None


def path(items: Sequence[Sequence[Option]]) -> Iterator[list[int]]:
    """Every choice that is best for some price of the weight: from the least value to the least weight."""
    hulls = [hull(options) for options in items]
    chosen = [found[0] for found in hulls]
    steps = sorted(
        (_price(items[i][a], items[i][b]), i, place)
        for i, found in enumerate(hulls)
        for place, (a, b) in enumerate(itertools.pairwise(found))
    )
    yield list(chosen)
    for _, i, place in steps:
        chosen[i] = hulls[i][place + 1]
        yield list(chosen)


def hull(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull, from the least value (and of those the lightest) to the lightest."""
    order = sorted(range(len(options)), key=lambda k: (options[k].value, options[k].weight))
    found: list[int] = []
    for k in order:
        if found and options[k].weight >= options[found[-1]].weight:
            continue  # dominated
        while len(found) > 1 and _price(options[found[-2]], options[found[-1]]) >= _price(
            options[found[-1]], options[k]
        ):
            found.pop()
        found.append(k)
    return found


def _price(now: Option, then: Option) -> float:
    """Value given up for each unit of weight that is saved."""
    return (then.value - now.value) / (now.weight - then.weight)


def _weight(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[k].weight for options, k in zip(items, chosen, strict=True))


def _fill(items: Sequence[Sequence[Option]], chosen: list[int], limit: float) -> None:
    """The exchange of one item's option that lowers the value most within the limit, until there is none."""
    while True:
        spare = limit - _weight(items, chosen)
        best = (0.0, -1, -1)
        for i, options in enumerate(items):
            now = options[chosen[i]]
            for k, option in enumerate(options):
                gain = now.value - option.value
                if gain > best[0] and option.weight - now.weight <= spare:
                    best = (gain, i, k)
        if best[1] < 0:
            return
        before = chosen[best[1]]
        chosen[best[1]] = best[2]
        if _weight(items, chosen) > limit:  # rounding: the sum says otherwise than the difference
            chosen[best[1]] = before
            return
