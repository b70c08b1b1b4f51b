"""prepare / step / finalize for a loop of one's own."""

import copy

import pytest
import torch
from tiny_models import own_loop
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import check_pattern

TWO_FOUR = sf.SparseForgeConfig(steps=1).pattern


def dims(found):
    return {s.fqn: s.reduction_dim for s in found.sites if s.reason is None}


# -- the loop --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_own_loop_learns_and_ends_exact(captured_once, name):
    found = captured_once(name)
    config = sf.paper_preset(30)
    sparse = sf.prepare(found.model, found.example, config)
    batch = found.batch(rows=4)
    losses = own_loop(sparse, [batch] * 30)
    assert losses[-1] < losses[0] - 0.3
    model = sf.finalize(sparse)
    assert model is found.model
    for fqn, dim in dims(found).items():
        value = model.get_parameter(fqn)
        assert check_pattern(value, TWO_FOUR, dim)
        assert torch.count_nonzero(value) == value.numel() // 2  # and no sparser
    dense = [n for n in found.first if n not in dims(found) and found.first[n].dim() == 2]
    assert dense and all(not check_pattern(model.state_dict()[n], TWO_FOUR) for n in dense)
    with torch.no_grad():  # the graph and the model that came back are the same function
        torch.testing.assert_close(sparse.eval()(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    hardened = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert sf.finalize(sparse) is model  # once more changes nothing
    assert all(torch.equal(p, hardened[n]) for n, p in model.named_parameters())


# -- what is refused -------------------------------------------------------------------------------------------------
def test_no_config():
    with pytest.raises(SparseForgeError, match="paper_preset"):
        sf.prepare(nn.Linear(4, 4), torch.randn(2, 4))


def test_obs_start_without_calibration(captured_once):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match="calibration"):
        sf.prepare(found.model, found.example, sf.tuned_preset(10, start="sparsegpt"))


def test_nothing_to_prune():
    with pytest.raises(SparseForgeError, match=r"nothing to prune.*0\.weight.*multiple of 4"):
        sf.prepare(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), torch.randn(2, 6), sf.paper_preset(10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(captured_once, bad):
    found = captured_once("mlp")
    with torch.no_grad():
        found.model[0].weight[0, 0] = bad
    before = copy.deepcopy(found.model.state_dict())
    with pytest.raises(SparseForgeError, match=r"0\.weight holds NaN"):
        sf.prepare(found.model, found.example, sf.paper_preset(10))
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in found.model.state_dict().items())


def test_include_and_exclude(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.paper_preset(10), include=["*mlp*"], exclude=["*layers.0*"])
    assert [w.fqn for w in sparse.method.weights] == [
        f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    ]
