"""What every method works on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class MaskedWeight:
    """One site's tensors: ``weight`` and ``mask`` are the program's own, written in place. Groups run along ``dim``."""

    fqn: str
    weight: Tensor
    mask: Tensor
    dim: int
