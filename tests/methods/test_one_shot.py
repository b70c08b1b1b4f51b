"""Magnitude, Wanda and SparseGPT on one weight, by hand."""

import torch

from sparseforge_fx.methods.one_shot import SparseGPTConfig, WandaConfig, magnitude
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, Unstructured


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


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    x = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 0.2]])  # norms 5, 1, 1, 0.2
    result = WandaConfig(Pattern(2, 4)).solve(weight, torch.ones_like(weight), x.t() @ x / 2)
    assert result.mask.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert torch.equal(result.weight, weight * result.mask)


def test_wanda_without_a_structure_compares_within_rows():
    weight = torch.tensor([[100.0, 90.0, 80.0, 70.0, 60.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    result = WandaConfig(Unstructured(0.4)).solve(weight, torch.ones_like(weight), torch.diag(torch.tensor([1.0, 1, 1, 1, 9])))
    assert result.mask.int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]  # equal scores: the earlier


def test_wanda_is_magnitude_where_all_inputs_weigh_the_same():
    weight = MaskedWeight("w", torch.randn(6, 16), torch.ones(6, 16), 1)
    result = WandaConfig(Pattern(2, 4)).solve(weight.weight, weight.mask, torch.eye(16))
    magnitude([weight], Pattern(2, 4))
    assert torch.equal(result.mask, weight.mask.bool())


def test_sparsegpt_keeps_the_share_of_an_unstructured_block():
    torch.manual_seed(0)
    weight, x = torch.randn(32, 40), torch.randn(200, 40) @ torch.randn(40, 40)
    result = SparseGPTConfig(Unstructured(0.6)).solve(weight, torch.ones_like(weight), x.t() @ x)
    assert result.mask.sum() == round(0.4 * weight.numel())
    assert not result.weight[~result.mask].any()
    kept = weight * (weight.abs() >= weight.abs().flatten().kthvalue(32 * 24).values)
    error = lambda w: ((w - weight) @ x.t()).square().sum()  # noqa: E731
    assert error(result.weight) < 0.97 * error(kept)
