"""GMP and IMP: how much is gone when, and that it ends in the magnitude mask."""

import itertools

import pytest
import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.gradual import GradualConfig
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask


def weight(rows=16, columns=32, seed=0):
    torch.manual_seed(seed)
    return MaskedWeight("w", torch.randn(rows, columns), torch.ones(rows, columns), 1)


def densities(config, w):
    method = config.build([w])
    path = []
    for step in range(config.steps):
        method.after_step(step)
        path.append(w.mask.mean().item())
    return path, method


def test_cubic_ramp_takes_most_at_first():
    """Zhu and Gupta's eq. 1 at a quarter, a half and three quarters of its way: 0.289, 0.4375 and 0.492 of 0.5."""
    w = weight(64, 64)
    path, method = densities(GradualConfig(steps=100, end=0.8), w)
    assert [1 - path[i - 1] for i in (20, 40, 60, 80)] == pytest.approx([0.289062, 0.4375, 0.492188, 0.5], abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(path))
    assert method.fixed and path[-1] == 0.5


def test_rounds_take_equal_shares_of_what_is_left():
    w = weight(64, 64)
    path, _ = densities(GradualConfig(steps=40, ramp="rounds", end=0.8, rounds=4), w)
    left = sorted({round(p, 3) for p in path}, reverse=True)
    assert left == pytest.approx([0.5 ** (r / 4) for r in (1, 2, 3, 4)], abs=1e-3)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(8, 16), Unstructured(0.5)])
@pytest.mark.parametrize("ramp", ["cubic", "rounds"])
def test_with_weights_at_rest_it_ends_in_the_magnitude_mask(ramp, pattern):
    w = weight()
    densities(GradualConfig(steps=20, ramp=ramp, pattern=pattern), w)
    assert torch.equal(w.mask.bool(), hard_mask(w.weight.abs(), pattern))
    assert check_pattern(w.mask, pattern)


def test_what_is_gone_stays_gone():
    w = weight()
    config = GradualConfig(steps=20, end=1.0)
    method = config.build([w])
    for step in range(10):
        method.after_step(step)
    gone = w.mask == 0
    assert gone.any()
    with torch.no_grad():
        w.weight[gone] = 100.0
    for step in range(10, 20):
        method.after_step(step)
    assert not w.mask[gone].any()


def test_nothing_moves_between_updates():
    w = weight()
    path, _ = densities(GradualConfig(steps=20, end=1.0, update_every=5), w)
    assert path[4] != path[3] == path[0] == 1 and path[5] == path[4] and path[9] != path[8]


@pytest.mark.parametrize(
    "changes", [{"end": 0.0}, {"end": 1.5}, {"rounds": 0}, {"update_every": 0}, {"ramp": "square"}]
)
def test_constants_that_mean_nothing(changes):
    with pytest.raises(SparseForgeError):
        GradualConfig(steps=10, **changes)
