"""Counters: a parameter of zeros beside every stack of experts, whose gradient is how many rows each expert got.

Autograd adds them up over micro-batches, whatever is compiled or checkpointed, as it does for the probes of
insert_hessian_hooks.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import masked_nodes, masked_operands

PLACE = 8  # of the counter among the operator's arguments, the last one


def counter_name(fqn: str) -> str:
    """Name of the counter that belongs to a stack."""
    return f"{fqn}_routed_tokens"


def insert_expert_counters(program: Program) -> PassResult:
    """Give every masked product of a whole stack a counter [experts], one per weight. It takes the memory of one
    element, and must not be written to. Products of single matrices of a stack, which get all tokens, are left alone,
    and those that have a counter.
    """
    names = program.names(InputKind.PARAMETER)
    counters: dict[Node, Node] = {}
    products = [n for n in masked_nodes(program) if n.target == EXPERTS_OP and len(n.args) == PLACE]
    for node in products:
        weight = masked_operands(node).weight
        if weight not in counters:
            value = program.tensor(names[weight])
            counters[weight] = program.add_parameter(counter_name(names[weight]), zeros(value, len(value)))
        node.args = (*node.args, counters[weight])
    return PassResult(program, len(products))


def counters_of(module: nn.Module, fqns: Iterable[str]) -> dict[str, nn.Parameter]:
    """The counters in a module, by the weight's name."""
    found = dict(module.named_parameters())
    return {fqn: found[name] for fqn in fqns if (name := counter_name(fqn)) in found}


def zeros(like: Tensor, count: int) -> Tensor:
    """So many of them, in the memory of one, where ``like`` is."""
    return torch.zeros((), device=like.device).expand(count)
