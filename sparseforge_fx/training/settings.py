"""What a run takes beside its method's constants: the user's word, else the preset's, else the default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from sparseforge_fx.methods.config import Beside
from sparseforge_fx.training.distillation import Distillation


class Settings(NamedTuple):
    """What :func:`choose_settings` chose.

    Attributes:
        objective, weight_decay, slorb_block: what the run takes; a block of None: no low-rank branch.
        by_preset: what of it the preset said, by name.
    """

    objective: Distillation
    weight_decay: float
    slorb_block: int | None
    by_preset: dict[str, Any]

    def with_block(self, slorb_block: int | None) -> Settings:
        """With the preset's ``slorb_block`` as the model can have it."""
        said = {name: value for name, value in self.by_preset.items() if name != "slorb_block"}
        return self._replace(
            slorb_block=slorb_block, by_preset=said | ({"slorb_block": slorb_block} if slorb_block else {})
        )

    def describe(self) -> dict[str, Any]:
        """As plain values, for the report."""
        return self._asdict() | {"objective": self.objective.describe()}

    def note(self, preset: str | None) -> list[str]:
        """A sentence about what the preset said."""
        if not self.by_preset:
            return []
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.by_preset.items())
        return [f"preset {preset} sets {told}: objective=, weight_decay= and slorb_block= go before it"]


def choose_settings(
    beside: Beside, objective: Distillation | None, weight_decay: float | None, slorb_block: int | None
) -> Settings:
    """``beside`` is the preset's word; of the user's, None says nothing, and a ``slorb_block`` of 0 asks for none."""
    said: dict[str, Any] = {}
    if objective is None:
        loss = {name: getattr(beside, name) for name in ("task", "kl", "temperature")}
        loss = {name: value for name, value in loss.items() if value is not None}
        objective, said = replace(Distillation(), **loss), loss
    if weight_decay is None and beside.weight_decay is not None:
        weight_decay = said["weight_decay"] = beside.weight_decay
    if slorb_block is None and beside.slorb_block is not None:
        slorb_block = said["slorb_block"] = beside.slorb_block
    return Settings(objective, weight_decay or 0.0, slorb_block or None, said)
