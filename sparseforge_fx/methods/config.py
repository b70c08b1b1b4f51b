"""What every method's constants have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, Pattern
from sparseforge_fx.ranges import check_numbers


@dataclass(frozen=True)
class Beside:
    """What a preset's authors set outside of their method, for whoever trains by it. What a run's recipe says of it
    goes first; None: they say nothing.

    Attributes:
        task, kl, temperature: of the loss.
        weight_decay: AdamW's, of matrices.
        slorb_block: width of the low-rank branch's blocks.
    """

    task: float | None = None
    kl: float | None = None
    temperature: float | None = None
    weight_decay: float | None = None
    slorb_block: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """A method's constants; every method's config extends this one.

    Attributes:
        pattern: what the weights must end in.
    """

    pattern: AnyPattern = TWO_FOUR

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        check_numbers(hints, vars(self))
        for name, value in vars(self).items():
            if hints.get(name) is bool and not isinstance(value, bool):  # "no" would be true
                raise SparseForgeError(f"{name} is {value!r}: give True or False")

    @property
    def idle(self) -> dict[str, str]:
        """The constants that have no part in a run, because of others: name -> why."""
        return {}

    @property
    def idle_in_a_run(self) -> dict[str, str]:
        """What of a run's arguments (``lr``, ``weight_decay``) the method has no use for: name -> why."""
        return {}

    def choose(self, name: str, allowed: Sequence[str]) -> None:
        """Raise a SparseForgeError unless the field has one of the allowed values."""
        if getattr(self, name) not in allowed:
            raise SparseForgeError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    def check_reorder(self, reorder: bool) -> None:
        """Raise a SparseForgeError where groups are asked to lose less and the pattern has none."""
        if reorder and not isinstance(self.pattern, Pattern):
            raise SparseForgeError(f"reorder is about the groups of N:M, and {self.pattern} has none: leave it out")

    def describe(self) -> dict[str, Any]:
        """As plain values, for the report."""
        return asdict(self) | {"pattern": str(self.pattern)}
