"""How many tokens each expert of a mixture gets in the steps that estimate curvature.

A counter stands beside every stack, as a probe does (passes/insert_hessian_hooks.py): a parameter of zeros whose
"gradient" is the number of each expert's rows, which autograd adds up over micro-batches, whatever is compiled or
checkpointed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.methods.curvature import Curvature, processes
from sparseforge_fx.passes import PassResult
from sparseforge_fx.passes.rewrite import masked_nodes, masked_operands


def counter_name(fqn: str) -> str:
    """Name of the counter that belongs to a stack."""
    return f"{fqn}_routed_tokens"


def insert_counters(program: Program) -> PassResult:
    """Give every masked product of a whole stack a counter [experts], one per weight. It takes the memory of one
    element, and must not be written to. Products of single matrices of a stack, which get all tokens, are left alone.
    """
    names = program.names(InputKind.PARAMETER)
    counters: dict[Node, Node] = {}
    products = [node for node in masked_nodes(program) if node.target == EXPERTS_OP]
    for node in products:
        weight = masked_operands(node).weight
        if weight not in counters:
            value = program.tensor(names[weight])
            counters[weight] = program.add_parameter(counter_name(names[weight]), _zeros(value, len(value)))
        node.args = (*node.args, counters[weight])
    return PassResult(program, len(products))


def counters_of(module: nn.Module, fqns: Iterable[str]) -> dict[str, nn.Parameter]:
    """The counters in a module, by the weight's name."""
    found = dict(module.named_parameters())
    return {fqn: found[name] for fqn in fqns if (name := counter_name(fqn)) in found}


class ExpertCounters:
    """Brings what counters hear to ``curvature.tokens``, which are of all processes; nothing where nothing is
    estimated."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], curvature: Curvature):
        self.parameters = {} if curvature.estimator is None else dict(parameters)
        self.curvature = curvature
        curvature.tokens = {fqn: [0] * len(p) for fqn, p in self.parameters.items()}

    @torch.no_grad()
    def complete(self) -> None:
        """The step's micro-batches are over."""
        if not self.parameters:
            return
        each = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        total = torch.cat(each).double()
        if processes() > 1:
            dist.all_reduce(total)
        counts = iter(total.long().tolist())  # a GPU is waited for once
        for fqn, before in self.curvature.tokens.items():
            self.curvature.tokens[fqn] = [seen + next(counts) for seen in before]
        self.forget()

    def forget(self) -> None:
        """Drop what was heard since the last step."""
        for p in self.parameters.values():
            p.grad = None

    def move(self) -> None:
        """Count in float32 and take the memory of one element again, after a change of device or dtype."""
        for p in self.parameters.values():
            p.data = _zeros(p, len(p))


def _zeros(like: Tensor, count: int) -> Tensor:
    return torch.zeros((), device=like.device).expand(count)
