"""What the analysis and the rewriting passes know about operators."""

from __future__ import annotations

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
#: operators, by name, that move, copy or cast their first argument and compute nothing
MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T", "mT", "slice",
    "select", "index", "squeeze", "unsqueeze", "expand", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    "to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach",
}  # fmt: skip


def op_name(node: Node) -> str:
    """The operator without its overload: ``linear`` of ``aten.linear.default``."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
