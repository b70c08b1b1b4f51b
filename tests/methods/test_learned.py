"""MaskLLM and MaskPro: probabilities against enumeration, gradients against autograd, limits, and that they learn."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.soft_masked_linear import soft_masked_linear
from sparseforge_fx.methods.learned import MaskLLMConfig, MaskProConfig, log_probability
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def masked(rows=4, columns=8, seed=0, value=None, dim=1):
    torch.manual_seed(seed)
    value = torch.randn(rows, columns) if value is None else value
    weight = nn.Parameter(value if dim else value.t().contiguous())
    return MaskedWeight("w", weight, torch.ones_like(weight.detach()), dim)


# -- MaskPro's probability ---------------------------------------------------------------------------------------------
def enumerated(logits, kept):
    """Probability of a set, over all ordered draws."""
    p = logits.softmax(-1)
    total = torch.zeros(())
    for order in itertools.permutations(kept):
        left, product = torch.ones(()), torch.ones(())
        for i in order:
            product, left = product * p[i] / left, left - p[i]
        total = total + product
    return total


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
def test_log_probability_is_that_of_all_ordered_draws(n, m):
    torch.manual_seed(n + m)
    logits = (2 * torch.randn(m, dtype=torch.float64)).requires_grad_()
    probabilities = []
    for kept in itertools.combinations(range(m), n):
        mask = torch.tensor([i in kept for i in range(m)])
        mine = log_probability(logits, mask, n)
        expected = enumerated(logits, kept).log()
        torch.testing.assert_close(mine, expected)
        (a,), (b,) = torch.autograd.grad(mine, logits), torch.autograd.grad(expected, logits)
        torch.testing.assert_close(a, b)
        assert abs(a.sum()) < 1e-9
        probabilities.append(mine.exp())
    torch.testing.assert_close(sum(probabilities), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("logits", "kept", "probability", "gradient"),
    [
        ([0, 0, 0, 0], (0, 1), 1 / 6, (0.583333, 0.583333, -0.583333, -0.583333)),
        ([1, 0, 0, 0], (0, 1), 0.259206, (0.300704, 0.621351, -0.461028, -0.461028)),
        ([1, -0.5, 0.3, 2], (2, 3), 0.254036, (-0.707248, -0.157808, 0.687064, 0.177992)),
    ],
)
def test_log_probability_by_hand(logits, kept, probability, gradient):
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    value = log_probability(logits, torch.tensor([i in kept for i in range(4)]), 2)
    value.backward()
    assert value.exp().item() == pytest.approx(probability, abs=1e-6)
    assert logits.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_a_sure_group_has_no_nan():
    logits = torch.tensor([[60.0, 60, 0, 0], [200, 0, 0, 0]], requires_grad=True)
    log_probability(logits, torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]), 2).sum().backward()
    assert torch.isfinite(logits.grad).all()


# -- MaskPro -----------------------------------------------------------------------------------------------------------
def test_maskpro_starts_with_its_first_mask_and_stays_near_it():
    w = masked(64, 64)
    method = MaskProConfig(steps=100).build([w])
    first = hard_mask(w.weight.abs(), TWO_FOUR)
    assert torch.equal(w.mask.bool(), first)
    method.after_step(0)
    assert (w.mask.view(-1, 4).sum(1) == 2).all()
    assert (w.mask.bool() != first).any(1).float().mean() < 0.05  # 1.4e-4 of the groups move at certainty 10


def test_draws_have_the_probability_that_the_gradient_assumes():
    w = masked(4000, 4, value=torch.zeros(4000, 4))
    method = MaskProConfig(steps=100).build([w])
    with torch.no_grad():
        method.logits["w"].copy_(torch.tensor([1.0, 0, 0, 0]).expand(4000, 1, 4))
    method.after_step(0)
    drawn = (w.mask[:, 0] * w.mask[:, 1]).mean().item()
    assert drawn == pytest.approx(0.259206, abs=4 * (0.2592 * 0.7408 / 4000) ** 0.5)


def test_policy_gradient_is_the_residual_less_its_average():
    w = masked()
    method = MaskProConfig(steps=10, certainty=0.0).build([w])
    method.after_step(0)
    drawn, seen = w.mask.clone(), []

    def again():
        seen.append(w.mask.clone())
        return torch.tensor(2.0)

    method.observe(torch.tensor(3.0), again)
    assert torch.equal(seen[0].bool(), hard_mask(w.weight.abs(), TWO_FOUR)) and torch.equal(w.mask, drawn)
    assert method.average == pytest.approx(0.01)
    sign = torch.where(drawn.view(4, 2, 4) > 0, 1.0, -1.0)
    torch.testing.assert_close(method.logits["w"].grad, 0.99 * 0.583333 * sign, rtol=1e-4, atol=1e-5)


def test_a_constant_loss_moves_nothing():
    method = MaskProConfig(steps=10).build([masked()])
    method.observe(torch.tensor(3.0), lambda: torch.tensor(3.0))
    assert not method.logits["w"].grad.any() and method.average == 0


def test_maskpro_finds_a_better_mask():
    """Loss: how many of the wanted weights are kept; the first mask keeps none."""
    torch.manual_seed(0)
    w = masked(1, 4, value=torch.tensor([[4.0, 3.0, 0.2, 0.1]]))
    wanted = torch.tensor([[0.0, 0, 1, 1]])
    method = MaskProConfig(steps=400, certainty=1.0, logit_lr=0.1).build([w])
    optimizer = method.optimizer(method.parameters(), lr=1.0)
    for step in range(399):
        method.observe(-(w.mask * wanted).sum(), lambda: -(w.mask * wanted).sum())
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    method.fix()
    assert w.mask.tolist() == wanted.tolist()


# -- MaskLLM -----------------------------------------------------------------------------------------------------------
def test_soft_masks_are_mixtures_of_legal_patterns():
    w = masked()
    method = MaskLLMConfig(steps=10).build([w])
    for step in range(9):
        assert (w.mask >= 0).all() and (w.mask <= 1).all()
        torch.testing.assert_close(w.mask.view(-1, 4).sum(1), torch.full((8,), 2.0))
        method.after_step(step)
    method.after_step(9)
    assert method.fixed and check_pattern(w.mask, TWO_FOUR) and set(w.mask.unique().tolist()) == {0.0, 1.0}


def test_limits_of_the_temperature():
    w = masked(64, 64)
    cold = MaskLLMConfig(steps=10, temperature_start=1e-3, temperature_end=1e-3).build([w])
    assert torch.minimum(w.mask, 1 - w.mask).mean() < 0.01, "one pattern alone"
    cold.after_step(0)
    MaskLLMConfig(steps=10, temperature_start=1e6, temperature_end=1e6).build([w])
    torch.testing.assert_close(w.mask, torch.full_like(w.mask, 0.5), rtol=0, atol=1e-3)  # all patterns alike


def test_the_prior_is_the_first_mask():
    """Added logits alpha std (1, 0, 0, 0, 0, -1) for 1100; at scale 100 and std 0.01 P(prior) is 0.832 (no spread)."""
    w = masked(8000, 4, value=torch.tensor([[4.0, 3.0, 0.2, 0.1]]).repeat(8000, 1))
    method = MaskLLMConfig(steps=10, temperature_start=1e-4).build([w])
    with torch.no_grad():
        method.logits["w"].copy_(torch.tensor([0.03, 0, 0, 0, 0, -0.03]).view(6, 1, 1).expand(6, 8000, 1))
        method._draw()
    share = (w.mask[:, :2].sum(1) > 1.5).float().mean().item()
    assert share == pytest.approx(0.832205, abs=0.02)
    fresh = MaskLLMConfig(steps=10).build([masked(8000, 4, value=w.weight.detach().clone())])
    mean = fresh.logits["w"].detach().mean((1, 2))
    assert mean.tolist() == pytest.approx([0.03, 0, 0, 0, 0, -0.03], abs=1e-3)


def test_shares_are_the_gumbel_softmax_and_never_denormal():
    w = masked(16, 16)
    method = MaskLLMConfig(steps=10).build([w])
    for temperature in (4.0, 0.05):
        method.config = replace(method.config, temperature_start=temperature)
        height = (100 * method.logits["w"].double() + method._noise["w"].double()) / temperature
        shares = method._shares(w)
        torch.testing.assert_close(shares, height.softmax(0).flatten(1).float(), rtol=2e-4, atol=1e-20)
        assert shares.min() > 1e-30


@pytest.mark.parametrize("dim", [0, 1])
def test_logits_get_the_gradient_of_the_masked_loss(dim):
    w = masked(dim=dim)
    method = MaskLLMConfig(steps=10, keep_large=0.1).build([w])
    x, g = torch.randn(5, 8), torch.randn(5, 4)
    soft_masked_linear(x, w.weight, w.mask, transposed=not dim).backward(g)
    assert not w.weight.grad.any()
    mask = method._mixture(w, method._shares(w))
    value = w.weight.detach()
    effective = value * mask if dim else (value * mask).t()
    objective = ((x @ effective.t()) * g).sum() - 0.1 * (value * mask).square().sum()
    (expected,) = torch.autograd.grad(objective, method.logits["w"])
    torch.testing.assert_close(method.logits["w"].grad, expected, rtol=1e-4, atol=1e-5)


def test_temperature_and_scale_go_linearly():
    """The logits' factor is scale / temperature, the noise's 1 / temperature (table 7: 100 to 500, 4 to 0.05)."""
    method = MaskLLMConfig(steps=10).build([masked()])
    for step, heat, scale in ((0, 4.0, 100.0), (5, 2.025, 300.0), (9, 0.445, 460.0)):
        method.step = step
        assert method._sharpness() == pytest.approx((scale / heat, 1 / heat))


def test_large_weights_are_rewarded_once_a_step():
    """Micro-batches whose losses say nothing, so that the gradient is the reward's alone."""
    w = masked()
    method = MaskLLMConfig(steps=10, keep_large=0.1).build([w])

    def rewards(count):
        method.logits["w"].grad = None
        for _ in range(count):
            (0 * soft_masked_linear(torch.randn(5, 8), w.weight, w.mask).sum()).backward()
        return method.logits["w"].grad.clone()

    once = rewards(1)
    assert once.any()
    method.after_step(0)
    mask = method._mixture(w, method._shares(w))
    (expected,) = torch.autograd.grad(-0.1 * (w.weight.detach() * mask).square().sum(), method.logits["w"])
    torch.testing.assert_close(rewards(3), expected, rtol=1e-4, atol=1e-5)


def test_maskllm_finds_a_better_mask():
    torch.manual_seed(0)
    value = torch.tensor([[1.0, 1.1, 1.0, 0.9]]).repeat(4, 2)
    w = masked(value=value)
    wanted = torch.tensor([0.0, 1, 0, 1]).repeat(4, 2)
    method = MaskLLMConfig(steps=200, prior=0.0).build([w])
    x = torch.randn(64, 8)
    target = x @ (value * wanted).t()
    optimizer = method.optimizer(method.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(200):
        (soft_masked_linear(x, w.weight, w.mask) - target).square().mean().backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    assert torch.equal(w.mask, wanted)


# -- both --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [MaskLLMConfig(steps=20), MaskProConfig(steps=20, certainty=1.0)])
def test_a_resumed_run_draws_the_same(config):
    w, v = masked(), masked()
    method = config.build([w])
    for step in range(5):
        method.after_step(step)
    other = config.build([v])
    v.mask.copy_(w.mask)
    other.load_state(method.state())
    for step in range(5, 8):
        method.after_step(step)
        other.after_step(step)
        assert torch.equal(w.mask, v.mask)


@pytest.mark.parametrize("config", [MaskLLMConfig(steps=20), MaskProConfig(steps=20)])
def test_a_layerwise_start_gives_its_mask_and_not_its_weights(config):
    w = masked()
    dense = w.weight.detach().clone()
    method = config.build([w])
    chosen = hard_mask(torch.rand(4, 8), TWO_FOUR)
    with torch.no_grad():
        w.weight.mul_(2 * chosen)
    w.mask.copy_(chosen)
    method.start_from({"w": dense})
    assert torch.equal(w.weight, dense)
    method.fix()
    assert (w.mask.bool() == chosen).float().mean() > 0.7


@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8)])
@pytest.mark.parametrize("kind", [MaskLLMConfig, MaskProConfig])
def test_other_patterns(kind, pattern):
    w = masked(4, 16)
    method = kind(steps=3, pattern=pattern).build([w])
    for step in range(3):
        method.after_step(step)
    assert (w.mask.view(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("pattern", [Pattern(8, 16), Unstructured(0.5)])
@pytest.mark.parametrize("kind", [MaskLLMConfig, MaskProConfig])
def test_patterns_that_cannot_be_learned(kind, pattern):
    with pytest.raises(SparseForgeError, match=f"{pattern}.*take N:M"):
        kind(steps=3, pattern=pattern)
