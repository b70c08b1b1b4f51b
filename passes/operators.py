"""What the analysis and the rewriting passes know about operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

aten = torch.ops.aten

#: operator -> (argument of the input, argument of the weight, the weight is stored [in, out])
LINEAR_OPS = {
    aten.linear.default: (0, 1, False),
    aten.addmm.default: (1, 2, True),
    aten.mm.default: (0, 1, True),
    aten.matmul.default: (0, 1, True),
}
#: the same for stacks of matrices [experts, in, out]: (argument of the input, argument of the stack)
STACK_OPS = {
    "aten._grouped_mm.default": (0, 1),
    "transformers.grouped_mm_fallback.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.matmul.default": (0, 1),
    "aten.baddbmm.default": (1, 2),
}
#: operators, by name, that move, copy or cast their first argument and compute nothing
MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "mT", "slice",
    "select", "index", "squeeze", "unsqueeze", "expand", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    "to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach",
}  # fmt: skip


def op_name(node: Node) -> str:
    """The operator without its overload: ``linear`` of ``aten.linear.default``."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def operator_of(name: str) -> Callable:
    """The operator of that full name (``aten.bmm.default``), which is registered already."""
    namespace, function, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), function), overload)
