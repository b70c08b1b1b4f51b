"""CAST: a dense forward pass, scales that learn, candidates that fade, exact patterns at the end."""

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.soft_masked_linear import soft_masked_linear
from sparseforge_fx.methods.cast import CastConfig
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask


def masked(rows=6, columns=16, seed=0, dim=1):
    torch.manual_seed(seed)
    value = torch.randn(rows, columns)
    weight = nn.Parameter(value if dim else value.t().contiguous())
    return MaskedWeight("w", weight, torch.ones_like(weight.detach()), dim)


def train(method, w, x, target, steps, lr=1e-2):
    optimizer = method.optimizer([w.weight, *method.parameters()], lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for step in range(steps):
        y = soft_masked_linear(x, w.weight, w.mask, transposed=w.dim == 0)
        loss = (y - target).square().mean()
        loss.backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_forward_pass_is_dense_until_the_end():
    w = masked()
    method = CastConfig(steps=20).build([w])
    x = torch.randn(32, 16)
    target = x @ w.weight.detach().t()
    train(method, w, x, target, 19)
    assert w.mask.min() > 0.5 and method.metrics()["density"] == 0.5
    method.after_step(19)
    assert method.fixed and torch.equal(w.mask.bool(), method.kept["w"])


@pytest.mark.parametrize("dim", [0, 1])
def test_scales_get_the_gradient_of_their_blocks(dim):
    w = masked(dim=dim)
    method = CastConfig(steps=10).build([w])
    scale = torch.rand(6, 2) + 0.5
    with torch.no_grad():
        method.scales["w"].copy_(scale)
        spread = method._spread(w)
        w.mask.copy_(spread if dim else spread.t())
    x, g = torch.randn(5, 16), torch.randn(5, 6)
    soft_masked_linear(x, w.weight, w.mask, transposed=not dim).backward(g)

    value, a = (w.weight.detach() if dim else w.weight.detach().t()).clone().requires_grad_(), scale.requires_grad_()
    (x @ (value * a.repeat_interleave(8, 1)).t()).backward(g)
    torch.testing.assert_close(method.scales["w"].grad, a.grad)
    torch.testing.assert_close(w.weight.grad if dim else w.weight.grad.t(), value.grad)


def test_candidates_fade_and_the_pattern_is_exact_with_the_scales_in_the_weights():
    w = masked(rows=8, columns=32, seed=1)
    method = CastConfig(steps=200, l1=1.0).build([w])
    x = torch.randn(64, 32)
    target = x @ (w.weight.detach() * hard_mask(w.weight.detach().abs(), Pattern(2, 4))).t()
    first = method.metrics()["candidates"]
    train(method, w, x, target, 199)
    assert method.metrics()["candidates"] < 0.3 * first
    scales, before = method._spread(w).clone(), w.weight.detach().clone()
    method.fix()
    torch.testing.assert_close(w.weight, before * scales)
    assert all((s == 1).all() for s in method.parameters())
    assert check_pattern(w.mask, Pattern(2, 4)) and w.mask.sum() == w.mask.numel() / 2
    after = w.weight.detach().clone()
    method.fix()
    assert torch.equal(w.weight, after)


def test_candidates_are_chosen_every_ten_steps():
    w = masked()
    method = CastConfig(steps=100).build([w])
    kept = method.kept["w"].clone()
    with torch.no_grad():
        w.weight[~kept] += 100
    for step in range(9):
        method.after_step(step)
    assert torch.equal(method.kept["w"], kept)
    method.after_step(9)
    assert torch.equal(method.kept["w"], ~kept) and method.metrics()["flip_rate"] == 1


@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(4, 8), Unstructured(0.75)])
def test_other_patterns(pattern):
    w = masked(columns=16)
    method = CastConfig(steps=1, pattern=pattern).build([w])
    method.after_step(0)
    assert torch.equal(w.mask.bool(), hard_mask(w.weight.abs(), pattern))


def test_one_scale_per_row_where_two_would_cut_a_group():
    assert CastConfig(steps=5).build([masked(columns=12)]).scales["w"].shape == (6, 1)


@pytest.mark.parametrize("changes", [{"blocks": 0}, {"update_every": 0}])
def test_constants_that_mean_nothing(changes):
    with pytest.raises(SparseForgeError):
        CastConfig(steps=10, **changes)
