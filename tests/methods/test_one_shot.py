"""Magnitude: masks by size, weights untouched."""

import torch

from sparseforge_fx.methods.base import MaskedWeight
from sparseforge_fx.methods.one_shot import magnitude
from sparseforge_fx.pattern import Pattern


def test_magnitude_by_hand():
    value = torch.tensor([[0.1, -3.0, 2.0, -0.5, 1.0, 1.0, -1.0, 0.0]])
    weight = MaskedWeight("w", value.clone(), torch.full_like(value, 0.7), 1)
    magnitude([weight], Pattern(2, 4))
    assert weight.mask.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]  # ties: the first
    assert torch.equal(weight.weight, value)


def test_magnitude_along_the_stored_reduction_dimension():
    value = torch.tensor([[0.1, -3.0, 2.0, -0.5]]).t()  # [in, out] of a Conv1D
    weights = [
        MaskedWeight("w", value.clone(), torch.ones_like(value), 0),
        MaskedWeight("v", value.t(), torch.ones(1, 4), 1),
    ]
    magnitude(weights, Pattern(1, 4))
    assert weights[0].mask.flatten().tolist() == [0, 1, 0, 0]
    assert weights[1].mask.tolist() == [[0, 1, 0, 0]]


def test_magnitude_in_half_precision():
    value = torch.tensor([[1.0, 1.0078125, -1.015625, 0.5]]).bfloat16()
    weight = MaskedWeight("w", value, torch.ones_like(value), 1)
    magnitude([weight], Pattern(2, 4))
    assert weight.mask.dtype == torch.bfloat16 and weight.mask.tolist() == [[0, 1, 1, 0]]
