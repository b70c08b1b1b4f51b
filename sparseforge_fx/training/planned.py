"""Which linears a plan makes sparse, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes import LinearSite, find_linears
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern
from sparseforge_fx.plans import planned_formats


def planned_sites(program: Program, plan: Any, pattern: AnyPattern) -> tuple[list[LinearSite], list[str]]:
    """The linears of ``program``, those being sites whose format in the plan is sparse, and notes for the report.

    Args:
        plan: as :func:`planned_formats` takes it.

    Raises SparseForgeError if it is of another machine or model, makes a weight sparse that cannot be, or nothing
    sparse.
    """
    everything = find_linears(program, pattern)
    shapes = {n: s.sides for s in everything for n in (s.fqn, *s.ties) if len(s.shape) in (2, 3)}
    formats = planned_formats(plan, shapes)
    sparse = sorted(name for name, form in formats.items() if form.is_sparse)
    if not sparse:
        raise SparseForgeError(
            "the plan makes no weight sparse: there is nothing for a sparse method to do; what it keeps in few bits, "
            "sf.quantize(model, plan=plan) applies"
        )
    if pattern != TWO_FOUR:
        raise SparseForgeError(f"the plan makes weights 2:4 and the pattern is {pattern}: leave out the pattern")
    sites = find_linears(program, pattern, include=sparse)
    _check(formats, {name: s for s in sites for name in (s.fqn, *s.ties)})
    for site in sites:
        form = next((formats[n] for n in (site.fqn, *site.ties) if n in formats), None)
        if form is not None and not form.is_sparse:
            site.reason = f"plan: {form}"
        elif form is None and site.reason == "not among the included names":
            site.reason = "not in the plan"
    quantized = sum(form.is_quantized for form in formats.values())
    told = (
        f"the plan keeps {quantized} weights in few bits, and their values are floats still: "
        "sf.quantize(model, plan=plan, data=data) rounds them"
    )
    return sites, [told] if quantized else []


def _check(formats: Mapping[str, Format], sites: Mapping[str, LinearSite]) -> None:
    """Raise a SparseForgeError if the plan makes sparse what cannot be."""
    for name, form in formats.items():
        if form.is_sparse and (reason := sites[name].reason) is not None:
            raise SparseForgeError(f"the plan makes {name} {form}, which it cannot be: {reason}")
