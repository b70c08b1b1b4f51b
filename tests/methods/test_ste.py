"""SR-STE and AST: masks, where the decay goes in, flip rates."""

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.optimizers import AnnealedDecayAdamW
from sparseforge_fx.methods.ste import StraightThroughConfig, ast_preset, sr_ste_preset
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, hard_mask

VALUES = [[0.1, -3.0, 2.0, -0.5, 1.0, 4.0, -1.5, 0.0]]


def weight(values=None):
    value = nn.Parameter(torch.tensor(VALUES if values is None else values))
    return MaskedWeight("w", value, torch.ones_like(value.detach()), 1)


def test_the_first_mask_is_by_magnitude():
    w = weight()
    ast_preset(100).build([w])
    assert w.mask.tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]


def test_the_authors_constants_on_the_authors_run():
    """AST's runs on GPT-2, of 40,000 steps; in a short run K is the same share of it, and lambda adds up to as much."""
    whole, short = ast_preset(40_000), ast_preset(100)
    assert (whole.update_every, whole.decay, whole.decay_warmup, whole.decay_joins) == (10, 1e-4, 0.25, "update")
    assert (short.update_every, short.decay, short.decay_warmup) == (1, pytest.approx(0.04), 0.25)
    assert 100 * short.decay == pytest.approx(40_000 * whole.decay)
    assert (sr_ste_preset(40_000).update_every, sr_ste_preset(40_000).decay) == (1, 2e-4)
    assert 100 * sr_ste_preset(100).decay == pytest.approx(40_000 * 2e-4)


def test_masks_follow_the_weights_every_k_steps_and_to_the_end():
    w = weight()
    method = sr_ste_preset(25, update_every=10).build([w])
    with torch.no_grad():
        w.weight[0, 0] = 9.0
    for step in range(9):
        method.after_step(step)
        assert w.mask[0, 0] == 0
    method.after_step(9)
    assert w.mask.tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]
    assert method.metrics()["flip_rate"] == method.metrics()["initial_flip_rate"] == 2 / 8
    for step in range(10, 20):
        method.after_step(step)
    assert method.metrics()["flip_rate"] == 0 and method.metrics()["initial_flip_rate"] == 2 / 8
    with torch.no_grad():
        w.weight[0, 0] = 0.0
    for step in range(20, 25):
        method.after_step(step)
    method.fix()
    assert method.fixed and (w.mask.view(-1, 4).sum(1) == 2).all()


def test_the_decay_of_sr_ste_is_in_the_gradient():
    w = weight()
    method = sr_ste_preset(100, decay=0.5).build([w])
    optimizer = method.optimizer([w.weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    w.weight.grad = torch.zeros_like(w.weight)
    optimizer.step()
    pruned = torch.tensor([[0.1, 0.0, 0.0, -0.5, 1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(w.weight.grad, 0.5 * pruned)
    torch.testing.assert_close(optimizer.state[w.weight]["exp_avg"], 0.05 * pruned)


def test_the_decay_of_ast_grows_over_a_quarter_of_the_run():
    method = ast_preset(100, decay=0.4).build([weight()])
    values = []
    for step in range(100):
        values.append(method.decay())
        method.after_step(step)
    assert values[0] == 0 and values[10] == pytest.approx(0.16) and values[25] == values[99] == 0.4
    assert isinstance(method.optimizer([method.weights[0].weight], lr=1e-3), AnnealedDecayAdamW)
    constant = sr_ste_preset(100).build([weight()])
    assert constant.decay() == pytest.approx(0.08)


def test_a_layerwise_start_keeps_its_mask():
    w = weight(
        [[0.0, 0.3, 0.0, 0.1]]
    )  # what a layer-wise method left: a mask that magnitude of the dense would not give
    w.mask.copy_(torch.tensor([[0.0, 1, 0, 1]]))
    method = ast_preset(100, start="sparsegpt").build([w])
    method.start_from({"w": torch.tensor([[9.0, 0.3, 8.0, 0.1]])})
    assert w.mask.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(4, 8), Pattern(16, 32)])
def test_other_patterns(pattern):
    torch.manual_seed(0)
    w = weight(torch.randn(4, 64).tolist())
    ast_preset(10, pattern).build([w])
    assert torch.equal(w.mask.bool(), hard_mask(w.weight.abs(), pattern))


def test_a_resumed_run_goes_on():
    w = weight()
    method = ast_preset(40).build([w])
    for step in range(15):
        method.after_step(step)
    other = ast_preset(40).build([weight()])
    other.load_state(method.state())
    assert other.step == 15 and other.decay() == method.decay() and torch.equal(other.first["w"], method.first["w"])
    with pytest.raises(SparseForgeError, match="decay"):
        ast_preset(40, decay=1.0).build([weight()]).load_state(method.state())


@pytest.mark.parametrize("changes", [{"update_every": 0}, {"decay_joins": "loss"}, {"start": "magic"}])
def test_constants_that_mean_nothing(changes):
    with pytest.raises(SparseForgeError):
        StraightThroughConfig(steps=10, **changes)
