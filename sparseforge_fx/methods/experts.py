"""What a layer-wise walk learns of the experts of a mixture: how many tokens each saw, and which saw too few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        told_of_few: what becomes of those that saw fewer.
        tokens: by weight, what each expert saw, in the order of the stack; filled by the walk.
        errors: by weight, likewise, of each expert the squared error of its outputs on these tokens, in relation to
            their square; None where it saw none. Of a weight that is no stack, its own alone.
    """

    pattern: AnyPattern = TWO_FOUR
    fewest: int = EXPERT_TOKENS
    every_token: bool = False
    told_of_few: str = "pruned by magnitude"
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, list[float | None]] = field(default_factory=dict)
    notes: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by weight: sentence -> experts

    def see(self, name: str, expert: Expert) -> bool:
        """Note what an expert saw; was it enough?"""
        _put(self.tokens.setdefault(name, []), expert.place, expert.tokens, 0)
        if self.every_token and not expert.every:
            told = "calibrated on the tokens routed there: the graph does not tell what others would be"
            self.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        enough = expert.tokens >= self.fewest
        if not enough:
            told = f"saw fewer than {self.fewest} calibration tokens: {self.told_of_few}"
            self.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        return enough

    def never_read(self, name: str, place: int) -> None:
        """Note an expert that no token can reach: the graph does not read it."""
        _put(self.tokens.setdefault(name, []), place, 0, 0)
        _put(self.errors.setdefault(name, []), place, None, None)
        told = f"is never read by the graph: {self.told_of_few}"
        self.notes.setdefault(name, {}).setdefault(told, []).append(place)

    def lost(self, name: str, dense: Tensor, pruned: Tensor, moments: Tensor, place: int = 0) -> None:
        """Note what the outputs of the expert at ``place``, or of a weight that is no stack, lost, from its weights
        [out, in] before and after."""
        was, gone = dense.float(), (pruned - dense).float()
        energy = float(((was @ moments) * was).sum())
        error = float(((gone @ moments) * gone).sum()) / energy if energy > 0 else None
        _put(self.errors.setdefault(name, []), place, error, None)

    def describe(self) -> dict[str, dict[str, Any]]:
        """For the report, by weight: ``experts``, if there are any, and ``layer_errors`` of all others."""
        stacks = {
            name: {"tokens": seen, "error": self.errors[name], "by_magnitude": too_few(seen, self.fewest)}
            for name, seen in self.tokens.items()
        }
        errors = {n: e[0] for n, e in self.errors.items() if n not in stacks and e[0] is not None}
        return {**({"experts": stacks} if stacks else {}), **({"layer_errors": errors} if errors else {})}

    def told(self) -> dict[str, str]:
        """A note for each weight whose experts there is something to say of."""
        return {
            name: "; ".join(f"{_listed(indices)} {text}" for text, indices in found.items())
            for name, found in self.notes.items()
        }


def of_curvature(tokens: Mapping[str, Sequence[int]], fewest: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Of experts that curvature scores, by weight: what the report says of each, and a note on those that saw too few
    tokens for that."""
    stacks = {n: {"tokens": list(seen), "by_magnitude": too_few(seen, fewest)} for n, seen in tokens.items()}
    told = f"saw fewer than {fewest} tokens while curvature was estimated: scored by magnitude"
    return stacks, {n: f"{_listed(few)} {told}" for n, of_one in stacks.items() if (few := of_one["by_magnitude"])}


def too_few(tokens: Sequence[int], fewest: int) -> list[int]:
    """The experts that saw less."""
    return [place for place, seen in enumerate(tokens) if seen < fewest]


def _put(values: list[Any], place: int, value: Any, empty: Any) -> None:
    """Write into a list that may be too short yet: a graph may read experts in any order."""
    values += [empty] * (place + 1 - len(values))
    values[place] = value


def _listed(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
