"""refit against the least squares that a direct solver finds row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.refit import refit
from sparseforge_fx.pattern import Pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def problem(seed, rows=8, columns=24, tokens=100):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    dense = torch.randn(rows, columns, generator=generator)
    return dense, x.t() @ x / tokens, hard_mask(dense.abs(), TWO_FOUR)


def damped(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


def error(w, dense, hessian):
    return torch.einsum("oi,ij,oj->", w - dense, hessian, w - dense).item()


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_it_is_the_least_squares_solution_of_every_row(damping):
    dense, hessian, mask = problem(0)
    got = refit(dense, hessian, mask, dense * mask, damping=damping, iterations=60)
    h = damped(hessian, damping).double()
    for w, w0, kept in zip(got, dense.double(), mask, strict=True):
        expected = torch.linalg.solve(h[kept][:, kept], (h @ w0)[kept])
        torch.testing.assert_close(w[kept].double(), expected, rtol=1e-3, atol=1e-3)
        assert not w[~kept].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 12))
def test_more_iterations_are_never_worse(seed, iterations):
    dense, hessian, mask = problem(seed, tokens=30)
    h = damped(hessian, 0.01)
    errors = [
        error(refit(dense, hessian, mask, dense * mask, iterations=n), dense, h) for n in (iterations, iterations + 1)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-4)


def test_it_improves_on_a_sweep_of_obs():
    dense, hessian, _ = problem(3, rows=32, columns=64, tokens=400)
    swept = prune_obs(dense, hessian, TWO_FOUR)
    w = refit(dense, hessian, swept.mask, swept.weight)
    assert error(w, dense, hessian) < 0.95 * error(swept.weight, dense, hessian)


def test_a_mask_of_ones_gives_the_dense_weight_back():
    dense, hessian, _ = problem(1)
    torch.testing.assert_close(refit(dense, hessian, torch.ones_like(dense), dense), dense)
    start = torch.zeros_like(dense)
    torch.testing.assert_close(
        refit(dense, hessian, torch.ones_like(dense), start, iterations=80), dense, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_hessians_without_full_rank(tokens):
    dense, hessian, mask = problem(2, tokens=max(1, tokens))
    hessian = hessian * (tokens > 0)
    w = refit(dense, hessian, mask, dense * mask)
    assert torch.isfinite(w).all() and not w[~mask].any()
    assert error(w, dense, hessian) <= error(dense * mask, dense, hessian) * (1 + 1e-4)


def test_rows_without_survivors_stay_empty():
    dense, hessian, mask = problem(4)
    mask[0] = False
    w = refit(dense, hessian, mask, dense * mask)
    assert not w[0].any() and w[1].any()


def test_half_precision_in_float32_out():
    dense, hessian, mask = problem(5)
    low = dense.bfloat16()
    got = refit(low, hessian, mask, low * mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, refit(low.float(), hessian, mask, low.float() * mask))
