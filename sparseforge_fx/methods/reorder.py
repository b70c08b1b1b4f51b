"""An order of a weight's inputs in which groups of M lose less: pairs of groups exchange the two inputs that gain most.

What an input's place is worth depends on its neighbours alone: of every group N stay. Where the graph lets channels
change places (passes/find_channels.py), an order in which important inputs do not meet costs nothing at run time
(Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; there by greedy exchanges over all pairs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes.find_channels import Channels, find_channels
from sparseforge_fx.pattern import Pattern

#: rounds of exchanges, each of which pairs all groups anew; the first few win most
ROUNDS = 40
NEW_ORDER = "have a new order"


class Reordering:
    """Gives the inputs of a weight a better order, and the outputs of what computes them the same."""

    def __init__(self, program: Program, pattern: Pattern, weights: Sequence[MaskedWeight]):
        self.program, self.pattern, self.weights = program, pattern, {w.fqn: w for w in weights}
        self.sets: dict[str, list[Channels]] = {}
        sets, self.notes = find_channels(program, pattern)
        for found in sets:
            if len(names := {part.fqn for part in found.columns}) == 1:
                self.sets.setdefault(names.pop(), []).append(found)
        self.history: list[tuple[Channels, Tensor]] = []  # what was done, in order
        if not self.sets and not self.notes:
            self.notes[weights[0].fqn] = "reorder changes nothing: no channels of this graph may change places"

    def __call__(self, name: str, moments: Tensor) -> Tensor | None:
        inputs = torch.arange(len(moments), device=moments.device)
        value, _ = self.weights[name].oriented()
        worth = value.float().square() * moments.diagonal()
        masks = {w.fqn: w.mask for w in self.weights.values()}
        moved: set[str] = set()
        for each in self.sets.get(name, ()):
            rows = torch.cat([worth[:, part.indices.to(worth.device)] for part in each.columns])
            order = find_order(rows, self.pattern)
            if torch.equal(order, torch.arange(len(order), device=order.device)):
                continue
            each.permute(self.program.state, order)
            each.permute(masks, order)
            self.history.append((each, order))
            for part in each.columns:
                columns = part.indices.to(inputs.device)
                inputs[columns] = columns[order]
            moved |= {part.fqn for part in each.rows}
        if not moved:
            return None
        for fqn in moved & self.weights.keys():
            self._note(fqn, f"its outputs {NEW_ORDER}")
        self._note(name, f"its inputs {NEW_ORDER}")
        return inputs

    def _note(self, name: str, text: str) -> None:
        """One text for all weights that it is true of: a report groups them by it."""
        self.notes[name] = "; ".join(filter(None, (self.notes.get(name), text)))

    def follow(self, name: str, value: Tensor) -> Tensor:
        """A weight as it was before, with its entries where they stand now; the tensor itself where none moved."""
        if any(part.fqn == name for each, _ in self.history for part in (*each.columns, *each.rows)):
            value = value.detach().clone()
            for each, order in self.history:
                each.permute({name: value}, order)
        return value


def tell_moved(notes: Mapping[str, str]) -> list[str]:
    """For a report, by the notes of its weights: a run that goes on after a kill knows no more."""
    moved = sum(NEW_ORDER in text for text in notes.values())
    if not moved:
        return []
    return [
        f"channels of {moved} weights stand in another order than in the dense model: what was made for its weights "
        "(an adapter, a difference of weights) does not fit any more; reorder=False keeps their places"
    ]


@torch.no_grad()
def find_order(worth: Tensor, pattern: Pattern, rounds: int = ROUNDS, seed: int = 0) -> Tensor:
    """The order [k] of columns, ``worth[:, order]``, whose groups keep most.

    Args:
        worth: [rows, k], at least zero, say (w_ij ||x_j||)^2; what a group of M columns keeps of a row are its N
            largest.
        rounds: in each, every group meets another one, and they exchange a column each if both together gain.

    Deterministic; the identity where nothing gains.
    """
    width = worth.shape[1]
    groups = width // pattern.m
    order = torch.arange(width, device=worth.device)
    generator = torch.Generator().manual_seed(seed)
    if groups < 2:
        return order
    pairs = groups // 2
    for _ in range(rounds):
        met = torch.randperm(groups, generator=generator)[: 2 * pairs].to(worth.device)
        places = (met[:, None] * pattern.m + torch.arange(pattern.m, device=worth.device)).view(2, pairs, pattern.m)
        seen = worth[:, order[places]].permute(1, 3, 0, 2)  # [side, M, rows, pairs]
        now = sum(_largest(list(side), pattern.n)[1].sum(0) for side in seen)
        gain = _after(seen[0], seen[1], pattern.n) + _after(seen[1], seen[0], pattern.n).transpose(0, 1) - now
        best, which = gain.flatten(0, 1).max(0)
        exchange = (best > 1e-6 * now).nonzero()[:, 0]  # what rounding makes of equal sums is no gain
        here = places[0, exchange, which[exchange] // pattern.m]
        there = places[1, exchange, which[exchange] % pattern.m]
        order[here], order[there] = order[there], order[here]
    return order


def _after(group: Tensor, other: Tensor, n: int) -> Tensor:
    """What ``group`` [M, rows, pairs] keeps with column j of ``other`` in the place of its own i: [M, M, pairs]."""
    kept = []
    for i in range(len(group)):
        fewer, most = _largest([column for k, column in enumerate(group) if k != i], n)
        kept += [torch.maximum(most, fewer + column).sum(0) for column in other]
    return torch.stack(kept).view(len(group), len(group), -1)


def _largest(columns: list[Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Sums of the n - 1 and of the n largest of the columns, entry by entry; they are sorted as far as it takes."""
    fewer = most = torch.zeros_like(columns[0])
    for last in range(len(columns) - 1, len(columns) - 1 - n, -1):
        for i in range(last):
            columns[i], columns[i + 1] = (
                torch.minimum(columns[i], columns[i + 1]),
                torch.maximum(columns[i], columns[i + 1]),
            )
        fewer, most = most, most + columns[last]
    return fewer, most
