"""A basis in which groups of M lose less: an orthogonal matrix, learned for the weights that read the vectors it turns.

    min over Q of  sum over readers W  sum over groups of the M - N smallest of  g_o (W Q)_oj^2 / (Q^T H^-1 Q)_jj

H are the moments of the inputs, g_o the curvature of the outputs: what Optimal Brain Surgeon predicts that the pruned
entries cost, one by one. DenoiseRotator (arXiv 2505.23049) learns such matrices by the entropy of the same scores; here
it is what the pattern loses itself. Where the matrix has to leave the vector of ones as it is, steps are projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.pattern import Pattern
from sparseforge_fx.progress import counted

BETAS = 0.9, 0.999
DAMPING = 0.01  # share of the mean diagonal of the moments, as in SparseGPT


class Term(NamedTuple):
    """A weight that reads the vectors.

    Attributes:
        weight: [out, width], float32; each row times the root of the curvature of its output.
        moments: [width, width], X^T X / rows of its inputs.
    """

    weight: Tensor
    moments: Tensor


class Rotated(NamedTuple):
    """``matrix`` [width, width], float64: vectors become ``x @ matrix``; what was lost by the identity and what is lost
    by it, shares of what the weights compute."""

    matrix: Tensor
    before: float
    after: float


@torch.enable_grad()
def find_rotation(
    found: Sequence[Term],
    pattern: Pattern,
    *,
    centred: bool = False,
    steps: int = 300,
    lr: float = 1e-2,
    rows: int = 128,
    seed: int = 0,
) -> Rotated:
    """Learn a rotation by Adam in the tangent space, from the identity on.

    Args:
        centred: keep the vector of ones.
        steps, lr: of Adam; the rate falls linearly to zero.
        rows: outputs of a weight that a step looks at, drawn anew for each.
        seed: of what is drawn.

    Memory: all weights and inverse moments, float32. A step costs three products of the matrix by the drawn rows and
    by every inverse.
    """
    width, device = found[0].weight.shape[1], found[0].weight.device
    together: dict[int, list[Term]] = {}  # q, k and v read the same
    for term in found:
        together.setdefault(id(term.moments), []).append(term)
    terms = [([term.weight for term in group], _inverse(group[0].moments)) for group in together.values()]
    energy = sum(float(((term.weight @ term.moments.to(term.weight)) * term.weight).sum()) for term in found)
    matrix = torch.eye(width, device=device)
    if not energy > 0:
        return Rotated(matrix.double(), 0.0, 0.0)  # nothing depends on them
    before = _lost(terms, matrix, pattern) / energy
    ones = torch.full((width, 1), width**-0.5, device=device)
    first, second = torch.zeros_like(matrix), torch.zeros_like(matrix)
    generator = torch.Generator().manual_seed(seed)
    with counted("a rotation learns", steps) as advance:
        for step in range(steps):
            now = matrix.clone().requires_grad_()
            drawn = [(torch.cat([_draw(w, rows, generator) for w in group]), inverse) for group, inverse in terms]
            loss = torch.stack([_loss(part, inverse, now, pattern) for part, inverse in drawn]).sum() / energy
            (gradient,) = torch.autograd.grad(loss, now)
            tangent = matrix.T @ gradient
            tangent = tangent - tangent.T
            first.lerp_(tangent, 1 - BETAS[0])
            second.lerp_(tangent.square(), 1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)
            move = first / (1 - BETAS[0] ** (step + 1)) / scale
            if centred:
                move = _without(move, ones)
            matrix = matrix @ torch.matrix_exp(-lr * (1 - step / steps) * move)
            advance(f"loses {loss.detach():.3g}")
    matrix = _orthogonal(matrix.double(), ones.double() if centred else None)
    after = _lost(terms, matrix.float(), pattern) / energy
    if not after < before:
        return Rotated(torch.eye(width, dtype=torch.float64, device=device), before, before)
    return Rotated(matrix, before, after)


def _inverse(moments: Tensor) -> Tensor:
    damped = moments.double()
    mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.inv(damped + DAMPING * mean * torch.eye(len(damped), device=damped.device)).float()


def _draw(weight: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """So many of its rows, in the place of all."""
    if len(weight) <= rows:
        return weight
    chosen = torch.randperm(len(weight), generator=generator)[:rows].to(weight.device)
    return weight[chosen] * (len(weight) / rows) ** 0.5


def _loss(weight: Tensor, inverse: Tensor, matrix: Tensor, pattern: Pattern) -> Tensor:
    cost = (weight @ matrix).square() / (matrix * (inverse @ matrix)).sum(0)
    groups = cost.view(len(weight), -1, pattern.m)
    return groups.topk(pattern.m - pattern.n, dim=-1, largest=False, sorted=False).values.sum()


@torch.no_grad()
def _lost(terms: Sequence[tuple[list[Tensor], Tensor]], matrix: Tensor, pattern: Pattern) -> float:
    return sum(float(_loss(weight, inverse, matrix, pattern)) for group, inverse in terms for weight in group)


def _without(move: Tensor, direction: Tensor) -> Tensor:
    """The part of a skew matrix that leaves a unit vector [n, 1] as it is."""
    moved = move @ direction
    return move - moved @ direction.T + direction @ moved.T


def _orthogonal(matrix: Tensor, ones: Tensor | None) -> Tensor:
    """The nearest orthogonal matrix that keeps the unit vector ``ones``, if there is one: rounding has moved it."""
    if ones is not None:  # to the complement of ones, on both sides, and the identity on ones
        rest = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - ones @ ones.T
        matrix = rest @ matrix @ rest + ones @ ones.T
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
