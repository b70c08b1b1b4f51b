"""What a layer-wise walk learns of the experts of a mixture: how many tokens each saw, and which saw too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
        errors: by weight, of each expert the squared error of its outputs on these tokens, in relation to their square;
            None where it saw none. Of a weight that is no stack, its own alone.
    """

    pattern: AnyPattern = TWO_FOUR
    fewest: int = EXPERT_TOKENS
    every_token: bool = False
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, list[float | None]] = field(default_factory=dict)
    notes: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by weight: sentence -> experts

    def see(self, name: str, expert: Expert) -> bool:
        """Note what an expert saw; was it enough?"""
        self.tokens.setdefault(name, []).append(expert.tokens)
        if self.every_token and not expert.every:
            told = "calibrated on the tokens routed there: the graph does not tell what others would be"
            self.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        enough = expert.tokens >= self.fewest
        if not enough:
            told = f"saw fewer than {self.fewest} calibration tokens: pruned by magnitude"
            self.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        return enough

    def lost(self, name: str, dense: Tensor, pruned: Tensor, moments: Tensor) -> None:
        """Note what the outputs of an expert, or of a weight that is no stack, lost, from its weights [out, in] before
        and after."""
        was, gone = dense.float(), (pruned - dense).float()
        energy = float(((was @ moments) * was).sum())
        error = float(((gone @ moments) * gone).sum()) / energy if energy > 0 else None
        self.errors.setdefault(name, []).append(error)

    def describe(self) -> dict[str, dict[str, Any]]:
        """For the report, by weight: ``experts``, if there are any, and ``layer_errors`` of all others."""
        stacks = {name: {"tokens": self.tokens[name], "error": self.errors[name]} for name in self.tokens}
        errors = {n: e[0] for n, e in self.errors.items() if n not in stacks and e[0] is not None}
        return {**({"experts": stacks} if stacks else {}), **({"layer_errors": errors} if errors else {})}

    def told(self) -> dict[str, str]:
        """A note for each weight whose experts there is something to say of."""
        return {
            name: "; ".join(f"{_listed(indices)} {text}" for text, indices in found.items())
            for name, found in self.notes.items()
        }


def _listed(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
