"""Fold masks into exact N:M weights and give the graph its plain linears back."""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind

from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.pattern import Pattern, hard_mask
from sparseforge_fx.program import Program

aten = torch.ops.aten


def harden_masks(program: Program, pattern: Pattern = Pattern(2, 4)) -> PassResult:
    """W <- W * top-N-of-M(mask) in place, -0.0 normalised; soft_masked_linear -> linear (or matmul/addmm if [in, out]).

    The weights are written in place, so that the source model's own Parameters hold the result. Each weight is folded
    once, whatever the number of its users; probes and masks leave the program. Hardening a hardened program changes
    nothing.
    """
    names = {node: fqn for node, fqn, _ in program.lifted(InputKind.PARAMETER, InputKind.BUFFER)}
    folded = set()
    lifted = set()
    nodes = program.graph.find_nodes(op="call_function", target=OP)
    for node in nodes:
        x, weight, mask, bias, probe, transposed = node.args
        if weight not in folded:
            folded.add(weight)
            value = program.tensor(names[weight])
            keep = hard_mask(program.tensor(names[mask]), pattern, dim=0 if transposed else 1)
            with torch.no_grad():
                value.copy_(torch.where(keep, value, torch.zeros_like(value)) + 0.0)  # + 0.0 turns -0.0 into 0.0
        lifted |= {p for p in (mask, probe) if p is not None}
        program.replace(node, _dense(program, node, x, weight, bias, transposed))
    for placeholder in lifted:
        program.drop(placeholder)
    return PassResult(program, len(nodes))


def _dense(program: Program, node, x, weight, bias, transposed):
    graph, val = program.graph, node.meta["val"]
    with graph.inserting_before(node):
        if not transposed:
            new = graph.call_function(aten.linear.default, (x, weight, bias) if bias is not None else (x, weight))
        elif bias is not None and x.meta["val"].dim() == 2:
            new = graph.call_function(aten.addmm.default, (bias, x, weight))
        else:
            new = graph.call_function(aten.matmul.default, (x, weight))
            if bias is not None:
                new.meta = dict(node.meta)
                new = graph.call_function(aten.add.Tensor, (new, bias))
    new.meta["val"] = val
    return new
