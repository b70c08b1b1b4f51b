"""Rotations that let groups of M lose less."""

from __future__ import annotations

import pytest
import torch

from sparseforge_fx.methods.rotate import Term, find_rotation
from sparseforge_fx.pattern import Pattern


def terms(width=16, count=2, rows=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(400, width, generator=generator) * torch.logspace(0, -2, width)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    moments = (spread @ basis).T @ (spread @ basis) / 400
    return [Term(torch.randn(rows, width, generator=generator), moments) for _ in range(count)]


def lost(found, matrix, pattern):
    """By its definition, in float64."""
    total = energy = 0.0
    for weight, moments in found:
        damped = moments.double() + 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
        inverse = torch.linalg.inv(damped)
        turned = weight.double() @ matrix
        cost = turned**2 / (matrix.T @ inverse @ matrix).diagonal()
        total += cost.view(len(weight), -1, pattern.m).sort(-1).values[..., : pattern.m - pattern.n].sum()
        energy += (weight.double() @ moments.double() * weight).sum()
    return float(total / energy)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(6, 8)])
def test_it_is_orthogonal_loses_less_and_says_how_much(centred, pattern):
    given = terms()
    found = find_rotation(given, pattern, centred=centred, steps=60, rows=32)
    eye = torch.eye(16, dtype=torch.float64)
    assert torch.allclose(found.matrix.T @ found.matrix, eye, atol=1e-12)
    if centred:
        assert torch.allclose(found.matrix @ torch.ones(16).double(), torch.ones(16).double(), atol=1e-12)
    assert found.before == pytest.approx(lost(given, eye, pattern), rel=1e-4)
    assert found.after == pytest.approx(lost(given, found.matrix, pattern), rel=1e-4)
    assert found.after < 0.8 * found.before


def test_the_same_seed_the_same_matrix():
    first, second = (find_rotation(terms(), Pattern(2, 4), steps=10, rows=16).matrix for _ in range(2))
    assert torch.equal(first, second)


def test_a_rate_that_only_loses_keeps_the_basis():
    weight = torch.eye(8) * torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    found = find_rotation([Term(weight, torch.eye(8))], Pattern(2, 4), steps=3, lr=10.0)
    assert torch.equal(found.matrix, torch.eye(8, dtype=torch.float64)) and found.after == found.before


def test_weights_that_nothing_depends_on():
    found = find_rotation([Term(torch.zeros(4, 8), torch.zeros(8, 8))], Pattern(2, 4), steps=3)
    assert found.before == found.after == 0
    assert torch.equal(found.matrix, torch.eye(8, dtype=torch.float64))
