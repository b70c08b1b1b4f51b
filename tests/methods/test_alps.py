"""ALPS against all masks, where they can be counted, and against SparseGPT where they cannot."""

import itertools

import pytest
import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.alps import prune_alps
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.refit import refit
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def problem(seed, rows=16, columns=64, tokens=400, mix=0.3):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + mix * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x.t() @ x / tokens


def errors(w, dense, hessian):
    """Per row."""
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return (((w - dense) @ h) * (w - dense)).sum(1)


def test_it_finds_nearly_the_best_of_all_masks():
    dense, hessian = problem(0, rows=24, columns=8)
    pairs = [torch.tensor([i in kept for i in range(4)]) for kept in itertools.combinations(range(4), 2)]
    masks = [torch.cat(pair).expand_as(dense) for pair in itertools.product(pairs, pairs)]
    best = torch.stack([errors(refit(dense, hessian, m, dense * m), dense, hessian) for m in masks]).amin(0)
    alps = errors(prune_alps(dense, hessian, TWO_FOUR)[0], dense, hessian)
    obs = errors(prune_obs(dense, hessian, TWO_FOUR).weight, dense, hessian)
    assert (alps >= best * (1 - 1e-3)).all()
    assert alps.sum() - best.sum() < 0.35 * (obs.sum() - best.sum())
    assert (alps <= best * 1.001).float().mean() > 0.5


@pytest.mark.parametrize("pattern", [Pattern(1, 2), TWO_FOUR, Pattern(4, 8), Pattern(16, 32), Unstructured(0.5)])
@pytest.mark.parametrize("seed", range(2))
def test_it_beats_a_sweep(seed, pattern):
    dense, hessian = problem(seed)
    weight, mask = prune_alps(dense, hessian, pattern)
    assert mask.dtype == torch.bool and weight.dtype == torch.float32 and not weight[~mask].any()
    assert check_pattern(weight, pattern) and mask.sum() == hard_mask(dense.abs(), pattern).sum()
    swept = prune_obs(dense, hessian, pattern).weight
    assert errors(weight, dense, hessian).sum() < 0.9 * errors(swept, dense, hessian).sum()


def test_independent_inputs_leave_nothing_to_compensate():
    dense, _ = problem(1)
    energy = torch.rand(64) + 0.5
    weight, mask = prune_alps(dense, torch.diag(energy), TWO_FOUR, damping=0.0)
    best = hard_mask(dense.square() * energy, TWO_FOUR)
    assert (mask == best).float().mean() > 0.95  # ADMM may stop at a neighbour where two weights are worth the same
    assert (
        errors(weight, dense, torch.diag(energy)).sum() < 1.03 * errors(dense * best, dense, torch.diag(energy)).sum()
    )
    torch.testing.assert_close(weight, dense * mask)


def test_a_scale_of_the_hessian_changes_nothing():
    dense, hessian = problem(2)
    (a, first), (b, second) = prune_alps(dense, hessian, TWO_FOUR), prune_alps(dense, 1024 * hessian, TWO_FOUR)
    assert torch.equal(first, second)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_and_dead_inputs(tokens):
    dense, hessian = problem(3, tokens=max(1, tokens))
    hessian = hessian * (tokens > 0)
    hessian[:, :4] = hessian[:4] = 0
    weight, mask = prune_alps(dense, hessian, TWO_FOUR)
    assert torch.isfinite(weight).all() and check_pattern(weight, TWO_FOUR)
    assert mask.sum() == mask.numel() // 2


def test_the_weight_given_is_left_alone():
    dense, hessian = problem(4)
    before = dense.clone(), hessian.clone()
    prune_alps(dense, hessian, TWO_FOUR)
    assert torch.equal(dense, before[0]) and torch.equal(hessian, before[1])


def test_inputs_that_are_not_finite():
    dense, hessian = problem(5)
    hessian[0, 0] = float("nan")
    with pytest.raises(SparseForgeError, match="not finite"):
        prune_alps(dense, hessian, TWO_FOUR)
