"""scaled_dot_product_attention -> ``sparseforge::attention``, whose gradients come sooner, where a CPU trains in
bfloat16."""

from __future__ import annotations

import torch

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.attention import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import aten

ATTENTION = aten.scaled_dot_product_attention.default


def differentiate_attention(program: Program) -> PassResult:
    """Every attention in bfloat16 on a CPU, with the arguments that it has; values stay to the bit."""
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        value = node.meta["val"]
        if value.dtype == torch.bfloat16 and value.device.type == "cpu":
            node.target = OP
            modified += 1
    return PassResult(program, modified)
