"""What a layer-wise walk learns of the experts of a mixture: how many tokens each saw, and which saw too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparseforge_fx.methods.calibrate import Expert
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern

#: fewer tokens say next to nothing of an expert's inputs
EXPERT_TOKENS = 32


@dataclass
class Experts:
    """What a walk learns of the experts of all stacks.

    Attributes:
        pattern: of those that are pruned by magnitude.
        fewest: tokens that an expert must have seen for its data to decide.
        every_token: each expert is told of as if every token came to it.
        tokens: by weight, what each expert saw; filled by the walk.
    """

    pattern: AnyPattern = TWO_FOUR
    fewest: int = EXPERT_TOKENS
    every_token: bool = False
    tokens: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by weight: sentence -> experts

    def see(self, name: str, expert: Expert) -> bool:
        """Note what an expert saw; was it enough?"""
        self.tokens.setdefault(name, []).append(expert.tokens)
        enough = expert.tokens >= self.fewest
        if not enough:
            told = f"saw fewer than {self.fewest} calibration tokens: pruned by magnitude"
            self.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        return enough

    def told(self) -> dict[str, str]:
        """A note for each weight whose experts there is something to say of."""
        return {
            name: "; ".join(f"{_listed(indices)} {text}" for text, indices in found.items())
            for name, found in self.notes.items()
        }


def _listed(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
