"""aten.linear / addmm / mm / matmul of a site  ->  sparseforge::soft_masked_linear, with one mask buffer per weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.find_linears import LINEAR_OPS, SAME, SWAPS, LinearSite, LinearUse, eligible
from sparseforge_fx.program import Program

aten = torch.ops.aten


def mask_name(fqn: str) -> str:
    """Name of the mask buffer that belongs to a weight (as torch.nn.utils.prune names it)."""
    return f"{fqn}_mask"


def insert_soft_masks(program: Program, sites: Sequence[LinearSite]) -> PassResult:
    """Rewrite every node of every eligible site; the masks start at one, so that the program computes what it computed.

    A weight with several names or users gets one mask under its first name. Sites that are masked already are left alone.
    """
    placeholders = {fqn: node for node, fqn, _ in program.lifted(InputKind.PARAMETER)}
    nodes = {node.name: node for node in program.graph.nodes}
    modified = 0
    for site in eligible(sites):
        name = mask_name(site.fqn)
        if name in program.state:
            continue
        weight = program.tensor(site.fqn)
        mask = program.add_buffer(name, torch.ones_like(weight, requires_grad=False))
        for use in site.uses:
            _rewrite(program, nodes[use.node], use, placeholders[site.fqn], mask)
            modified += 1
        for fqn in (site.fqn, *site.ties):
            _drop_dead_transposes(program, placeholders[fqn])
    return PassResult(program, modified)


def _rewrite(program: Program, node: Node, use: LinearUse, weight: Node, mask: Node) -> None:
    assert callable(node.target)
    x_arg, w_arg, _ = LINEAR_OPS[node.target]
    x = node.args[w_arg if use.left else x_arg]
    bias = None
    if node.target == aten.linear.default and len(node.args) > 2:
        bias = node.args[2]
    elif node.target == aten.addmm.default:
        bias = node.args[0]
    graph = program.graph
    with graph.inserting_before(node):
        flip = use.left and x.meta["val"].dim() == 2  # type: ignore[union-attr]  # W @ x = (x^T W^T)^T
        if flip:
            x = _call(graph, aten.t.default, x)
        new = _call(graph, OP, x, weight, mask, bias, None, use.swapped, like=None if flip else node)
        if flip:
            new = _call(graph, aten.t.default, new, like=node)
    program.replace(node, new)


def _drop_dead_transposes(program: Program, weight: Node) -> None:
    for user in list(weight.users):
        if user.target in SWAPS | SAME or user.target in (aten.transpose.int, aten.permute.default):
            _drop_dead_transposes(program, user)
            if not user.users:
                program.graph.erase_node(user)


def _call(graph: torch.fx.Graph, target, *args, like: Node | None = None) -> Node:
    node = graph.call_function(target, args)
    if like is not None:
        node.meta["val"] = like.meta["val"]
    else:
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        node.meta["val"] = target(*values)
    return node
