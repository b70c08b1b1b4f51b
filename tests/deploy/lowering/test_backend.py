"""The Dynamo backend: found by its name, right on whole models, on broken graphs, in training and at any batch size."""

import copy
import logging

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import backend
from sparseforge_fx.graph.frame import Frame
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.pattern import TWO_FOUR, hard_mask


@pytest.fixture(autouse=True)
def fresh():
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.fixture
def lowered(monkeypatch):
    """The graphs that reach Inductor: a list of the sparse operators' activations in each."""
    seen = []

    def spy(module, inputs, config_patches):
        seen.append([n.args[6] for n in module.graph.find_nodes(op="call_function", target=OP)])
        return module.forward

    monkeypatch.setattr(backend, "compile_fx", spy)
    return seen


def compiled(model, **options):
    return torch.compile(model, backend="sparseforge", options={"gate": False, **options})


class Mlp(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.breaks = breaks

    def forward(self, x):
        y = F.silu(self.gate(x)) * self.up(x)
        if self.breaks:
            dynamo.graph_break()
        return self.down(y).relu()


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    model = Mlp()
    sf.sparsify(model, example_inputs=torch.randn(2, 16), include=["*"])
    return model


def test_torch_finds_it_by_name():
    assert "sparseforge" in dynamo.list_backends(exclude_tags=())


@torch.no_grad()
def test_merged_fused_and_compiled(mlp):
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(mlp)(x), mlp(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_passes_run(mlp, lowered):
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(mlp)(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert lowered == [["silu_mul", "relu"]]


@torch.no_grad()
def test_graph_breaks(mlp, lowered):
    broken = Mlp(breaks=True)
    broken.load_state_dict(mlp.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(broken)(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert lowered == [["silu_mul"], ["relu"]]


@torch.no_grad()
def test_one_recompilation_for_all_batch_sizes(mlp, lowered):
    fast = compiled(mlp)
    for rows in (3, 5, 7, 64):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert len(lowered) == 2  # the first size, then any


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_pass_through_and_none_is_lost(mlp, lowered, trains):
    mlp.requires_grad_(trains)
    x = torch.randn(5, 16, requires_grad=True)
    leaves = [x, *(mlp.parameters() if trains else ())]
    want = torch.autograd.grad(mlp(x).square().sum(), leaves)
    got = torch.autograd.grad(compiled(mlp)(x).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert lowered == ([[]] if trains else [["silu_mul", "relu"]])  # weights that train stay dense


@torch.no_grad()
def test_layers_of_the_same_code_share_a_graph_and_not_their_weights(lowered):
    layers = nn.ModuleList(Mlp() for _ in range(4))
    sf.sparsify(nn.Sequential(*layers[:3]), example_inputs=torch.randn(2, 16), include=["*"])
    x = torch.randn(5, 16)
    for layer in layers:
        want = layer(x)
        layer.compile(backend="sparseforge", options={"gate": False})
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert lowered in ([["silu_mul", "relu"], []], [["silu_mul", "relu"]] * 3 + [[]])  # the last layer is dense


@torch.no_grad()
def test_a_weight_that_changes_is_packed_anew(mlp, lowered):
    fast, x = compiled(mlp), torch.randn(5, 16)
    fast(x)
    mlp.down.weight.mul_(2)
    torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)
    mlp.down.weight.data = mlp.down.weight.data * 2
    torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)
    mlp.down.weight.add_(1)  # no longer 2:4
    torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)
    mlp.load_state_dict({k: v * 0 for k, v in mlp.state_dict().items()})
    torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)


def test_weights_made_in_inference_mode(lowered):
    with torch.inference_mode():
        model = Mlp()
        x = torch.randn(5, 16)
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            linear.weight.mul_(hard_mask(linear.weight.abs(), TWO_FOUR))
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert lowered == [["silu_mul", "relu"]]


@torch.no_grad()
def test_a_dense_model_goes_to_inductor_as_it_is(lowered):
    model, x = Mlp(), torch.randn(5, 16)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert lowered == [[]]


@torch.no_grad()
def test_what_cannot_be_lowered_runs_dense(mlp, lowered, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(Frame, "from_dynamo", refuse)
    x = torch.randn(5, 16)
    with caplog.at_level(logging.WARNING, logger=backend.__name__):
        torch.testing.assert_close(compiled(mlp)(x), mlp(x))
    assert lowered == [[]] and "no such operator" in caplog.text


@torch.no_grad()
def test_the_gate_measures_each_shape_once(mlp, lowered, monkeypatch):
    measured = []
    from sparseforge_fx.deploy.lowering import cost, cost_table

    def measure(shapes, tokens, *_):
        (shape,) = shapes
        measured.append(shape)
        ratio = 2.0 if shape.out_features == 48 else 0.5
        rows = {t: cost_table.Timing(shape, "rows", t, 10 * ratio, (1.0, 1.0), 10.0, (1.0, 1.0)) for t in tokens}
        return {shape: {"rows": rows}}

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(backend, "_measured", {})
    for _ in range(2):
        dynamo.reset()
        model = copy.deepcopy(mlp)
        torch.compile(model, backend="sparseforge", options={"tokens": [1, 8]})(torch.randn(5, 16))
    assert lowered == [["silu_mul"]] * 2
    assert sorted(measured) == [cost_table.Shape(16, 24, "float32"), cost_table.Shape(48, 16, "float32")]


@torch.no_grad()
def test_generate(captured_once):
    found = captured_once("llama")
    model = copy.deepcopy(found.model)
    sf.sparsify(model)
    batch = found.batch()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = model.generate(**batch, **options)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(**batch, **options), want)


@torch.no_grad()
def test_modes_are_inductors(mlp, monkeypatch):
    lower = backend._lower
    monkeypatch.setattr(backend, "_lower", lambda module, inputs, options: lower(module, inputs, {"gate": False}))
    patches = []
    compile_fx = backend.compile_fx
    monkeypatch.setattr(
        backend, "compile_fx", lambda *a, config_patches: patches.append(config_patches) or compile_fx(*a)
    )
    x = torch.randn(5, 16)
    for how in ({"mode": "reduce-overhead"}, {"options": {"gate": False, "mode": "reduce-overhead"}}, {}):
        dynamo.reset()
        fast = torch.compile(mlp, backend="sparseforge", **how)
        torch.testing.assert_close(fast(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert patches == [{"triton.cudagraphs": True}, {"triton.cudagraphs": True}, {}]
    with pytest.raises(dynamo.exc.BackendCompilerFailed, match="no mode fastest; default"):
        torch.compile(mlp, backend="sparseforge", mode="fastest")(x[:3])


def test_unknown_options(mlp):
    with pytest.raises(dynamo.exc.BackendCompilerFailed, match="no option speed; tokens"):
        torch.compile(mlp, backend="sparseforge", options={"speed": 9})(torch.randn(5, 16))
