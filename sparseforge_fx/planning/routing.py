"""How many of its experts multiply a token, as the graph has it."""

from __future__ import annotations

import statistics
from typing import Any

from torch.fx import Node

from sparseforge_fx.deploy.lowering.cost_table import Routing
from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.passes.operators import LINEAR_OPS
from sparseforge_fx.passes.uses import stack_operands
from sparseforge_fx.training.forecast import numel


def find_routing(program: Program, site: LinearSite) -> Routing | None:
    """Of a stack of experts: the rows that its products have of the graph's example for each row of a usual linear.
    None of a matrix."""
    if site.experts is None:
        return None
    nodes = {node.name: node for node in program.graph.nodes}
    linears = [n for n in program.graph.nodes if n.target in LINEAR_OPS and _is_matrix(n.args[LINEAR_OPS[n.target][1]])]
    tokens = statistics.mode(map(_rows, linears)) if linears else 1
    if site.uses[0].expert is None:
        found = stack_operands(nodes[site.uses[0].node])
        assert found is not None
        rows = _rows(found.x)
    else:  # the graph multiplies by one after the other
        rows = sum(_rows(nodes[use.node]) for use in site.uses)
    return Routing(site.experts, min(site.experts, max(1, round(rows / tokens))))


def _is_matrix(node: Any) -> bool:
    return isinstance(node, Node) and node.meta["val"].dim() == 2


def _rows(node: Node) -> int:
    value = node.meta["val"]
    return numel(value) // int(value.shape[-1])
