"""prepare / step / finalize for a loop of one's own."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import own_loop
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.training import prepare
from sparseforge_fx.training.distillation import Distillation

TWO_FOUR = sf.SparseForgeConfig(steps=1).pattern


def dims(found):
    return {s.fqn: s.reduction_dim for s in found.sites if s.reason is None}


# -- the loop --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_own_loop_learns_and_ends_exact(captured_once, name):
    found = captured_once(name)
    config = sf.annealed_preset(30)
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


@pytest.mark.parametrize("method", ["gmp", "imp", "sr-ste", "ast", "cast", "maskllm"])
def test_own_loop_with_the_optimizer_of_a_method(captured_once, method):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.configure(method, steps=12, **START.get(method, {})))
    optimizer = sparse.optimizer(lr=3e-3)
    batch = found.batch(rows=4)
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    sparse.train()
    for _ in range(12):
        sparse(**batch).loss.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    model = sf.finalize(sparse)
    assert all(check_pattern(model.get_parameter(f), TWO_FOUR, d) for f, d in dims(found).items())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p[p != 0], before[n][p != 0])}
    assert not moved if method == "maskllm" else moved  # MaskLLM freezes the weights


START = {"maskllm": {"start": "dense"}}


@pytest.mark.parametrize("method", ["sr-ste", "ast", "cast", "maskllm"])
def test_another_optimizer_is_refused_where_it_would_leave_half_of_the_method_out(captured_once, method):
    found = captured_once("mlp")
    sparse = sf.prepare(found.model, found.example, sf.configure(method, steps=2, **START.get(method, {})))
    sparse.train()(found.batch())
    with pytest.raises(SparseForgeError, match=r"sparse\.optimizer\(lr"):
        sparse.step()
    sparse.release()


@pytest.mark.parametrize("method", ["cast", "maskllm"])
def test_what_a_method_trains_moves_with_the_model(captured_once, method):
    sparse = sf.prepare(
        nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 4)),
        torch.randn(2, 16),
        sf.configure(method, steps=2, **START.get(method, {})),
    )
    optimizer = sparse.optimizer(lr=1e-3)
    sparse.double().train()
    assert {p.dtype for p in sparse.method.parameters()} == {torch.float32}  # whatever the model's dtype is
    assert {id(p) for p in sparse.method.parameters()} <= {id(p) for g in optimizer.param_groups for p in g["params"]}
    sparse(torch.randn(3, 16).double())
    sparse.last_loss.total.backward()
    optimizer.step()
    sparse.step()
    sparse.release()


def test_losses_are_those_of_sparsify(captured_once):
    found = captured_once("llama")
    config = sf.annealed_preset(10)
    plain = sf.prepare(found.model, found.example, config).train()(**found.batch()).loss
    reverse = sf.prepare(found.model, found.example, config, objective=Distillation(divergence="reverse_kl")).train()
    reverse.method.weights[0].mask.mul_(0.5)
    assert reverse(**found.batch()).loss != plain
    features = sf.prepare(
        found.model, found.example, config, objective=Distillation(features="squarehead", feature_weight=2.0)
    ).train()
    features.method.weights[0].mask.mul_(0.5)
    assert features(**found.batch()).loss > plain
    with pytest.raises(SparseForgeError, match="divergence"):
        sf.prepare(found.model, found.example, config, objective=Distillation(divergence="js"))


# -- what is refused -------------------------------------------------------------------------------------------------
def test_no_config():
    with pytest.raises(SparseForgeError, match="annealed_preset"):
        sf.prepare(nn.Linear(4, 4), torch.randn(2, 4))


def test_maskpro_has_no_gradients_for_a_loop(captured_once):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match=r"sparsify\(\)"):
        sf.prepare(found.model, found.example, sf.configure("maskpro", steps=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sparsegpt"}, "does not train"),
        ({"method": "ast", "gate": "site"}, "no option gate"),
        ({"method": "ast", "preset": "alps+kd"}, "unknown preset"),
        ({"method": "fst"}, "unknown method"),
    ],
)
def test_configurations_that_do_not_exist(arguments, message):
    with pytest.raises(SparseForgeError, match=message):
        sf.configure(steps=2, **arguments)


def test_obs_start_without_calibration(captured_once):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match="calibration"):
        sf.prepare(found.model, found.example, sf.alps_kd_preset(10, start="sparsegpt"))


def test_nothing_to_prune():
    with pytest.raises(SparseForgeError, match=r"nothing to prune.*0\.weight.*multiple of 4"):
        sf.prepare(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), torch.randn(2, 6), sf.annealed_preset(10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(captured_once, bad):
    found = captured_once("mlp")
    with torch.no_grad():
        found.model[0].weight[0, 0] = bad
    before = copy.deepcopy(found.model.state_dict())
    with pytest.raises(SparseForgeError, match=r"0\.weight holds NaN"):
        sf.prepare(found.model, found.example, sf.annealed_preset(10))
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in found.model.state_dict().items())


def test_include_and_exclude(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10), include=["*mlp*"], exclude=["*layers.0*"])
    assert [w.fqn for w in sparse.method.weights] == [
        f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    ]


def test_linears_that_are_packed():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16)), torch.randn(2, 16)
    sf.sparsify(model, example_inputs=x)
    assert sf.lower_modules(model, gate=False)["sites"]
    with pytest.raises(SparseForgeError, match=r"packed: start from the dense model \(model.dequantize"):
        sf.sparsify(model, example_inputs=x)


# -- calibration and teacher -----------------------------------------------------------------------------------------
LAYERWISE = {"start": "sparsegpt", "reorder": False, "reconstruct": 0}


@pytest.mark.parametrize("form", [list, iter, lambda batches: batches[0]])
def test_calibration_in_every_form_of_batches(captured_once, form):
    found = captured_once("mlp")
    batches = [found.batch(rows=8)] if form is not list else [found.batch(seed, rows=4) for seed in range(2)]
    given = form([{"input": b} for b in batches])
    sparse = sf.prepare(found.model, found.example, sf.alps_kd_preset(4, **LAYERWISE), calibration=given)
    assert all(check_pattern(w.mask, TWO_FOUR, w.dim) for w in sparse.method.weights)
    sparse.release()


@pytest.mark.parametrize("shape", [(6, 12), (72,)])
def test_token_ids_are_a_calibration_set(shape):
    model = nn.Embedding(80, 4)
    model.config = SimpleNamespace(max_position_embeddings=12)
    ids = torch.arange(72)
    batches = prepare._calibration(model, ids.view(shape))
    assert [len(b["input_ids"]) for b in batches] == [4, 2]
    assert sorted(row for b in batches for row in b["input_ids"].tolist()) == ids.view(6, 12).tolist()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "the data holds no batch"),
        (iter(()), "the data holds no batch"),
        (torch.randn(4, 16), "token ids must be a 1-D integer array"),
        (["some text"], "calibration is text"),
        (7, "data of type int is not understood"),
        ([[5, 6], [7, 8]], "a batch holds no tensor but int"),
    ],
)
def test_what_is_no_calibration_set(captured_once, calibration, message):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match=message):
        sf.prepare(found.model, found.example, sf.alps_kd_preset(4, **LAYERWISE), calibration=calibration)
    assert all(torch.equal(value, found.first[name]) for name, value in found.model.state_dict().items())


def test_what_has_no_part_in_the_loop_is_named(captured_once):
    found = captured_once("mlp")
    alone, teacher = Distillation(kl=0), copy.deepcopy(found.model)
    one = sf.prepare(
        found.model, found.example, sf.annealed_preset(4), objective=alone, calibration=[], teacher=teacher
    )
    assert [note.split(":")[0] for note in one.reader.notes] == [
        "calibration is given and not used", "teacher is given and not used",
    ]  # fmt: skip
    one.release()
    two = sf.prepare(
        found.model, found.example, sf.alps_kd_preset(4, **LAYERWISE), calibration=[found.batch()], teacher=teacher
    )
    assert two.reader.notes == []
    two.release()
