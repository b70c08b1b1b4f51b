"""What passes that replace a linear by another operator share: its operands in any orientation, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.operators import LINEAR_OPS, MOVES, op_name
from sparseforge_fx.passes.uses import LinearUse, source_of, stack_operands

aten = torch.ops.aten

#: (input [..., in], bias or None) -> arguments of the operator that computes [..., out]
Arguments = Callable[[Node, Any], tuple]


class SparseUse(NamedTuple):
    """The arguments of one ``sparse_linear`` in a graph."""

    x: Node
    values: Node
    meta: Node
    layout: str
    in_features: int
    bias: Node | None
    activation: str
    scales: Node | None

    @property
    def rows(self) -> list[Node]:
        """The tensors that have a row for each output."""
        return [t for t in (self.values, self.meta, self.bias, self.scales) if t is not None]

    def with_rows(self, rows: Sequence[Node]) -> SparseUse:
        """The same with others in the place of these."""
        names = [name for name in ("values", "meta", "bias", "scales") if getattr(self, name) is not None]
        return self._replace(**dict(zip(names, rows, strict=True)))  # type: ignore[arg-type]


def sparse_use(node: Node) -> SparseUse:
    """A captured node leaves out last arguments that equal their defaults."""
    return SparseUse(*node.args, *(None, "none", None)[len(node.args) - 5 :])  # type: ignore[arg-type]


class StackUse(NamedTuple):
    """The arguments of one ``sparse_experts`` in a graph."""

    x: Node
    values: Node
    meta: Node
    layout: str
    in_features: int
    offsets: Node | None
    bias: Node | None
    scales: Node | None


def stack_use(node: Node) -> StackUse:
    """As :func:`sparse_use`."""
    return StackUse(*node.args, *(None, None)[len(node.args) - 6 :])  # type: ignore[arg-type]


class MaskedOperands(NamedTuple):
    """The placeholders that a masked operator reads, behind slices of a stack, and the weight's orientation."""

    weight: Node
    mask: Node
    probe: Node | None
    transposed: bool


def masked_nodes(program: Program) -> list[Node]:
    """The masked operators, in graph order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in (OP, EXPERTS_OP)]


def masked_operands(node: Node) -> MaskedOperands:
    """Of one of :func:`masked_nodes`."""
    probe, transposed = node.args[5:7] if node.target == EXPERTS_OP else node.args[4:6]
    weight, mask, probe = (None if n is None else source_of(n) for n in (node.args[1], node.args[2], probe))  # type: ignore[arg-type]
    assert weight is not None and mask is not None
    return MaskedOperands(weight, mask, probe, bool(transposed))


def rewrite_use(program: Program, use: LinearUse, target: Callable, arguments: Arguments) -> Node:
    """Put ``target`` in the place of one linear node, whatever its orientation; returns the new node."""
    node = program.node(use.node)
    assert callable(node.target)
    x_arg, w_arg, _ = LINEAR_OPS[node.target]
    x = node.args[w_arg if use.left else x_arg]
    bias = None
    if node.target == aten.linear.default and len(node.args) > 2:
        bias = node.args[2]
    elif node.target == aten.addmm.default:
        bias = node.args[0]
    insert = partial(program.insert_before, node)
    if use.left and x.meta["val"].dim() > 1:  # type: ignore[union-attr]  # W @ x = (x^T W^T)^T
        turned = insert(aten.transpose.int, x, -2, -1)
        new = insert(target, *arguments(turned, bias))
        last = insert(aten.transpose.int, new, -2, -1)
        last = insert(aten.contiguous.default, last)  # a view may follow, as it may follow W @ x
    else:
        new = last = insert(target, *arguments(x, bias), value=node.meta["val"])  # type: ignore[arg-type]
    program.replace(node, last)
    return new


def rewrite_stack_use(program: Program, use: LinearUse, target: Callable, *lifted: Node) -> Node:
    """Put ``target`` in the place of a node that multiplies by all matrices of a stack; its arguments are the input,
    the ``lifted`` tensors, offsets, bias, no probe, the orientation, and the name of the operator that was there."""
    node = program.node(use.node)
    found = stack_operands(node)
    assert found is not None
    arguments = (found.x, *lifted, found.offsets, found.bias, None, use.swapped, str(node.target))
    new = program.insert_before(node, target, *arguments, value=node.meta["val"])
    program.replace(node, new)
    return new


def drop_dead_moves(program: Program, weight: Node) -> None:
    """Erase the transposes of a weight that only replaced nodes read."""
    for user in list(weight.users):
        if op_name(user) in MOVES:
            drop_dead_moves(program, user)
            if not user.users:
                program.graph.erase_node(user)


def insert_traced(traced: GraphModule, like: Node, *inputs: Node) -> Node:
    """Copy the traced graph of a function in the place of its inputs before ``like``, whose meta its nodes get but for
    their values; returns the node of its result."""
    nodes = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with like.graph.inserting_before(like):
        for node in traced.graph.nodes:
            if node.op == "output":
                return nodes[node.args[0]]
            if node.op != "placeholder":
                nodes[node] = like.graph.node_copy(node, nodes.__getitem__)
                nodes[node].meta = {**like.meta, "val": node.meta["val"]}
    raise AssertionError("a graph has an output")
