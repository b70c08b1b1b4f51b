"""Weights that the graph sees in few bits while they train: rounded after every step, gradients straight through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparseforge_fx.formats import Format
from sparseforge_fx.methods.rounding import Rounded, codes_of, in_its_dtype, spread
from sparseforge_fx.methods.weights import MaskedWeight

INSIDE = 0.49  # of a code's width: so far from its middle a master may begin


class OnGrid:
    """The scales of weights, and what of them the graph sees: codes and scales follow the optimizer.

    The gradient at a rounded weight is taken for that of its float32 master (straight-through, as in LSQ, arXiv
    1902.08153). What a step of the masters of a group has in common (its part along their codes) moves their scale at
    once and needs no rate of its own; what it has not waits for codes to change. A master begins where the float was
    that its code stands for, as near as it can without another code: masters that began in the middle of their codes
    would move for half a width without any effect, which is longer than short runs are.

    Attributes:
        formats: by name, of the weights whose widths fit.
        scales: by name, float32: [out, 1] of int8, [out, in / group] of int4; see :meth:`stored`.
        against: of the other weights, why not.
    """

    def __init__(self, weights: Sequence[MaskedWeight], form: Format):
        self._of = {id(w.weight): w for w in weights}
        shapes = {w.fqn: (w.weight.t() if w.dim == 0 else w.weight).shape for w in weights}
        reasons = {fqn: form.why_not(width) for fqn, (_, width) in shapes.items()}
        self.against = {fqn: f"not in {form.values}: {reason}" for fqn, reason in reasons.items() if reason}
        self.formats = {fqn: form for fqn, reason in reasons.items() if reason is None}
        self.scales = {
            w.fqn: w.weight.new_ones(out, width // (form.group or width), dtype=torch.float32)
            for w in weights
            for out, width in (shapes[w.fqn],)
            if w.fqn in self.formats
        }
        self._masters: dict[str, Tensor] = {}

    def takes(self, parameter: nn.Parameter) -> bool:
        w = self._of.get(id(parameter))
        return w is not None and w.fqn in self.formats

    def start(self, fqn: str, aim: Tensor, found: Rounded) -> None:
        """Take what the layer-wise rounding made of the floats ``aim`` [out, in]."""
        self.scales[fqn].copy_(found.scales)
        room, middle = INSIDE * spread(found.scales, aim.shape[1]), found.weight
        self._masters[fqn] = middle + torch.clamp(aim.float() - middle, -room, room)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """A float32 copy to train in the place of ``parameter``, which is told of once."""
        w = self._of[id(parameter)]
        found = self._masters.pop(w.fqn, None)
        if found is None:
            return parameter.detach().to(torch.float32, copy=True)
        return found.t().contiguous() if w.dim == 0 else found

    def along(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """How far the masters of each group reach along the rounded survivors that ``parameter`` holds: 1 where as far
        as these themselves; [out, groups]."""
        w = self._of[id(parameter)]
        seen = parameter.detach() * w.mask
        groups = self.scales[w.fqn].shape[1]
        rounded, values = ((t.t() if w.dim == 0 else t).float().unflatten(1, (groups, -1)) for t in (seen, master))
        return (rounded * values).sum(2) / (rounded * rounded).sum(2).clamp(min=torch.finfo(torch.float32).tiny)

    def move_scales(self, parameter: nn.Parameter, by: Tensor) -> None:
        """Let scales grow by shares ``by`` [out, groups] of themselves; by a half at most in one step."""
        self.scales[self._of[id(parameter)].fqn].mul_(1 + by.clamp(-0.5, 0.5))

    def rounded(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """What the graph is to see of ``master``: the nearest codes times their scales."""
        w = self._of[id(parameter)]
        value = master.t() if w.dim == 0 else master
        found = codes_of(value, self.scales[w.fqn], self.formats[w.fqn]).weight
        return found.t() if w.dim == 0 else found

    def stored(self) -> dict[str, Tensor]:
        """The scales in the dtype that they are kept in: float16 of int4, float32 of int8."""
        return {fqn: in_its_dtype(scales, self.formats[fqn]) for fqn, scales in self.scales.items()}
