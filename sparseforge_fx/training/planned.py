"""Which linears a plan makes sparse, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes import LinearSite, find_linears
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern
from sparseforge_fx.plans import Plan


def planned_sites(program: Program, plan: Any, pattern: AnyPattern) -> tuple[list[LinearSite], list[str]]:
    """The linears of ``program``, those being sites whose format in the plan is sparse, and notes for the report.

    Args:
        plan: a :class:`Plan`, the path of one, or formats by the weights' names.

    Raises SparseForgeError if it is of another machine or model, makes a weight sparse that cannot be, or nothing
    sparse.
    """
    if isinstance(plan, str):
        plan = Plan.read(plan)
    if isinstance(plan, Plan):
        plan.check_machine()
    formats = plan.formats if isinstance(plan, Plan) else _by_name(plan)
    sparse = sorted(name for name, form in formats.items() if form.is_sparse)
    if not sparse:
        raise SparseForgeError("the plan makes no weight sparse: there is nothing for a sparse method to do")
    if pattern != TWO_FOUR:
        raise SparseForgeError(f"the plan makes weights 2:4 and the pattern is {pattern}: leave out the pattern")
    sites = find_linears(program, pattern, include=sparse)
    _check(plan, formats, {name: s for s in sites for name in (s.fqn, *s.ties)})
    for site in sites:
        form = next((formats[n] for n in (site.fqn, *site.ties) if n in formats), None)
        if form is not None and not form.is_sparse:
            site.reason = f"plan: {form}"
        elif form is None and site.reason == "not among the included names":
            site.reason = "not in the plan"
    quantized = sum(form.is_quantized for form in formats.values())
    told = f"the plan keeps {quantized} weights in few bits: this run makes weights sparse and leaves their values as "
    return sites, [told + "floats"] if quantized else []


def _by_name(plan: Any) -> dict[str, Format]:
    if not isinstance(plan, Mapping):
        raise SparseForgeError(f"plan is {plan!r}: give a Plan, the path of one, or formats by the weights' names")
    return {name: parse_format(form) for name, form in plan.items()}


def _check(plan: Any, formats: Mapping[str, Format], sites: Mapping[str, LinearSite]) -> None:
    """Raise a SparseForgeError unless the plan is of this model."""
    shapes = {w.name: w.shape for w in plan.weights} if isinstance(plan, Plan) else {}
    for name, form in formats.items():
        site = sites.get(name)
        if site is None:
            raise SparseForgeError(f"the plan names {name}, which is no linear of the model: plan again for this model")
        here = (site.out_features, site.in_features)
        if shapes.get(name, here) != here:
            raise SparseForgeError(
                f"{name} is {shapes[name][0]} x {shapes[name][1]} in the plan and {here[0]} x {here[1]} in the model: "
                "plan again for this model"
            )
        if form.is_sparse and site.reason is not None:
            raise SparseForgeError(f"the plan makes {name} {form}, which it cannot be: {site.reason}")
