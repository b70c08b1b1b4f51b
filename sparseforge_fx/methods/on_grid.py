"""Weights that the graph sees in few bits while they train: rounded after every step, gradients straight through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparseforge_fx.formats import Format
from sparseforge_fx.methods.rounding import Grid, Rounded, codes_of, spread, why_not_rounded
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern
from sparseforge_fx.scales import scale_values, stored_scales

INSIDE = 0.98  # of the way to where the next code begins: so far from its own a master may begin


def fitting(
    weights: Sequence[MaskedWeight], form: Format, pattern: AnyPattern
) -> tuple[dict[str, Format], dict[str, str]]:
    """The format, by the names of the weights that can be kept in it; of the others, why not. Floats fit no weight.

    Args:
        form: of values. Where codes stand for levels, these are of the pattern that the weights will be packed in.
    """
    if not form.is_quantized:
        return {}, {}
    if form.levels is not None:
        if pattern != TWO_FOUR:
            text = f"not in {form.values}/{form.group}: it has levels for 2:4 and dense weights, not for {pattern}"
            return {}, {w.fqn: text for w in weights}
        form = form._replace(pattern=str(pattern))
    shapes = {w.fqn: w.oriented()[0].shape for w in weights}
    counts = {fqn: shape[0] if len(shape) == 3 else None for fqn, shape in shapes.items()}
    reasons = {fqn: why_not_rounded(counts[fqn], shape[-1], form) for fqn, shape in shapes.items()}
    against = {fqn: f"not in {form.values}: {reason}" for fqn, reason in reasons.items() if reason}
    return {fqn: form for fqn, reason in reasons.items() if reason is None}, against


class OnGrid:
    """The scales of weights, and their codes as they follow an optimizer.

    The gradient at a rounded weight is taken for that of its float32 master (straight-through; LSQ, arXiv 1902.08153).
    A master begins where the float was that its code stands for, as near as it can without another code: masters that
    began in the middle of their codes would move for half a width without any effect, which is longer than short runs
    are. Scales stay as the layer-wise rounding found them, unless a :class:`Learner` moves them.

    Attributes:
        formats: by name, of the weights that are on a grid; their widths must fit.
        scales: by name, as they are kept (``scales.py``).
    """

    def __init__(self, weights: Sequence[MaskedWeight], formats: Mapping[str, Format]):
        self.formats = dict(formats)
        self._of = {id(w.weight): w for w in weights}
        self.scales: dict[str, Tensor] = {}
        for w in weights:
            if (form := self.formats.get(w.fqn)) is not None:
                out, width = w.oriented()[0].shape
                ones = w.weight.new_ones(out, width // (form.group or width), dtype=torch.float32)
                self.scales[w.fqn] = stored_scales(ones, form)
        self._masters: dict[str, Tensor] = {}

    def takes(self, parameter: Tensor) -> bool:
        w = self._of.get(id(parameter))
        return w is not None and w.fqn in self.formats

    def start(self, fqn: str, aim: Tensor, found: Rounded) -> None:
        """Take what the layer-wise rounding made of the floats ``aim`` [out, in]."""
        self.scales[fqn].copy_(found.scales)
        scale, codes = spread(found.scales, aim.shape[1]), found.codes.float()
        below, above = Grid(self.formats[fqn]).halfway(codes)
        beside = torch.clamp(aim.float() / scale - codes, -INSIDE * below, INSIDE * above)
        self._masters[fqn] = (codes + beside) * scale

    def master(self, parameter: nn.Parameter) -> Tensor:
        """A float32 copy to train in the place of ``parameter``, which is told of once."""
        w = self._of[id(parameter)]
        found = self._masters.pop(w.fqn, None)
        if found is None:
            return parameter.detach().to(torch.float32, copy=True)
        return found.t().contiguous() if w.dim == 0 else found

    def rounded(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """What the graph is to see of ``master``: the nearest codes times their scales, or itself."""
        if not self.takes(parameter):
            return master
        w = self._of[id(parameter)]
        value = master.t() if w.dim == 0 else master
        found = codes_of(value, self.scales[w.fqn], self.formats[w.fqn]).weight
        return found.t() if w.dim == 0 else found

    def learner(self, parameter: Tensor) -> Learner:
        """The weight as a function of what can learn there."""
        w = self._of[id(parameter)]
        value, mask = w.oriented()
        return Learner(self._masters.get(w.fqn, value), mask, self.scales[w.fqn], self.formats[w.fqn], w.dim == 0)

    def learned(self, parameter: Tensor, found: Learner) -> Tensor:
        """Take what was learned; returns the rounded weight, in the parameter's orientation."""
        w = self._of[id(parameter)]
        self.scales[w.fqn].copy_(stored_scales(found.scales, self.formats[w.fqn]))
        rounded = codes_of(found.master.detach() * found.mask, self.scales[w.fqn], self.formats[w.fqn])
        self.start(w.fqn, found.master.detach() * found.mask, rounded)
        return rounded.weight.t() if w.dim == 0 else rounded.weight


class Learner:
    """One weight on a grid, whose codes and scales both learn (LSQ, arXiv 1902.08153, eq. 2 and 3): a code's width by
    the logarithm of its share of what it was, so that a rate means the same for all of them.

    Attributes:
        master: float32 [out, in], that codes follow.
        mask: [out, in]
    """

    def __init__(self, master: Tensor, mask: Tensor, scales: Tensor, form: Format, transposed: bool):
        self.master = master.detach().to(torch.float32, copy=True).requires_grad_()
        self.mask = mask.detach().float()
        self._first = scale_values(scales)
        self._growth = torch.zeros_like(self._first).requires_grad_()
        self._grid, self._transposed = Grid(form), transposed

    @property
    def leaves(self) -> list[Tensor]:
        return [self.master, self._growth]

    @property
    def scales(self) -> Tensor:
        """Float32 [out, groups]."""
        return self._first * self._growth.exp()

    def value(self) -> Tensor:
        """The rounded weight, in the parameter's orientation, differentiable straight through its codes."""
        width = spread(self.scales, self.master.shape[1])
        place = (self.master / width).clamp(self._grid.least, self._grid.largest)
        found = (place + (self._grid.nearest(place.detach().clone()) - place.detach())) * width * self.mask
        return found.t() if self._transposed else found
