"""lower_modules: packed linears inside the model that it was, which goes on generating and training around them."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels import huge_pages
from sparseforge_fx.pattern import TWO_FOUR, hard_mask


def sparse_copy(found):
    model = copy.deepcopy(found.model)
    sf.sparsify(model, example_inputs=found.example)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("gpt2", 4), ("opt", 6)])
def test_generate_gives_the_same_tokens(captured_once, name, count):
    found = captured_once(name)
    model, dense = sparse_copy(found)
    report = sf.lower_modules(model, gate=False)
    assert len(report["sites"]) == count == sum(isinstance(m, SparseLinear) for m in model.modules())
    assert [s["name"] for s in report["skipped"]] == ["lm_head"]
    assert report["lowered_bytes"] <= 0.6 * report["dense_bytes"]
    assert report["scratch_bytes"] == max(s["out"] * s["in"] * 4 for s in report["sites"])
    batch = found.batch()
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), dense.generate(**batch, **options))


def test_the_dense_weight_is_there_to_look_at(captured_once):
    found = captured_once("mlp")
    model, dense = sparse_copy(found)
    sf.lower_modules(model, gate=False)
    assert torch.equal(model[0].weight, dense[0].weight) and model[0].bias is not None
    assert {"0.weight_values", "0.weight_bitmask", "0.bias"} <= set(model.state_dict())
    assert not {"0.weight"} & set(model.state_dict())


def test_gradients_reach_what_is_around(captured_once):
    found = captured_once("mlp")
    model, dense = sparse_copy(found)
    sf.lower_modules(model, gate=False)
    x = found.batch().requires_grad_()
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    (want,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_export(captured_once):
    found = captured_once("mlp")
    model, dense = sparse_copy(found)
    sf.lower_modules(model, gate=False)
    program = torch.export.export(model, (found.batch(),))
    torch.testing.assert_close(program.module()(found.batch()), dense(found.batch()), rtol=1e-4, atol=1e-5)


def test_the_gate(captured_once):
    found = captured_once("mlp")
    model, _ = sparse_copy(found)
    shape = cost_table.Shape(24, 16, "float32")
    table = cost_table.as_table([cost_table.Timing(shape, "rows", 1, 15.0, (15.0, 15.0), 10.0, (10.0, 10.0))])
    report = sf.lower_modules(model, table=table, tokens=[1])
    assert [s["name"] for s in report["sites"]] == ["0"]
    assert {s["name"]: s["reason"] for s in report["skipped"]} == {
        "2": "gate: not measured at 1 tokens", "4": "not 2:4: a group of four has more than two non-zeros",
    }  # fmt: skip
    assert isinstance(model[2], nn.Linear)


def test_what_cannot_be_replaced_keeps_its_reason():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.LayerNorm(8))
    net[1].weight = net[0].weight
    net[3].register_forward_hook(lambda *_: None)
    sf.sparsify(net, example_inputs=torch.randn(2, 8), exclude=["4"])
    report = sf.lower_modules(net, gate=False)
    assert [s["name"] for s in report["sites"]] == ["2"]
    assert {s["name"]: s["reason"] for s in report["skipped"]} == {
        "0": "its weight belongs to another module, too",
        "1": "its weight belongs to another module, too",
        "3": "it has hooks, or a forward of its own, which a packed linear would not call",
        "4": "not 2:4: a group of four has more than two non-zeros",
    }


class Twice(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


HOOKS = {
    "a forward of its own": lambda linear: accelerate.hooks.add_hook_to_module(linear, Twice()),
    "backward": lambda linear: linear.register_full_backward_hook(lambda *_: None),
    "before backward": lambda linear: linear.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("pack", [lambda m: sf.lower_modules(m, gate=False), sf.quantize], ids=["lower", "quantize"])
def test_linears_with_hooks_stay(kind, pack):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sf.sparsify(net, method="magnitude", example_inputs=torch.zeros(1, 8))
    HOOKS[kind](net[1])
    x = torch.randn(4, 8)
    expected = net(x)
    report = pack(net)
    assert [s["name"] for s in report["sites"]] == ["0"] and "hooks" in report["skipped"][0]["reason"]
    torch.testing.assert_close(net(x), expected, rtol=0.1, atol=0.05)


def test_nothing_to_lower():
    with pytest.raises(SparseForgeError, match="nothing to lower: 0: not 2:4"):
        sf.lower_modules(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(SparseForgeError, match="wrap it"):
        sf.lower_modules(nn.Linear(8, 8))


def test_what_is_packed_stays_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sf.sparsify(model, method="magnitude", example_inputs=torch.zeros(1, 8))
    sf.lower_modules(model, gate=False)
    before = dict(model.named_modules())
    report = sf.lower_modules(model)
    assert report["sites"] == [] and report["lowered_bytes"] == 0 and dict(model.named_modules()) == before
    assert report["notes"] == [] == sf.lower(model, torch.zeros(1, 8)).report["notes"]
    for given in ({"tokens": [1]}, {"table": {}}):
        told = [f"{name} is given and not used: all 2:4 linears are packed already" for name in given]
        assert sf.lower_modules(model, **given)["notes"] == told
        assert sf.lower(model, torch.zeros(1, 8), **given).report["notes"] == told
    with pytest.raises(SparseForgeError, match="nowhere"):
        sf.lower_modules(model, target="nowhere")


@pytest.mark.parametrize("again", [lambda m: sf.lower_modules(m, gate=False), sf.quantize], ids=["lower", "quantize"])
def test_what_is_packed_stays_where_it_is(monkeypatch, again):
    """Other models may hold the same tensors, and other processes."""
    monkeypatch.setattr(huge_pages, "PAGE", 4096)
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 8))
    for linear in model[:2]:
        linear.weight.data *= hard_mask(linear.weight.abs(), TWO_FOUR)
    sf.lower_modules(model, gate=False)
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert len(before) == 4
    model[2].weight.data *= hard_mask(model[2].weight.abs(), TWO_FOUR)
    assert [site["name"] for site in again(model)["sites"]] == ["2"]
    after = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert {name: after[name] for name in before} == before
