"""How many tokens each expert of a mixture gets in the steps that estimate curvature, over micro-batches and processes:
what the counters in the graph hear (passes/insert_expert_counters.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from sparseforge_fx.methods.curvature import Curvature, processes
from sparseforge_fx.passes.insert_expert_counters import zeros


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
            p.data = zeros(p, len(p))
