"""An activation that alone reads a sparse linear moves into it; so does silu(gate) * up on a merged gate and up."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import sparse_use
from sparseforge_fx.program import Program

aten = torch.ops.aten


def fuse_epilogues(program: Program) -> PassResult:
    """relu, gelu (both forms) and silu after ``sparse_linear``; silu(first half) * second half of a split in two.

    A bias is in the operator already. Values that something else reads are left alone.
    """
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        if use.activation != "none" or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        name = _activation(user)
        if name is None and (last := _gated(user)) is not None:
            user, name = last, "silu_mul"
        if name is None:
            continue
        with program.graph.inserting_before(user):
            fused = program.graph.call_function(OP, use._replace(activation=name))
        fused.meta = {**node.meta, "val": user.meta["val"]}
        program.replace(user, fused)
        program.graph.eliminate_dead_code()
        modified += 1
    return PassResult(program, modified)


def _activation(node: Node) -> str | None:
    if node.target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target)  # type: ignore[call-overload]


def _gated(split: Node) -> Node | None:
    """The multiplication in mul(silu(first half), second half), if only that reads this split in two halves."""
    if split.target != aten.split_with_sizes.default or len(split.args[1]) != 2 or len(set(split.args[1])) != 1:  # type: ignore[arg-type]
        return None
    halves = {n.args[1]: n for n in split.users if n.target is operator.getitem}
    if len(split.users) != 2 or set(halves) != {0, 1} or any(len(h.users) != 1 for h in halves.values()):
        return None
    silu, product = next(iter(halves[0].users)), next(iter(halves[1].users))
    if silu.target != aten.silu.default or product.target != aten.mul.Tensor or set(silu.users) != {product}:
        return None
    return product if set(product.args) == {silu, halves[1]} else None
