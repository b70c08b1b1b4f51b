"""aten.linear / addmm / mm / matmul of a site -> sparseforge::soft_masked_linear, with one mask buffer per weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.find_linears import LINEAR_OPS, MOVES, LinearSite, LinearUse, _name, eligible
from sparseforge_fx.program import Program

aten = torch.ops.aten


def mask_name(fqn: str) -> str:
    """Name of the mask buffer that belongs to a weight (as torch.nn.utils.prune names it)."""
    return f"{fqn}_mask"


def insert_soft_masks(program: Program, sites: Sequence[LinearSite]) -> PassResult:
    """Rewrite every node of every eligible site; masks start at one, so that the program computes what it computed.

    A weight with several names or users gets one mask, under its first name. Sites that are masked already are left
    alone. ``sites`` must come from :func:`find_linears` on this program, or on the one that it is a copy of.
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
            _drop_dead_moves(program, placeholders[fqn])
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
    args = (weight, mask, bias, None, use.swapped)
    with program.graph.inserting_before(node):
        if use.left and x.meta["val"].dim() > 1:  # type: ignore[union-attr]  # W @ x = (x^T W^T)^T
            new = _call(node, aten.transpose.int, x, -2, -1)
            new = _call(node, OP, new, *args)
            new = _call(node, aten.transpose.int, new, -2, -1)
            new = _call(node, aten.contiguous.default, new)  # a view may follow, as it may follow W @ x
        else:
            new = program.graph.call_function(OP, (x, *args))
            new.meta["val"] = node.meta["val"]
    program.replace(node, new)


def _call(like: Node, target: Callable, *args: Any) -> Node:
    """A node with the module stack of ``like`` and the fake value of its own."""
    node = like.graph.call_function(target, args)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    node.meta = {**like.meta, "val": target(*values)}
    return node


def _drop_dead_moves(program: Program, weight: Node) -> None:
    """Erase the transposes that only the rewritten nodes read."""
    for user in list(weight.users):
        if _name(user) in MOVES:
            _drop_dead_moves(program, user)
            if not user.users:
                program.graph.erase_node(user)
