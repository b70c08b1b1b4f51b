"""What a method works on, and what the training loop asks of it. Methods know masks and weights, never
architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparseforge_fx.pattern import AnyPattern


@dataclass
class MaskedWeight:
    """One site's tensors: ``weight`` and ``mask`` are the program's own, written in place. Groups run along ``dim``."""

    fqn: str
    weight: Tensor
    mask: Tensor
    dim: int


class TrainedMethod(Protocol):
    """Decides masks while the weights train. Steps count from 0; ``after_step(k)`` follows optimizer step k."""

    pattern: AnyPattern
    steps: int

    def wants_curvature(self, step: int) -> bool:
        """Must the backward of this step estimate curvature?"""
        ...

    def after_step(self, step: int) -> None:
        """Bring the masks from step ``step`` to the next one."""
        ...

    def metrics(self) -> dict[str, float]:
        """The current values of the curves: temperature, lambda, mask distance from binary, flip rate, density."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside weights and masks: tensors and plain values only."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...
