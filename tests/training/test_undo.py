"""Whatever ends a run after its start leaves the model as it was, to the bit, and says so."""

import copy
import sys

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import AS_IT_WAS, SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods import layerwise, learned
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.undo import dense_again_on_error, put_back

QUIET = {"steps": 4, "batch_size": 2, "length": 12, "calibration": 4, "compile": False, "show_progress": False}


class Stop(Exception):
    """What a user's own code raises."""


def everything(model):
    """All of a model that a run touches, to be compared after it."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": [
            (id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "hooks": [(sorted(p._backward_hooks or ())) for p in model.parameters()],
        "modules": [(name, m.training, list(m._forward_hooks)) for name, m in model.named_modules()],
    }


def assert_same(model, before):
    now = everything(model)
    assert list(now["values"]) == list(before["values"])
    for name, value in before["values"].items():
        bits = [t.reshape(-1).view(torch.uint8) for t in (value, now["values"][name])]
        assert torch.equal(*bits), name
    for (key, flag, grad), (key2, flag2, grad2) in zip(now["parameters"], before["parameters"], strict=True):
        assert (key, flag) == (key2, flag2)
        assert (grad is None) == (grad2 is None) and (grad is None or torch.equal(grad, grad2))
    assert now["hooks"] == before["hooks"] and now["modules"] == before["modules"]


@pytest.fixture
def model_in_use(captured_once):
    """In training mode but for one layer, with gradients, a frozen norm, a hook, and weights of -0.0."""
    model = captured_once("llama").model.train()
    model.model.layers[0].eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :4] = -0.0
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    model.model.norm.weight.requires_grad_(False)
    hook = model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient)
    yield model
    hook.remove()


METHODS = {
    "alps start": {},
    "fading": {"quench_end": 0.8, "softness_start": 0.6},
    "paper": {"preset": "paper"},
    "ast with branches": {"method": "ast", "slorb_block": 16},
    "cast": {"method": "cast"},
    "maskllm": {"method": "maskllm"},
    "no teacher": {"method": "gmp", "objective": Distillation(kl=0.0)},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_error_on_the_way(method, model_in_use):
    model = model_in_use
    before = everything(model)

    def on_step(step, row):
        if step == 2:
            raise Stop

    ids = torch.randint(3, 97, (8, 12))
    with pytest.raises(Stop) as error:
        sf.sparsify(model, ids, on_step=on_step, lr=1e-2, **QUIET | METHODS[method])
    assert_same(model, before)
    changed = method != "maskllm"  # which trains logits beside the weights
    assert getattr(error.value, "__notes__", []) == [AS_IT_WAS] * changed


@pytest.mark.parametrize("where", ["the loss", "finalize", "after the masks were folded", "attaching branches"])
def test_other_places_to_fail(monkeypatch, where, model_in_use):
    model = model_in_use
    before = everything(model)
    data = torch.randint(3, 97, (8, 12))
    if where == "the loss":
        data = [{"input_ids": data[:2]}, {"input_ids": data[2:4], "labels": torch.full((2, 12), 96)}]
        real = sf.SparseModel.loss
        calls = []

        def loss(self, *args, **options):
            calls.append(1)
            found = real(self, *args, **options)
            return found if len(calls) < 3 else found._replace(total=found.total * float("nan"))

        monkeypatch.setattr(sf.SparseModel, "loss", loss)
    else:
        module = sys.modules["sparseforge_fx.training.prepare"]
        name = {
            "finalize": "harden_passes",
            "after the masks were folded": "check_pattern",
            "attaching branches": "attach",
        }
        real_one, count = getattr(module, name[where]), []

        def failing(*args, **options):
            count.append(1)
            if len(count) == 3 or where == "finalize":
                raise KeyboardInterrupt
            return real_one(*args, **options)

        monkeypatch.setattr(module, name[where], failing)
    with pytest.raises((SparseForgeError, KeyboardInterrupt)) as error:
        sf.sparsify(model, data, method="ast", slorb_block=16, lr=1e-2, **QUIET)
    assert_same(model, before)
    said = str(error.value) if isinstance(error.value, SparseForgeError) else error.value.__notes__[0]
    assert said.endswith(AS_IT_WAS) and "\n" not in said


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_methods_without_training(monkeypatch, method, model_in_use):
    model = model_in_use
    before = everything(model)
    real, count = sys.modules["sparseforge_fx.training.one_shot"].check_pattern, []

    def failing(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sys.modules["sparseforge_fx.training.one_shot"], "check_pattern", failing)
    data = None if method == "magnitude" else torch.randint(3, 97, (8, 12))
    options = {k: v for k, v in QUIET.items() if k not in ("steps", "compile")}
    with pytest.raises(KeyboardInterrupt) as error:
        sf.sparsify(model, data, method=method, **options)
    assert_same(model, before)
    assert error.value.__notes__ == [AS_IT_WAS]


def test_prepare_that_fails_in_its_calibration(monkeypatch, model_in_use):
    """The hooks of the method are on the weights by then."""
    model = model_in_use
    before = everything(model)

    def failing(self, dense):
        for w in self.weights:
            w.weight.zero_()
        raise Stop

    monkeypatch.setattr(learned.LearnedMasks, "start_from", torch.no_grad()(failing))
    batch = {"input_ids": torch.randint(3, 97, (2, 12))}
    with pytest.raises(Stop):
        sf.prepare(model, batch, sf.configure("maskllm", 4, start="wanda"), calibration=[batch])
    assert_same(model, before)


def test_what_was_wrong_before_the_start_is_not_called_a_return(model_in_use):
    model = model_in_use
    with pytest.raises(SparseForgeError) as error:
        sf.sparsify(model, torch.randint(3, 97, (8, 12)), method="ast", slorb_block=7, **QUIET)
    assert AS_IT_WAS not in str(error.value)


def test_gradients_of_another_loss_do_not_join_the_first_step(captured_once):
    weights = []
    for stale in (True, False):
        model = captured_once("mlp").model
        if stale:
            model(torch.randn(2, 16)).sum().backward()
        data = [torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        sf.sparsify(model, data, method="ast", **QUIET)
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_buffers_that_the_graph_writes():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.LayerNorm(16)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            return self.b(self.a(x))

    model, x = Counting().eval(), torch.randn(2, 16)
    program = capture(model, x)
    before = everything(model)
    with pytest.raises(Stop), dense_again_on_error(program):
        program.module()(x)
        assert model.seen == before["values"]["seen"] + 1
        raise Stop
    assert_same(model, before)


def test_the_teacher_is_the_copy(tiny):
    """Beside the teacher no second copy of the weights is made."""
    found = tiny("llama")
    model, sparse = found.model, found.sparse(sf.annealed_preset(4))
    teacher = {id(t) for t in sparse.teacher.module.parameters()}
    assert all(id(copy_) in teacher for _, copy_ in sparse.copies())
    assert {id(p) for p, _ in sparse.copies()} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.fixture
def magnitude_pruned(captured_once):
    model = captured_once("llama").model
    return sf.sparsify(model).model


@pytest.mark.parametrize("what", ["quantize", "lower_modules"])
def test_deploying_in_place_that_fails_half_way(monkeypatch, magnitude_pruned, what):
    model = copy.deepcopy(magnitude_pruned)
    before = everything(copy.deepcopy(model))["values"]
    count = []

    def third_fails(real):
        def failing(*args, **options):
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt
            return real(*args, **options)

        return failing

    if what == "quantize":
        from sparseforge_fx.deploy.lowering import quantize

        monkeypatch.setattr(quantize, "round_weight", third_fails(quantize.round_weight))
        with pytest.raises(KeyboardInterrupt):
            sf.quantize(model)
    else:
        from sparseforge_fx.deploy.lowering import modules

        monkeypatch.setattr(modules, "pack", third_fails(modules.pack))
        with pytest.raises(KeyboardInterrupt):
            sf.lower_modules(model, gate=False)
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[k], v) and type(now[k]) is type(v) for k, v in before.items())


def test_put_back_says_what_it_did():
    tensor = torch.zeros(3)
    assert not put_back([(tensor, tensor.clone())])
    assert put_back([(tensor, torch.ones(3))]) and tensor.all()


def test_a_failing_solver_changes_no_mask():
    weight = layerwise.MaskedWeight("a", torch.ones(4, 4), torch.ones(4, 4), 1)
    with pytest.raises(Stop), layerwise.undone_on_error([weight]):
        weight.weight[0], weight.mask[0] = 5, 0
        raise Stop
    assert (weight.weight == 1).all() and (weight.mask == 1).all()
