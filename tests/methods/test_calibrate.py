"""The lock-step walk: inputs come from the pruned prefix, every node runs once, nothing outlives its last use."""

import gc
from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx import Interpreter

from sparseforge_fx.data.reading import call_signature
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.methods.calibrate import _steps, layer_by_layer
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.pattern import Pattern, hard_mask


def masked_module(program):
    """The flat module with soft masks, and what layer_by_layer is told: node -> (weight's name, index of its input)."""
    masked, _ = run_passes(program, train_passes(find_linears(program)))
    module = masked.module()
    return module, {n: (str(n.args[1].target), 0) for n in module.graph.find_nodes(op="call_function", target=OP)}


def inputs_of(model, fqn, batches):
    """X [tokens, in] that the module owning the weight gets from the model as it is now."""
    rows = []
    owner = model.get_submodule(fqn.rpartition(".")[0])
    handle = owner.register_forward_hook(lambda module, args, out: rows.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mlp"])
def test_moments_come_from_the_pruned_prefix(tiny, name):
    """At every visit the source model, pruned so far, runs afresh with hooks: its inputs have these moments."""
    found = tiny(name)
    batches = [found.batch(seed, rows=2) for seed in range(3)]
    module, weights = masked_module(found.program)
    seen, moved = [], []
    unpruned = {fqn: inputs_of(found.model, fqn, batches) for fqn in found.weights}

    def visit(fqn, moments):
        x = inputs_of(found.model, fqn, batches)
        torch.testing.assert_close(moments, x.t() @ x / len(x), rtol=1e-4, atol=1e-5, msg=fqn)
        moved.append(not torch.allclose(x, unpruned[fqn], rtol=1e-3))
        seen.append(fqn)
        value = found.weights[fqn]
        value.copy_(value * hard_mask(value.abs(), Pattern(2, 4), 0 if name == "gpt2" else 1))

    layer_by_layer(module, weights, batches, visit)
    assert sorted(seen) == sorted(found.weights)
    assert any(moved)  # the prefix did matter


def test_every_node_before_the_last_weight_runs_once_per_batch(tiny, monkeypatch):
    found = tiny("llama")
    module, weights = masked_module(found.program)
    runs = Counter()
    original = Interpreter.run_node
    monkeypatch.setattr(Interpreter, "run_node", lambda self, node: (runs.update([node.name]), original(self, node))[1])
    layer_by_layer(module, weights, [found.batch(seed) for seed in range(3)], lambda fqn, moments: None)
    last = max(weights)  # nobody asks for what it makes, nor for the head
    computed = [n.name for n in module.graph.nodes if n.op != "placeholder" and n < last]
    assert runs == Counter({name: 3 for name in computed})


def test_memory_does_not_grow_with_depth():
    """Live activations at every visit, counted by the garbage collector."""

    def most_alive(depth):
        layers = [nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(depth)]
        module, weights = masked_module(capture(nn.Sequential(*layers, nn.LayerNorm(20)), torch.randn(4, 20)))
        counts = []

        def visit(fqn, moments):
            alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (6, 20)]
            counts.append(len({t.data_ptr() for t in alive}))

        layer_by_layer(module, weights, [torch.randn(6, 20) for _ in range(2)], visit)
        assert len(counts) == depth
        return max(counts)

    assert most_alive(8) == most_alive(3) <= 2 * 2  # two batches, each with a layer's input and what made it


def test_one_moment_serves_all_readers_of_one_input(tiny):
    found = tiny("llama")
    module, weights = masked_module(found.program)
    moments_of = {}
    layer_by_layer(module, weights, [found.batch()], lambda fqn, moments: moments_of.setdefault(fqn, moments))
    layer = "model.layers.1"
    q, k, v, o = (moments_of[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkvo")
    assert q is k is v and q is not o
    assert moments_of[f"{layer}.mlp.gate_proj.weight"] is moments_of[f"{layer}.mlp.up_proj.weight"]


class Shared(nn.Module):
    """One linear used twice, and a second one tied to it."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.tied = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.tied(torch.tanh(self.twice(torch.tanh(self.twice(self.first(x)))))))


def test_a_shared_weight_is_visited_once_at_its_first_use():
    model = Shared()
    x = torch.randn(5, 8)
    module, weights = masked_module(capture(model, x))
    seen = {}

    def visit(fqn, moments):
        assert fqn not in seen
        seen[fqn] = moments

    layer_by_layer(module, weights, [x], visit)
    assert sum(name == "twice.weight" for name, _ in weights.values()) == 3
    first = model.first(x)
    torch.testing.assert_close(seen["twice.weight"], first.t() @ first / 5)
    assert list(seen) == ["first.weight", "twice.weight"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, left, right):
        return self.norm(self.left(left) - self.right(2 * right))


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left"), ("labels", "right", "left")])
def test_keyword_inputs_in_any_order(order):
    model = TwoInputs()
    example = {"right": torch.randn(3, 8), "left": torch.randn(3, 8)}
    module, weights = masked_module(capture(model, example))
    batch = {"left": torch.ones(3, 8), "right": torch.full((3, 8), 5.0), "labels": torch.zeros(3)}
    seen = {}
    layer_by_layer(module, weights, [{k: batch[k] for k in order}], lambda fqn, moments: seen.setdefault(fqn, moments))
    torch.testing.assert_close(seen["left.weight"], torch.ones(8, 8))
    torch.testing.assert_close(seen["right.weight"], torch.full((8, 8), 100.0))


def test_positional_inputs_and_leftovers():
    """(left, right, targets) of a data loader: the model takes the first two."""
    model = TwoInputs()
    program = capture(model, (torch.randn(3, 8), torch.randn(3, 8)))
    module, weights = masked_module(program)
    seen = {}
    batch = [torch.ones(2, 8), torch.zeros(2, 8), torch.zeros(2)]
    layer_by_layer(module, weights, [batch], lambda fqn, moments: seen.setdefault(fqn, moments))
    torch.testing.assert_close(seen["left.weight"], torch.ones(8, 8))
    assert not seen["right.weight"].any()
    assert call_signature(program.exported.call_spec.in_spec) == (2, [])


def test_batches_of_different_sizes_weigh_by_tokens():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    module, weights = masked_module(capture(model, torch.randn(3, 4)))
    found = []
    layer_by_layer(
        module, weights, [torch.ones(1, 4), 3 * torch.ones(3, 4)], lambda fqn, moments: found.append(moments)
    )
    torch.testing.assert_close(found[0], torch.full((4, 4), (1 + 3 * 9) / 4))


def test_half_precision_inputs_are_summed_in_float32():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    module, weights = masked_module(capture(model, torch.randn(3, 4).bfloat16()))
    found = []
    layer_by_layer(module, weights, [torch.ones(3001, 4).bfloat16()], lambda fqn, moments: found.append(moments))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], torch.ones(4, 4), rtol=1e-5, atol=0)  # bfloat16 would stop counting at 256


class Mapped(nn.Module):
    """Its scores are made by torch.vmap, as masks of attention are in some models."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        inner = torch.vmap(lambda a: torch.vmap(lambda b: b * a.sum())(a))
        return self.norm(self.two(inner(self.one(x))))


def test_regions_of_vmap_are_run_whole():
    model = Mapped()
    module, weights = masked_module(capture(model, torch.randn(3, 8)))
    assert any(len(step) > 1 for step in _steps(module.graph))
    batches = [torch.randn(n, 8) for n in (3, 5, 2, 4, 6)]
    found = {}
    layer_by_layer(module, weights, batches, lambda fqn, moments: found.setdefault(fqn, moments))
    rows = inputs_of(model, "two.weight", batches)
    torch.testing.assert_close(found["two.weight"], rows.t() @ rows / len(rows))


def test_a_weight_within_vmap():
    class Inner(Mapped):
        def forward(self, x):
            return self.norm(torch.vmap(lambda row: self.two(self.one(row)))(x))

    model = Inner()
    module, weights = masked_module(capture(model, torch.randn(3, 8)))
    batches = [torch.randn(n, 8) for n in (3, 5, 2)]
    found = {}
    layer_by_layer(module, weights, batches, lambda fqn, moments: found.setdefault(fqn, moments))
    for name, rows in (("one.weight", torch.cat(batches)), ("two.weight", model.one(torch.cat(batches)).detach())):
        torch.testing.assert_close(found[name], rows.t() @ rows / len(rows))


def test_an_error_within_vmap_leaves_the_process_outside_of_it(monkeypatch):
    module, weights = masked_module(capture(Mapped(), torch.randn(3, 8)))
    inside = next(step for step in _steps(module.graph) if len(step) > 1)
    run_node = Interpreter.run_node
    broken = next(n for n in inside if "mul" in n.name)

    def fails(self, node):
        if node is broken:
            raise RuntimeError("broken")
        return run_node(self, node)

    monkeypatch.setattr(Interpreter, "run_node", fails)
    with pytest.raises(SparseForgeError, match="batch 0 does not fit the model: broken"):
        layer_by_layer(module, weights, [torch.randn(3, 8)] * 2, lambda fqn, moments: None)
    nn.Linear(2, 2)  # raises within a vmap, as its numbers are random


def test_a_batch_that_does_not_fit_is_one_sentence(tiny):
    found = tiny("mlp")
    module, weights = masked_module(found.program)
    with pytest.raises(SparseForgeError, match="calibration batch 1 does not fit the model"):
        layer_by_layer(module, weights, [torch.randn(4, 16), torch.randn(4, 15)], lambda fqn, moments: None)
