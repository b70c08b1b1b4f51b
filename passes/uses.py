"""Who reads a weight, and how: the nodes that multiply by it, along which of its dimensions, and all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from sparseforge_fx.passes.operators import LINEAR_OPS, MOVES, STACK_OPS, op_name

aten = torch.ops.aten

#: operators that hand a weight on with its last two dimensions swapped, or as it is
SWAPS = {aten.t.default, aten.numpy_T.default, aten.mT.default}
SAME = {aten.alias.default, aten.detach.default}


@dataclass
class LinearUse:
    """One node that multiplies by the weight."""

    node: str
    swapped: bool  # [in, out] as this node sees the stored weight
    left: bool = False  # weight @ x instead of x @ weight
    expert: int | None = None  # of a stack, the matrix that this node reads; None: all of them, or no stack


class StackOperands(NamedTuple):
    """What a node reads that multiplies by all matrices of a stack.

    Attributes:
        x: [rows, in] with ``offsets``; [experts, rows, in] without.
        stack: [experts, in, out], as this node sees it.
        offsets: [experts], where the rows of each matrix end; None: each has as many.
        bias: added to the product.
    """

    x: Node
    stack: Node
    offsets: Node | None
    bias: Node | None


def find_uses(weight: Node) -> tuple[list[LinearUse], list[Node]]:
    """Linear uses of a placeholder, through transposes and slices of a stack, and the nodes that read it in any other
    way."""
    uses: list[LinearUse] = []
    others: list[Node] = []
    stack: list[tuple[Node, Node, bool, int | None]] = [(weight, user, False, None) for user in weight.users]
    while stack:
        value, node, swapped, expert = stack.pop(0)
        if node.target in SAME or _is_swap(node):
            flipped = swapped ^ (node.target not in SAME)
            stack += [(node, user, flipped, expert) for user in node.users]
        elif value.meta["val"].dim() == 3 and node.target == aten.select.int and node.args[1] == 0:
            index = int(node.args[2]) % value.meta["val"].shape[0]  # type: ignore[arg-type,call-overload]
            stack += [(node, user, swapped, index) for user in node.users]
        elif (use := _stack_use(value, node, swapped)) is not None:
            uses.append(use)
        elif (use := _linear_use(value, node, swapped)) is not None:
            use.expert = expert
            uses.append(use)
        else:
            others.append(node)
    return uses, others


def stack_operands(node: Node) -> StackOperands | None:
    """What the node reads if it multiplies rows by a stack of matrices; None if it does anything else."""
    if str(node.target) not in STACK_OPS:
        return None
    x_arg, w_arg = STACK_OPS[str(node.target)]
    grouped = "grouped_mm" in str(node.target)
    options = dict(zip(("offs", "bias", "out_dtype"), node.args[2:], strict=False)) | node.kwargs if grouped else {}
    if (options.pop("bias", None) or options.pop("out_dtype", None)) is not None or (node.kwargs and not grouped):
        return None
    offsets = options.pop("offs", None)
    x, w = node.args[x_arg], node.args[w_arg]
    if options or grouped != isinstance(offsets, Node) or not (isinstance(x, Node) and isinstance(w, Node)):
        return None
    if (x.meta["val"].dim(), w.meta["val"].dim()) != (2 if grouped else 3, 3):
        return None
    bias = node.args[0] if w_arg == 2 else None
    return StackOperands(x, w, offsets, bias)  # type: ignore[arg-type]


def _stack_use(value: Node, node: Node, swapped: bool) -> LinearUse | None:
    found = stack_operands(node)
    if found is None or found.stack is not value or value in (found.x, found.bias):
        return None
    if str(found.x.meta["val"].shape[0]) != str(value.meta["val"].shape[0]) and found.offsets is None:
        return None  # one matrix for all, broadcast
    return LinearUse(node.name, swapped=not swapped)


def _is_swap(node: Node) -> bool:
    value = node.args[0] if node.args else None
    if not (isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)):
        return False
    dims = value.meta["val"].dim()
    if dims not in (2, 3):
        return False
    if node.target == aten.transpose.int:
        return {d % dims for d in node.args[1:3]} == {dims - 2, dims - 1}  # type: ignore[operator]
    if node.target == aten.permute.default:
        return [d % dims for d in node.args[1]] == [*range(dims - 2), dims - 1, dims - 2]  # type: ignore[operator,union-attr]
    return node.target in SWAPS


def _linear_use(value: Node, node: Node, swapped: bool) -> LinearUse | None:
    if node.target not in LINEAR_OPS or node.kwargs:  # addmm(beta=, alpha=) is not a plain linear
        return None
    x_arg, w_arg, stored_in_out = LINEAR_OPS[node.target]
    x, w = node.args[x_arg], node.args[w_arg]
    if x is w or value.meta["val"].dim() != 2:
        return None
    if w is value:
        if node.target == aten.addmm.default and not _is_vector(node.args[0]):
            return None
        return LinearUse(node.name, swapped=stored_in_out ^ swapped)
    if x is value and node.target in (aten.mm.default, aten.matmul.default):
        return LinearUse(node.name, swapped=swapped, left=True)  # W @ x reduces along W's second dimension
    return None


def _is_vector(node: Any) -> bool:
    return isinstance(node, Node) and node.meta["val"].dim() == 1


def readers_of(node: Node, through: str = "") -> set[str]:
    """The operators that compute with what this node hands on, in full: through moves and casts."""
    if op_name(node) == "_assert_tensor_metadata":
        return set()
    if op_name(node) not in MOVES:
        return {("the program's output" if node.op == "output" else str(node.target)) + through}
    through = through or f" through {node.target}"
    return {name for user in node.users for name in readers_of(user, through)} or {str(node.target)}


def source_of(value: Node) -> Node:
    """The placeholder that a node hands on as a transpose or a slice of a stack; the node itself if it does not."""
    while value.op == "call_function" and op_name(value) in MOVES and isinstance(value.args[0], Node):
        value = value.args[0]
    return value
