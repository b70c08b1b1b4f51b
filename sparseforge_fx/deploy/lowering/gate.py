"""Which sites of a graph are packed, and in which layout: asked by the pass that packs them, of the merged graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.kernels.layouts import Layout
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.find_routing import Routing


class Gate:
    """Gives each site the layout that gains most at these token counts, or the reason to stay dense.

    Args:
        layouts: what the device has.
        measure: shapes -> times, measured or known; None: nothing is timed, and all get the first layout.
        routings: of the stacks of experts, by the weight's name.

    Attributes:
        sites: those that it was asked about.
        timings: what decided.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        tokens: Sequence[int],
        measure: Callable[[Sequence[cost_table.Shape]], cost_table.Table] | None,
        routings: Mapping[str, Routing | None] = MappingProxyType({}),
    ):
        self.layouts, self.tokens, self.measure, self.routings = layouts, tokens, measure, routings
        self.sites: list[LinearSite] = []
        self.timings: cost_table.Table = {}

    def __call__(self, sites: Sequence[LinearSite]) -> dict[str, Layout]:
        self.sites = list(sites)
        if self.measure is None:
            return {site.fqn: self.layouts[0] for site in eligible(sites)}
        shapes = {s.fqn: self._shape(s) for s in eligible(sites)}
        self.timings = self.measure(list(shapes.values()))
        chosen = {}
        for site in eligible(sites):
            layout, against = cost.choose(self.timings, shapes[site.fqn], self.layouts, self.tokens)
            if layout is None:
                site.reason = f"gate: {against}"
            else:
                chosen[site.fqn] = layout
        return chosen

    def _shape(self, site: LinearSite) -> cost_table.Shape:
        routing = None if site.experts is None else self.routings[site.fqn]
        return cost_table.Shape.of(site.out_features, site.in_features, site.dtype, routing=routing)
