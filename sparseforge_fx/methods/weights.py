"""What every method works on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MaskedWeight:
    """One site's tensors: ``weight`` and ``mask`` are the program's own, written in place. Groups run along ``dim``."""

    fqn: str
    weight: Tensor
    mask: Tensor
    dim: int


@torch.no_grad()
def put_back(copies: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Write the copies back; was there a value that had changed?"""
    changed = False
    for tensor, copy in copies:
        changed = changed or not torch.equal(tensor, copy)
        tensor.copy_(copy)  # even if equal: -0.0 is 0.0 to a comparison
    return changed
