"""What every method works on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseforge_fx.methods.part import Part


@dataclass
class MaskedWeight:
    """One site's tensors: ``weight`` and ``mask`` are the program's own, written in place. Groups run along ``dim``.

    Where processes share a weight, both are what this one has of it, and ``part`` says what that is.
    """

    fqn: str
    weight: Tensor
    mask: Tensor
    dim: int
    part: Part | None = None

    def whole(self, value: Tensor) -> Tensor:
        """Something of the weight's shape as the processes have it together; over the same memory."""
        return value if self.part is None else self.part.whole(value)

    def oriented(self, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """Views of weight and mask with the reduction dimension last: [out, in], of one expert of a stack."""
        pair = (self.weight, self.mask) if expert is None else (self.weight[expert], self.mask[expert])
        return tuple(t.movedim(self.dim - (expert is not None), -1) for t in pair)  # type: ignore[return-value]


@torch.no_grad()
def put_back(copies: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Write the copies back; was there a value that had changed?"""
    changed = False
    for tensor, copy in copies:
        changed = changed or not torch.equal(tensor, copy)
        tensor.copy_(copy)  # even if equal: -0.0 is 0.0 to a comparison
    return changed
