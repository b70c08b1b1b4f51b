"""A plan under another budget, from the prices of one: nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseforge_fx.decision import decide
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format
from sparseforge_fx.plans import Plan


def plan_again(
    made: Plan | str | Path,
    goal: dict[str, float],
    tokens: Sequence[int] | None,
    formats: Sequence[Format] | None,
    beside: Mapping[str, Any],
) -> Plan:
    """The formats that ``made``'s prices give for the goal.

    Args:
        tokens: of the plan's token counts those that speed is of; None: all.
        formats: of the plan's formats those that may be chosen, beside dense; None: all.
        beside: what else was given; nothing of it can be used.
    """
    if unused := [name for name, value in beside.items() if value is not None]:
        raise SparseForgeError(
            f"a plan is made again from its prices, nothing is measured or read: leave {', '.join(unused)} out"
        )
    if not isinstance(made, Plan | str | Path):
        raise SparseForgeError(f"expected a model or a plan, got {type(made).__name__}")
    if not isinstance(made, Plan) and Path(made).suffix != ".json":
        raise SparseForgeError(f"{made} is no plan (.json): to plan for a model, load it first, with sf.load")
    made = made if isinstance(made, Plan) else Plan.read(made)
    counts = made.tokens if tokens is None else tuple(tokens)
    if not counts:
        raise SparseForgeError("tokens is empty: give a list of token counts of the plan's")
    if unknown := [str(t) for t in counts if t not in made.tokens]:
        raise SparseForgeError(
            f"the plan has times at {', '.join(map(str, made.tokens))} tokens, not at {', '.join(unknown)}: plan the "
            "model again for these"
        )
    known = {form for w in made.weights for form in w.prices}
    if missing := [str(form) for form in formats or () if form not in known]:
        raise SparseForgeError(f"the plan has no prices of {', '.join(missing)}: plan the model again with them")
    allowed = known if formats is None else {DENSE, *formats}
    narrowed = [replace(w, prices={f: price for f, price in w.prices.items() if f in allowed}) for w in made.weights]
    chosen = decide(replace(made, weights=narrowed, goal=goal, tokens=counts)).formats
    weights = [replace(w, format=chosen[w.name]) for w in made.weights]  # which keep their prices for the next budget
    return replace(made, weights=weights, goal=goal, tokens=counts)
