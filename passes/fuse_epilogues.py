"""An activation that alone reads a sparse linear moves into it; so does silu(gate) * up on a merged gate and up."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node, symbolic_trace
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import sparse_use

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)


def fuse_epilogues(program: Program) -> PassResult:
    """relu, gelu (both forms, and the tanh form written out) and silu after ``sparse_linear``, also behind a view of
    its output; silu(first half) * second half of a split in two.

    A bias is in the operator already. Values that something else reads are left alone.
    """
    written_out = _written_gelus(program.graph)
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        read = _past_views(node)
        if use.activation != "none" or not read.users:
            continue
        name, last = _activation(read, written_out)
        if name is None and (product := _gated(node)) is not None:
            name, last = "silu_mul", product
        if name is None:
            continue
        whole = read is node
        value = (last if whole else node).meta["val"]
        fused = program.insert_before(node, OP, *use._replace(activation=name), value=value)
        program.replace(last, fused if whole else read)
        if not whole:
            program.replace(node, fused)
        program.graph.eliminate_dead_code()
        modified += 1
    return PassResult(program, modified)


def _past_views(node: Node) -> Node:
    """The last of the views that alone read the value, one after the other: an activation commutes with them."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in VIEWS:
        node = user
    return node


def _activation(node: Node, written_out: dict[Node, Node]) -> tuple[str | None, Node]:
    """The activation that alone reads this value, and the node of its result."""
    if node in written_out:
        return "gelu_tanh", written_out[node]
    user = next(iter(node.users))
    if len(node.users) > 1:
        return None, user
    if user.target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(user.kwargs.get("approximate", "none"))), user
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(user.target), user  # type: ignore[call-overload]


def _gelu(y: Tensor) -> Tensor:
    """As transformers writes it for GPT-2 and others ("gelu_new")."""
    inner = aten.add.Tensor(y, aten.mul.Tensor(aten.pow.Tensor_Scalar(y, 3.0), 0.044715))
    factor = aten.add.Tensor(aten.tanh.default(aten.mul.Tensor(inner, math.sqrt(2 / math.pi))), 1.0)
    return aten.mul.Tensor(aten.mul.Tensor(y, 0.5), factor)


def _written_gelus(graph: Graph) -> dict[Node, Node]:
    """Argument -> result of every such gelu that alone reads its argument."""
    found = {}
    for match in SubgraphMatcher(symbolic_trace(_gelu).graph).match(graph):
        (argument,), (result,) = match.placeholder_nodes, match.returning_nodes
        if set(argument.users) <= set(match.nodes_map.values()):
            found[argument] = result
    return found


def _gated(linear: Node) -> Node | None:
    """The multiplication in mul(silu(first half), second half), if only that reads this value, split in two halves."""
    split = next(iter(linear.users))
    if len(linear.users) > 1 or split.target != aten.split_with_sizes.default:
        return None
    if len(split.args[1]) != 2 or len(set(split.args[1])) != 1:  # type: ignore[arg-type]
        return None
    halves = {n.args[1]: n for n in split.users if n.target is operator.getitem}
    if len(split.users) != 2 or set(halves) != {0, 1} or any(len(h.users) != 1 for h in halves.values()):
        return None
    silu, product = next(iter(halves[0].users)), next(iter(halves[1].users))
    if silu.target != aten.silu.default or product.target != aten.mul.Tensor or set(silu.users) != {product}:
        return None
    return product if set(product.args) == {silu, halves[1]} else None
