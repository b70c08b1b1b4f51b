"""Analysis: how many of its experts multiply a token, as the graph has it. Changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.sizes import rows
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.passes.operators import LINEAR_OPS
from sparseforge_fx.passes.uses import source_of, stack_operands


class Routing(NamedTuple):
    """Of a stack of experts: how many there are, and how many of them multiply each token."""

    experts: int
    chosen: int


def find_routing(program: Program, site: LinearSite) -> Routing | None:
    """Of a stack of experts: the rows that its products have of the graph's example for each row of the linear before
    them (the router, or what shares its tokens; a model may have others for its pictures). None of a matrix."""
    if site.experts is None:
        return None
    nodes = {node.name: node for node in program.graph.nodes}
    first = nodes[site.uses[0].node]
    if site.uses[0].expert is None:
        found = stack_operands(first)
        assert found is not None
        multiplied = rows(found.x)
    else:  # the graph multiplies by one after the other
        multiplied = sum(rows(nodes[use.node]) for use in site.uses)
    return Routing(site.experts, min(site.experts, max(1, round(multiplied / _tokens(program, first)))))


def _tokens(program: Program, product: Node) -> int:
    """Rows of the last linear before a product, or of the first one behind it; 1 where there are none."""
    nodes = list(program.graph.nodes)
    at = nodes.index(product)
    return next((rows(node) for node in (*reversed(nodes[:at]), *nodes[at:]) if _is_linear(node)), 1)


def _is_linear(node: Node) -> bool:
    """Does it multiply by a matrix that is none of a stack's?"""
    if node.target == OP:
        return True
    weight = node.args[LINEAR_OPS[node.target][1]] if node.target in LINEAR_OPS else None  # type: ignore[index]
    value = source_of(weight).meta.get("val") if isinstance(weight, Node) else None
    return isinstance(value, Tensor) and value.dim() == 2
