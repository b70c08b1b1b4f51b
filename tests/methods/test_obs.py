"""prune_obs against masked least squares that is solved afresh at every column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.pattern import Pattern, check_pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def layer(out=5, width=16, tokens=64, seed=0):
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    return torch.randn(out, width, generator=generator), x.t() @ x / tokens


def damped(hessian, damping=0.01):
    """H + damping * mean(diag H) * I, in float64."""
    h = hessian.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def output_error(weight, pruned, hessian):
    """E ||x (W - W')^T||^2."""
    delta = (weight - pruned).double()
    return (delta @ hessian.double() * delta).sum().item()


def sweep_by_least_squares(weight, hessian, pattern, mask=None):
    """The definition: fix column by column; what lies right of it minimises (w0 - c) H (w0 - c)^T given the left."""
    w0, c = weight.double(), weight.double().clone()
    columns = w0.shape[1]
    keep = torch.zeros_like(w0, dtype=torch.bool) if mask is None else mask.clone()
    for j in range(columns):
        if mask is None and j % pattern.m == 0:
            # cost of deleting column k when everything right of k may answer: c_k^2 / [(H restricted to k..)^-1]_kk
            cost = [c[:, k] ** 2 / torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + pattern.m)]
            keep[:, j : j + pattern.m] = hard_mask(torch.stack(cost, 1), pattern)
        c[:, j] *= keep[:, j]
        left, right = slice(0, j + 1), slice(j + 1, columns)
        if j + 1 < columns:
            pull = (w0[:, left] - c[:, left]) @ hessian[left, right]
            c[:, right] = w0[:, right] + torch.linalg.solve(hessian[right, right], pull.t()).t()
    return c, keep


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_sweep_equals_its_definition(pattern, seed):
    weight, hessian = layer(seed=seed)
    result = prune_obs(weight, hessian, pattern)
    expected, keep = sweep_by_least_squares(weight, damped(hessian), pattern)
    assert torch.equal(result.mask, keep)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert result.damping == 0.01


@pytest.mark.parametrize("seed", range(3))
def test_given_mask_is_kept_and_compensated(seed):
    weight, hessian = layer(seed=seed)
    mask = hard_mask(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)), TWO_FOUR)
    result = prune_obs(weight, hessian, TWO_FOUR, mask=mask)
    expected, _ = sweep_by_least_squares(weight, damped(hessian), TWO_FOUR, mask)
    assert torch.equal(result.mask, mask)
    assert not result.weight[~mask].any()
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_first_columns_pruned_is_masked_least_squares():
    """Everything that is kept lies right of what is pruned, so that the sweep is the exact optimum."""
    weight, hessian = layer()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, :2] = False
    h = damped(hessian)
    optimum = weight.double() @ h[:, 2:] @ torch.linalg.inv(h[2:, 2:])
    result = prune_obs(weight, hessian, TWO_FOUR, mask=mask)
    torch.testing.assert_close(result.weight[:, 2:].double(), optimum, rtol=1e-3, atol=1e-3)


def test_one_pruned_weight_is_the_obs_formula():
    """w - w_q / [H^-1]_qq H^-1[:, q], Hassibi and Stork's update, for the first weight of the sweep."""
    weight, hessian = layer(out=1)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0, 0] = False
    inverse = torch.linalg.inv(damped(hessian))
    expected = weight.double() - weight[0, 0].double() / inverse[0, 0] * inverse[0]
    result = prune_obs(weight, hessian, TWO_FOUR, mask=mask)
    torch.testing.assert_close(result.weight.double()[0, 1:], expected[0, 1:], rtol=1e-3, atol=1e-4)
    assert result.weight[0, 0] == 0


def test_uncorrelated_inputs_need_no_compensation():
    weight, _ = layer()
    scale = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1
    result = prune_obs(weight, torch.diag(scale), TWO_FOUR)
    expected = hard_mask(weight**2 * (scale + 0.01 * scale.mean()), TWO_FOUR)  # Wanda's choice
    assert torch.equal(result.mask, expected)
    torch.testing.assert_close(result.weight, weight * expected)


def test_error_is_below_magnitude_masking():
    won = 0
    for seed in range(20):
        weight, hessian = layer(out=16, width=32, tokens=128, seed=seed)
        obs = output_error(weight, prune_obs(weight, hessian, TWO_FOUR).weight, hessian)
        by_size = output_error(weight, weight * hard_mask(weight.abs(), TWO_FOUR), hessian)
        won += obs < by_size
        assert obs < 1.1 * by_size
    assert won >= 19


def test_compensation_lowers_the_error_of_the_same_mask():
    for seed in range(10):
        weight, hessian = layer(seed=seed)
        mask = hard_mask(weight.abs(), TWO_FOUR)
        result = prune_obs(weight, hessian, TWO_FOUR, mask=mask)
        assert output_error(weight, result.weight, hessian) < output_error(weight, weight * mask, hessian)


@pytest.mark.parametrize("block", [1, 4, 6, 8, 128])
def test_block_size_changes_nothing(block):
    weight, hessian = layer()
    whole, part = prune_obs(weight, hessian, TWO_FOUR, block=16), prune_obs(weight, hessian, TWO_FOUR, block=block)
    assert torch.equal(whole.mask, part.mask)
    torch.testing.assert_close(whole.weight, part.weight, rtol=1e-4, atol=1e-5)


def test_scale_of_the_hessian_changes_nothing():
    weight, hessian = layer()
    torch.testing.assert_close(
        prune_obs(weight, hessian * 1000, TWO_FOUR).weight,
        prune_obs(weight, hessian, TWO_FOUR).weight,
        rtol=1e-3,
        atol=1e-4,
    )


def test_dead_inputs_are_pruned_first():
    weight, hessian = layer()
    hessian[[1, 2]] = 0
    hessian[:, [1, 2]] = 0
    weight[:, [1, 2]] = 100.0  # large, but nothing ever multiplies them
    result = prune_obs(weight, hessian, TWO_FOUR)
    assert not result.mask[:, 1:3].any() and result.mask[:, [0, 3]].all()
    assert not result.weight[:, 1:3].any()
    assert torch.isfinite(result.weight).all()


def test_a_layer_that_never_fires_still_gets_its_pattern():
    weight, hessian = layer()
    result = prune_obs(weight, torch.zeros_like(hessian), TWO_FOUR)
    assert check_pattern(result.mask, TWO_FOUR) and torch.isfinite(result.weight).all()


def test_hessian_of_too_few_tokens():
    """Rank 3 of 16: the usual damping is enough."""
    weight, hessian = layer(tokens=3)
    result = prune_obs(weight, hessian, TWO_FOUR)
    assert result.damping == 0.01
    assert torch.isfinite(result.weight).all() and check_pattern(result.weight, TWO_FOUR)


@pytest.mark.parametrize("damping", [1e-12, 0.0])
def test_damping_is_raised_until_the_factor_exists(damping):
    weight, hessian = layer(tokens=3)
    result = prune_obs(weight, hessian, TWO_FOUR, damping=damping)
    assert 1e-12 < result.damping < 0.1
    assert torch.isfinite(result.weight).all() and check_pattern(result.weight, TWO_FOUR)
    again = prune_obs(weight, hessian, TWO_FOUR, damping=result.damping)
    assert torch.equal(result.weight, again.weight) and again.damping == result.damping


def test_matrix_with_a_negative_eigenvalue_is_damped_past_it():
    """Ones on the diagonal, fives beside it: eigenvalues 76 and -4, so that 10 is the first damping that does."""
    weight, _ = layer()
    result = prune_obs(weight, torch.full((16, 16), 5.0) - 4 * torch.eye(16), TWO_FOUR)
    assert result.damping == pytest.approx(10)
    assert torch.isfinite(result.weight).all()


def test_no_damping_helps_a_matrix_of_infinite_weight():
    weight, _ = layer()
    with pytest.raises(SparseForgeError, match="cannot be factorised"):
        prune_obs(weight, torch.full((16, 16), 1e30) - 1e30 * torch.eye(16) + torch.eye(16), TWO_FOUR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite(bad):
    weight, hessian = layer()
    hessian[3, 3] = bad
    with pytest.raises(SparseForgeError, match="not finite"):
        prune_obs(weight, hessian, TWO_FOUR)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8), Pattern(3, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_pattern_is_exact_for_any_shape(shape, pattern, dtype, seed):
    out, groups = shape
    weight, hessian = layer(out, groups * pattern.m, tokens=8, seed=seed)
    weight = weight.to(dtype)
    before = weight.clone()
    result = prune_obs(weight, hessian, pattern)
    assert (result.mask.reshape(out, groups, pattern.m).sum(-1) == pattern.n).all()
    assert not result.weight[~result.mask].any()
    assert result.weight.dtype == torch.float32
    assert torch.equal(weight, before)
