"""Symmetric integer grids for weights: zero is on the grid, so that quantising a sparse weight keeps its zeros."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError

SHRINK = torch.linspace(1.0, 0.6, 9)  # shares of the largest |w| that the scale search tries


class Grid(NamedTuple):
    """Signed integers of ``bits`` times one scale per output row and ``group`` consecutive inputs."""

    bits: int
    group: int = 128

    @property
    def largest(self) -> int:
        """Largest integer on the grid; its negative is the smallest."""
        return 2 ** (self.bits - 1) - 1

    def check(self) -> Grid:
        """Itself. Raises SparseForgeError where such a grid makes no sense."""
        if not 2 <= self.bits <= 8 or self.group < 1:
            raise SparseForgeError(f"cannot quantise to {self.bits} bits in groups of {self.group}: take 2 to 8 bits")
        return self


def find_scales(weight: Tensor, grid: Grid) -> Tensor:
    """The scale [out] that quantises ``weight`` [out, columns] with the least squared error, of a few tried."""
    peak = weight.abs().amax(1)
    best, least = torch.ones_like(peak), torch.full_like(peak, float("inf"))
    for shrink in SHRINK.tolist():
        scale = (peak * shrink / grid.largest).clamp(min=torch.finfo(torch.float32).tiny)
        error = (round_to_grid(weight, scale[:, None], grid) - weight).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def round_to_grid(values: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest grid points; zero stays exactly zero."""
    return (values / scale).round_().clamp_(-grid.largest, grid.largest) * scale
