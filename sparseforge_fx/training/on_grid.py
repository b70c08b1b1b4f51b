"""Weights that the graph sees in few bits while they train: rounded after every step, gradients straight through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparseforge_fx.formats import Format
from sparseforge_fx.methods.rounding import Rounded, codes_of, spread, why_not_rounded
from sparseforge_fx.methods.weights import MaskedWeight

INSIDE = 0.49  # of a code's width: so far from its middle a master may begin


class OnGrid:
    """The scales of weights, which stay as the layer-wise rounding found them, while codes follow the optimizer.

    The gradient at a rounded weight is taken for that of its float32 master (straight-through; LSQ without trained
    steps, arXiv 1902.08153). A master begins where the float was that its code stands for, as near as it can without
    another code: masters that began in the middle of their codes would move for half a width without any effect, which
    is longer than short runs are.

    Attributes:
        formats: by name, of the weights whose widths fit.
        scales: by name; [out, 1] float32 of int8, [out, in / group] float16 of int4.
        against: of the other weights, why not.
    """

    def __init__(self, weights: Sequence[MaskedWeight], form: Format):
        self._of = {id(w.weight): w for w in weights}
        shapes = {w.fqn: w.oriented()[0].shape for w in weights}
        counts = {fqn: shape[0] if len(shape) == 3 else None for fqn, shape in shapes.items()}
        reasons = {fqn: why_not_rounded(counts[fqn], shape[-1], form) for fqn, shape in shapes.items()}
        self.against = {fqn: f"not in {form.values}: {reason}" for fqn, reason in reasons.items() if reason}
        self.formats = {fqn: form for fqn, reason in reasons.items() if reason is None}
        dtype = torch.float16 if form.group else torch.float32
        self.scales = {
            w.fqn: w.weight.new_ones(out, width // (form.group or width), dtype=dtype)
            for w in weights
            if w.fqn in self.formats
            for out, width in (shapes[w.fqn],)
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

    def rounded(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """What the graph is to see of ``master``: the nearest codes times their scales, or itself."""
        if not self.takes(parameter):
            return master
        w = self._of[id(parameter)]
        value = master.t() if w.dim == 0 else master
        found = codes_of(value, self.scales[w.fqn], self.formats[w.fqn]).weight
        return found.t() if w.dim == 0 else found
