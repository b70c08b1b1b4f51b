"""Channels that may change places: found in every kind of model, and any order of them leaves the outputs as they were."""

from functools import partial

import pytest
import torch
from tiny_models import build
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_channels import find_channels
from sparseforge_fx.pattern import TWO_FOUR, Pattern, Unstructured

#: per layer: heads of the values (one set of channels each), and the inside of the MLP
SETS = {"llama": 2, "gpt2": 3, "opt": 3, "mistral": 2, "qwen3": 2, "gemma3": 2, "bert": 3, "vit": 3}


def masked(model, example=None):
    program = capture(model.eval(), example)
    return run_passes(program, train_passes(find_linears(program)))[0]


def shuffle(program, sets):
    for each in sets:
        each.permute(program.state, torch.randperm(len(each.columns[0].indices)))


@pytest.mark.parametrize("name", SETS)
def test_any_order_computes_the_same(captured_once, name):
    found = captured_once(name)
    program = run_passes(found.program, train_passes(find_linears(found.program)))[0]
    sets, held = find_channels(program, TWO_FOUR)
    assert held == {}
    layers = len({part.fqn for each in sets for part in each.columns}) // 2  # an output of attention and one of an MLP
    assert len(sets) == layers * SETS[name] > 0
    batch = found.example if name == "vit" else found.batch()
    run = partial(program.module(), **batch) if isinstance(batch, dict) else partial(program.module(), batch)
    before = run()
    kept = {fqn: value.clone() for fqn, value in program.state.items()}
    shuffle(program, sets)
    assert any(not torch.equal(value, kept[fqn]) for fqn, value in program.state.items())
    after = run()
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found.reset()


class Net(nn.Module):
    def __init__(self, inside, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        if inside is MOVABLE["gated"]:
            self.side = nn.Linear(8, width)
        self.norm, self.inside = nn.LayerNorm(8), inside

    def forward(self, x):
        return self.norm(x + self.inside(self, x))


SCALE = torch.rand(16)
MOVABLE = {
    "relu": lambda m, x: m.down(torch.relu(m.up(x))),
    "gated": lambda m, x: m.down(torch.sigmoid(m.up(x)) * m.side(x)),
    "a number": lambda m, x: m.down(torch.relu(m.up(x) * 3.0 + 1)),
    "views": lambda m, x: m.down(torch.relu(m.up(x).view(-1, 4, 4).transpose(0, 1).transpose(1, 0)).reshape(-1, 16)),
    "cast": lambda m, x: m.down(torch.relu(m.up(x)).double().float()),
}
FIXED = {
    "read by another": lambda m, x: m.down(torch.relu(m.up(x))) + m.up(x).mean(-1, keepdim=True),
    "a vector beside it": lambda m, x: m.down(torch.relu(m.up(x)) * SCALE),
    "softmax": lambda m, x: m.down(m.up(x).softmax(-1)),
    "computed places": lambda m, x: m.down(m.up(x)[:, x[0].argsort().repeat(2)]),
    "other places": lambda m, x: m.down(m.up(x) + m.up(x).flip(-1)),
    "used twice": lambda m, x: m.down(torch.relu(m.down(torch.relu(m.up(x)))) @ torch.ones(8, 16)),
    "the mean of all": lambda m, x: m.down(m.up(x) * m.up(x).mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("kind", MOVABLE)
def test_what_lies_between_may_be_elementwise_or_a_view(kind):
    x = torch.randn(5, 8)
    program = masked(Net(MOVABLE[kind]), x)
    ((found,), _) = find_channels(program, TWO_FOUR)
    assert [(p.fqn, p.dim, p.indices.tolist()) for p in found.columns] == [("down.weight", 1, list(range(16)))]
    rows = {"up.weight", "up.bias"} | ({"side.weight", "side.bias"} if kind == "gated" else set())
    assert {p.fqn for p in found.rows} == rows
    before = program.module()(x)
    shuffle(program, [found])
    torch.testing.assert_close(program.module()(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FIXED)
def test_anything_else_holds_channels_where_they_are(kind):
    assert find_channels(masked(Net(FIXED[kind]), torch.randn(5, 8)), TWO_FOUR) == ([], {})


def test_groups_must_be_whole_and_there_must_be_some():
    x, inside = torch.randn(5, 8), MOVABLE["relu"]
    assert find_channels(masked(Net(inside), x), Unstructured(0.5)) == ([], {})
    assert find_channels(masked(Net(inside), x), Pattern(4, 8))[0]
    program = masked(Net(inside, width=12), x)
    assert find_channels(program, TWO_FOUR)[0] and find_channels(program, Pattern(4, 8))[0] == []


def test_a_frozen_bias_stays_as_a_teacher_may_have_it_too():
    net = Net(MOVABLE["relu"])
    net.up.bias.requires_grad_(False)
    assert find_channels(masked(net, torch.randn(5, 8)), TWO_FOUR)[0] == []


def test_the_graph_is_left_as_it_was():
    program = masked(build("llama"))
    before = str(program.graph)
    assert find_channels(program, TWO_FOUR)[0]
    assert str(program.graph) == before


@pytest.mark.parametrize("kind", ["reads", "writes", "narrow", "bias"])
def test_what_forward_does_not_call_holds_channels_where_they_are(kind):
    net = Net(MOVABLE["relu"])
    if kind == "bias":
        net.kept = net.up.bias
    else:
        net.other = nn.Linear(*{"reads": (16, 5), "writes": (5, 16), "narrow": (8, 5)}[kind])
    sets, held = find_channels(masked(net, torch.randn(5, 8)), TWO_FOUR)
    assert (len(sets), list(held)) == ((1, []) if kind == "narrow" else (0, ["down.weight"]))
    named = "parameter kept of the model" if kind == "bias" else "other."
    assert all(text.startswith("its inputs keep their order: ") and named in text for text in held.values())
