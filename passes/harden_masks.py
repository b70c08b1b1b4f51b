"""Fold masks into exact N:M weights and give the graph its plain linears back."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.operators import operator_of
from sparseforge_fx.passes.rewrite import drop_dead_moves, masked_nodes, masked_operands
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, Unstructured, hard_mask

aten = torch.ops.aten


def harden_masks(program: Program, pattern: AnyPattern = TWO_FOUR) -> PassResult:
    """W <- W * top-N-of-M(mask) in place, -0.0 normalised; soft_masked_linear -> linear, or addmm/matmul if [in, out];
    soft_masked_experts -> the operator that it stands for.

    The weights are written in place, so that the source model's own Parameters hold the result. Each weight is folded
    once, whatever the number of its users; probes and masks leave the program. Hardening a hardened program changes
    nothing.
    """
    names = program.names(InputKind.PARAMETER, InputKind.BUFFER)
    nodes = masked_nodes(program)
    folded: set[Node] = set()
    spent: dict[Node, None] = {}  # masks and probes, in order
    for node in nodes:
        weight, mask, probe, transposed = masked_operands(node)
        if weight not in folded:
            folded.add(weight)
            value = program.tensor(names[weight])
            soft = program.tensor(names[mask])
            fold(value, soft, pattern, value.dim() - (2 if transposed else 1))
        spent |= dict.fromkeys(p for p in (mask, probe) if p is not None)
        program.replace(node, _dense_stack(program, node) if node.target == EXPERTS_OP else _dense(program, node))
    for placeholder in spent:
        drop_dead_moves(program, placeholder)
        program.drop(placeholder)
    return PassResult(program, len(nodes))


@torch.no_grad()
def fold(weight: Tensor, mask: Tensor, pattern: AnyPattern, dim: int) -> None:
    """Write a weight times its hard mask in place; groups run along ``dim``."""
    keep = hard_mask(mask, pattern, dim=dim)
    if isinstance(pattern, Unstructured):
        keep &= mask != 0  # a mask that keeps less than its share (Wanda rounds each row) is not filled up
    weight.copy_(torch.where(keep, weight, torch.zeros_like(weight)) + 0.0)  # + 0.0 turns -0.0 into 0.0


def _dense(program: Program, node: Node) -> Node:
    """The plain operator of a masked one, before it in the graph, with its value and module stack."""
    x, weight, _, bias, _, transposed, *_ = node.args
    insert, value = partial(program.insert_before, node), node.meta["val"]
    if not transposed:
        return insert(aten.linear.default, *((x, weight) if bias is None else (x, weight, bias)), value=value)
    if bias is None:
        return insert(aten.matmul.default, x, weight, value=value)
    if x.meta["val"].dim() == 2:  # type: ignore[union-attr]
        return insert(aten.addmm.default, bias, x, weight, value=value)
    return insert(aten.linear.default, x, insert(aten.t.default, weight), bias, value=value)


def _dense_stack(program: Program, node: Node) -> Node:
    """The operator that a masked one of a stack stands for."""
    x, weight, _, offsets, bias, _, transposed, plain = node.args
    insert = partial(program.insert_before, node)
    stack = weight if transposed else insert(aten.transpose.int, weight, -2, -1)
    operands = [operand for operand in (bias, x, stack, offsets) if operand is not None]
    return insert(operator_of(str(plain)), *operands, value=node.meta["val"])
