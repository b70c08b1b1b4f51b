"""A weight in few bits, so that the layer's outputs stay: integers times scales, with the mask as it is.

The error of a layer is tr((Q - W) H (Q - W)^T), H = X^T X of its inputs (GPTQ, arXiv 2210.17323, eq. 1). GPTQ's sweep
rounds every column once and passes its error on to the right; the coordinate descent here (as in CDQuant, arXiv
2406.17542) comes back to each as often as it pays, and scales move, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import CODES, Format, parse_format
from sparseforge_fx.methods.refit import refit
from sparseforge_fx.scales import scale_values, scales_like, stored_scales

#: what the scale search tries, as shares of the scale at which the largest |w| has the last code above zero; 7/8 of it
#: is that at which it has the last of int4 below
SHARES = [1 - k / 40 for k in range(21)]
#: share of the mean diagonal that is added to the diagonal. GPTQ's 0.01 gives smaller errors on the calibration
#: inputs, and larger ones in the model: codes wander along directions that these few inputs hardly have
DAMPING = 0.1
SWEEPS = 3
BLOCK = 64  # columns between two updates of the rest


#: what survivors may be kept in, apart from their pattern; int4 has a scale for every 32 inputs
Values = Literal["float", "int8", "int4", "int4/128", "int4/16"]


class Rounded(NamedTuple):
    """The weight ``codes * scales``.

    Attributes:
        codes: int8 [out, in], in [-127, 127] or [-8, 7], or of the format's levels.
        scales: as they are kept: see ``scales.py``.
    """

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """Float32 [out, in]."""
        return self.codes * spread(self.scales, self.codes.shape[1])


def stacked(each: Sequence[Rounded]) -> Rounded:
    """Of a stack of experts: [experts, out, in]."""
    return Rounded(torch.stack([r.codes for r in each]), torch.stack([r.scales for r in each]))


def spread(scales: Tensor, width: int) -> Tensor:
    """Scales, as they are kept, as float32 [out, width]: one for each place."""
    values = scale_values(scales)
    return values.repeat_interleave(width // values.shape[1], 1)


def format_of(values: str) -> Format:
    """The format of values alone.

    Raises SparseForgeError unless they are of :data:`Values`.
    """
    if values not in get_args(Values):
        raise SparseForgeError(f"unknown values {values!r}; choose one of {', '.join(get_args(Values))}")
    return Format() if values == "float" else parse_format(values)


def why_not_rounded(experts: int | None, width: int, format: Format) -> str | None:
    """Why a matrix, or a stack of so many experts, cannot be put on the format's grid; None if it can."""
    return "experts stay floats" if experts is not None and format.is_quantized else format.why_not(width)


_HALVES = 128  # half steps from zero to beyond every level


@cache
def _nearest_by_halves(levels: tuple[int, ...]) -> Tensor:
    """The level nearest to what lies in each half step from -64 on: half-way between two integers no half step ends
    elsewhere. (To search among the levels takes ten times as long.)"""
    middles = torch.arange(-_HALVES, _HALVES) / 2 + 0.25
    return torch.tensor(levels)[(middles[:, None] - torch.tensor(levels)).abs().argmin(1)]


class Grid:
    """The numbers that a weight divided by its scale may be, ``least`` to ``largest``."""

    def __init__(self, format: Format):
        self._levels = format.levels
        numbers = self._levels or CODES[format.values]
        self.least, self.largest = numbers[0], numbers[-1]

    def nearest(self, ratio: Tensor) -> Tensor:
        """The nearest to each; ``ratio`` may be written to."""
        if self._levels is None:
            return ratio.round_().clamp_(self.least, self.largest)
        place = ratio.mul_(2).floor_().clamp_(-_HALVES, _HALVES - 1).nan_to_num_().to(torch.int32).add_(_HALVES)
        table = _nearest_by_halves(self._levels).to(ratio.device, ratio.dtype)
        return table.index_select(0, place.flatten()).view(ratio.shape)

    def halfway(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """How far it is from those found half the way to the one below, and to the one above; at both ends as on the
        other side."""
        if self._levels is None:
            half = torch.full_like(found, 0.5)
            return half, half
        levels = torch.tensor(self._levels, dtype=found.dtype, device=found.device)
        half, place = levels.diff() / 2, torch.searchsorted(levels, found.contiguous())
        return half[(place - 1).clamp(min=0)], half[place.clamp(max=len(half) - 1)]


@torch.no_grad()
def round_weight(weight: Tensor, format: Format, moments: Tensor | None = None, mask: Tensor | None = None) -> Rounded:
    """The codes and scales nearest to ``weight``, in the layer's outputs or, without inputs, in itself.

    Scales are searched with each place weighted by its input's energy: to the plain squared error the few inputs that
    are far larger than the rest are places like all others. Coordinate descent follows: each survivor in turn takes the
    code that is best given all others, and after each sweep every scale its best value given the codes.

    Args:
        weight: [out, in], any float dtype.
        format: a quantised one, that the weight's width fits.
        moments: [in, in], X^T X of the layer's inputs (any positive scale). None: the nearest codes.
        mask: [out, in], the places whose codes may differ from zero; None: those where ``weight`` does.

    Raises SparseForgeError if the weight, or the moments, are not finite, or the width does not fit.
    """
    if (against := format.why_not(weight.shape[1])) is not None:
        raise SparseForgeError(f"{format}: {against}")
    w = weight.detach().float()
    kept = (w != 0 if mask is None else mask).to(torch.float32)
    w = w * kept
    h = None if moments is None else _damped(moments.float())
    if not (torch.isfinite(w).all() and (h is None or torch.isfinite(h).all())):
        raise SparseForgeError(
            "a weight or its calibration inputs are not finite; check the model's weights and the data"
        )
    grid = Grid(format)
    # the undamped energies: an input that is never active has no say in a scale, if any other has
    energies = torch.ones_like(w[0]) if moments is None else moments.diagonal().float().clamp(min=0)
    # who knows no inputs cannot tell what may be cut off
    shares = SHARES if moments is not None else [1.0, -grid.largest / grid.least]
    scales = stored_scales(_find_scales(w, energies, format.group or w.shape[1], grid, shares), format)
    codes = grid.nearest(w / spread(scales, w.shape[1]))
    if h is not None:
        target = w @ h
        for _ in range(SWEEPS):
            _move_codes(codes, spread(scales, w.shape[1]), target, h, kept, grid)
            scales = stored_scales(_move_scales(codes, scale_values(scales), target, h), format)
        _move_codes(codes, spread(scales, w.shape[1]), target, h, kept, grid)
    return Rounded(codes.to(torch.int8), scales)


@torch.no_grad()
def follow(weight: Tensor, moments: Tensor, cross: Tensor) -> Tensor:
    """The weight on the same places whose answers to inputs X are nearest to those of ``weight`` to inputs Z.

    X has the errors of the rounded layers before; what this layer can take back of them, it does (the asymmetric
    calibration of GPTAQ, arXiv 2504.02692, here by least squares on the survivors).

    Args:
        weight: [out, in]
        moments, cross: [in, in], X^T X and Z^T X.
    """
    w, h = weight.detach().float(), moments.float()
    damped = _damped(h)
    pull = w @ (cross.float() - h)
    aim = w + torch.linalg.solve(damped, pull.t()).t()
    return refit(aim, h, w != 0, w, damping=DAMPING)


def codes_of(weight: Tensor, scales: Tensor, format: Format) -> Rounded:
    """The nearest codes on scales that are known, as they are kept or in another floating dtype."""
    dtype, _ = scales_like(format, weight.shape[1])
    scales = scales.to(dtype) if scales.is_floating_point() and dtype.is_floating_point else scales
    codes = Grid(format).nearest(weight.detach().float() / spread(scales, weight.shape[1]))
    return Rounded(codes.to(torch.int8), scales)


def _damped(moments: Tensor) -> Tensor:
    mean = moments.diagonal().mean()
    h = moments.clone()
    h.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)  # without any input the weight itself is what is kept
    return h


def _find_scales(weight: Tensor, energies: Tensor, group: int, grid: Grid, shares: Sequence[float]) -> Tensor:
    """[out, groups]: of a few tried, those with the least squared error, each place weighted."""
    parts, energies = weight.unflatten(1, (-1, group)), energies.view(-1, group)
    energies = torch.where(energies.sum(1, keepdim=True) > 0, energies, 1.0)
    peak = parts.abs().amax(2, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny * grid.largest * 2)
    best = widest = peak / grid.largest
    least = torch.full_like(peak, float("inf"))
    for factor in (side * share for side in ((1, -1) if grid.largest != -grid.least else (1,)) for share in shares):
        scale = widest * factor
        error = ((grid.nearest(parts / scale) * scale - parts).square_() * energies).sum(2, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(2)


def _move_codes(codes: Tensor, scale: Tensor, target: Tensor, h: Tensor, kept: Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent over the columns, in place; no step raises the error."""
    gradient = (codes * scale) @ h - target
    for start in range(0, len(h), BLOCK):
        here = slice(start, start + BLOCK)
        block = h[here, here]
        # contiguous [columns, out] copies: the sweep walks columns
        slope, part, steps, free = (t[:, here].t().contiguous() for t in (gradient, codes, scale, kept))
        moved = torch.empty_like(slope)
        for j in range(len(block)):
            best = grid.nearest((part[j] * steps[j] - slope[j] / block[j, j]) / steps[j]) * free[j]
            torch.mul(best - part[j], steps[j], out=moved[j])
            slope[j + 1 :].addr_(block[j, j + 1 :], moved[j])
            part[j] = best
        codes[:, here] = part.t()
        gradient[:, start + BLOCK :] += moved.t() @ h[here, start + BLOCK :]


def _move_scales(codes: Tensor, scales: Tensor, target: Tensor, h: Tensor) -> Tensor:
    """Each group's best scale given the codes and the groups before it; at most 30 % from where it was."""
    width, scales = len(h) // scales.shape[1], scales.clone()
    gradient = (codes * spread(scales, len(h))) @ h - target
    for index in range(scales.shape[1]):
        here = slice(index * width, (index + 1) * width)
        part = codes[:, here]
        curve = ((part @ h[here, here]) * part).sum(1)
        step = torch.where(curve > 0, -(gradient[:, here] * part).sum(1) / curve.clamp(min=1e-30), 0.0)
        most = 0.3 * scales[:, index].abs()
        step = torch.maximum(torch.minimum(step, most), -most)
        scales[:, index] += step
        gradient += (step[:, None] * part) @ h[here]
    return scales
