"""Pattern mathematics in plain torch: the reference that every pass, method and kernel is checked against.

N:M: a tensor is cut into groups of M consecutive elements along its reduction dimension and keeps at most N non-zeros
in every group; 2:4 is the pattern that sparse tensor cores run. Unstructured: a share of the whole tensor is zero.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError


class Pattern(NamedTuple):
    """Keep at most ``n`` of every ``m`` consecutive weights."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of weights that survive: N / M."""
        return self.n / self.m

    def fits(self, length: int) -> bool:
        """Can a reduction dimension of this length be cut into whole groups?"""
        return length % self.m == 0


class Unstructured(NamedTuple):
    """Drop the share ``sparsity`` of each weight, wherever in it."""

    sparsity: float

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.6g}%"

    @property
    def density(self) -> float:
        """Share of weights that survive."""
        return 1 - self.sparsity

    def fits(self, length: int) -> bool:
        """Any length can be pruned."""
        return True


AnyPattern = Pattern | Unstructured
TWO_FOUR = Pattern(2, 4)


def parse_pattern(text: str | AnyPattern) -> AnyPattern:
    """``"2:4"`` -> ``Pattern(2, 4)``, ``"50%"`` -> ``Unstructured(0.5)``.

    Raises SparseForgeError unless 0 < N < M, or 0 % < p < 100 %.
    """
    if isinstance(text, Unstructured) and 0 < text.sparsity < 1:
        return text
    share = re.fullmatch(r"(\d+(?:\.\d+)?) *%", str(text).strip())
    if share and 0 < float(share[1]) < 100:
        return Unstructured(float(share[1]) / 100)
    head, _, tail = (part.strip() for part in str(text).partition(":"))
    if not (head.isdecimal() and tail.isdecimal() and 0 < int(head) < int(tail)):
        raise SparseForgeError(
            f"pattern '{text}' is not N:M with 0 < N < M; write for example '2:4', or '50%' for unstructured zeros"
        )
    return Pattern(int(head), int(tail))


def to_groups(tensor: Tensor, pattern: Pattern, dim: int = -1) -> Tensor:
    """View ``tensor`` as [..., groups, M] with ``dim`` moved last; inverse of :func:`from_groups`.

    Raises SparseForgeError if the length of ``dim`` is not a multiple of M.
    """
    length = tensor.shape[dim]
    if length % pattern.m:
        raise SparseForgeError(f"a dimension of {length} cannot be cut into groups of {pattern.m}: pad it or skip it")
    moved = tensor.movedim(dim, -1)
    return moved.reshape(*moved.shape[:-1], length // pattern.m, pattern.m)


def from_groups(groups: Tensor, dim: int = -1) -> Tensor:
    """[..., groups, M] back to the layout that :func:`to_groups` was given."""
    return groups.flatten(-2).movedim(-1, dim)


def hard_mask(scores: Tensor, pattern: AnyPattern, dim: int = -1) -> Tensor:
    """Boolean mask of the N largest scores in every group of M along ``dim``; the earlier element wins a tie.

    Exactly N of M are kept whatever the scores are (NaN excepted: it is refused upstream), on every device the same.
    Unstructured: exactly the rounded share of the whole tensor, in memory order along ``dim``.
    """
    if isinstance(pattern, Unstructured):
        return _largest(scores.movedim(dim, -1), round(pattern.density * scores.numel())).movedim(-1, dim)
    grouped = to_groups(scores, pattern, dim)
    if pattern.m <= 8:
        # rank by comparison: a few elementwise ops over contiguous lanes, several times faster than a sort
        lanes = grouped.movedim(-1, 0).contiguous().unbind(0)
        ranks = [torch.zeros_like(lane, dtype=torch.int8) for lane in lanes]
        for i, j in combinations(range(pattern.m), 2):
            first = lanes[i] >= lanes[j]
            ranks[j] += first
            ranks[i] += ~first
        mask = torch.stack([rank < pattern.n for rank in ranks], -1)
    else:
        order = grouped.argsort(dim=-1, descending=True, stable=True)[..., : pattern.n]
        mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True)
    return from_groups(mask, dim)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of all; the earlier wins a tie."""
    flat = scores.flatten()
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above, level = flat > threshold, flat == threshold
    room = count - above.sum()
    return (above | (level & (level.cumsum(0) <= room))).view(scores.shape)


def all_patterns(pattern: Pattern, device: torch.device | str = "cpu") -> Tensor:
    """Every legal mask of one group, [C(M, N), M] float32, in lexicographic order (six rows for 2:4)."""
    rows = list(combinations(range(pattern.m), pattern.n))
    out = torch.zeros(len(rows), pattern.m, device=device)
    for row, kept in enumerate(rows):
        out[row, list(kept)] = 1.0
    return out


def check_pattern(weight: Tensor, pattern: AnyPattern, dim: int = -1) -> bool:
    """True if every group of M along ``dim`` has at most N non-zeros (unstructured: the tensor no more than its
    share). A dimension that is no multiple of M has groups of another size: False."""
    if isinstance(pattern, Unstructured):
        return int(torch.count_nonzero(weight)) <= round(pattern.density * weight.numel())
    return pattern.fits(weight.shape[dim]) and bool(((to_groups(weight, pattern, dim) != 0).sum(-1) <= pattern.n).all())


def density(weight: Tensor) -> float:
    """Share of elements that are not zero."""
    return torch.count_nonzero(weight).item() / max(1, weight.numel())


def distance_from_binary(mask: Tensor) -> float:
    """Mean of 2 * min(m, 1 - m): 0 for a hard mask, 1 where every entry is one half."""
    m = mask.float()
    return (2 * torch.minimum(m, 1 - m)).mean().item()
