"""float32 copies of half-precision and rounded parameters for the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparseforge_fx.methods.on_grid import OnGrid
from sparseforge_fx.methods.part import local
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.training.low_rank import Branch


class MasterWeights:
    """float32 copies of half-precision parameters for the optimizer, and of those that are on a grid: an update of 1e-5
    vanishes in a bfloat16 weight."""

    def __init__(self, parameters: Iterable[nn.Parameter], on_grid: OnGrid | None = None):
        self.parameters, self.on_grid = list(parameters), on_grid
        self.masters = [self._master(p) for p in self.parameters]
        self._masks: dict[int, Tensor] = {}  # by the parameter that is written with them

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if self.on_grid is not None and self.on_grid.takes(parameter):
            return nn.Parameter(self.on_grid.master(parameter))
        half = parameter.dtype.itemsize < 4
        return nn.Parameter(parameter.detach().to(torch.float32, copy=True)) if half else parameter

    @torch.no_grad()
    def take_gradients(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is p:
                continue
            if p.grad is None or master.grad is None:
                master.grad = None if p.grad is None else p.grad.float()
            else:
                master.grad.copy_(p.grad)

    def drop_gradients(self) -> None:
        """Of the parameters and, but on a CPU, of the masters: there a step would wait for memory that is new to it, a
        tenth of its time, while other devices' allocators keep what was freed."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.grad = None
            if master.device.type != "cpu":
                master.grad = None

    def write_masked(self, masks: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """From now on parameters are written times these masks, which stay as they are."""
        self._masks = {id(p): mask for p, mask in masks}

    @torch.no_grad()
    def write_back(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is not p:
                p.copy_(master if self.on_grid is None else self.on_grid.rounded(p, master))
            if (mask := self._masks.get(id(p))) is not None:
                p.mul_(mask)

    def serve(self, weights: Iterable[MaskedWeight], branches: Iterable[Branch] = ()) -> None:
        """Let a method see and write the masters instead of the rounded weights."""
        pairs = zip(self.parameters, self.masters, strict=True)
        master_of = {id(local(p)): local(m) for p, m in pairs}
        for w in weights:
            w.weight = master_of.get(id(w.weight), w.weight)
        for b in branches:
            b.s = master_of.get(id(b.s), b.s)
