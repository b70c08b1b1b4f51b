"""Linears of one input become one: the same bits out, fewer operators, and nothing else touched."""

import copy
from functools import partial

import pytest
import torch
from chosen_layouts import all_in_rows
from rounding import same_products
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import deploy_passes, find_linears, merge_parallel_linears, run_passes
from sparseforge_fx.passes.merge_parallel_linears import merged_name


class Attention(nn.Module):
    """q, k, v of one input, a gate and an up of another, and a weight that two nodes read."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=bias) for n in (8, 4, 4))
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)
        self.shared = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = x + q * torch.cat([k, v], -1)
        y = self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return self.norm(self.shared(y) + self.shared(torch.relu(y)))


MERGE = partial(merge_parallel_linears, find=find_linears)


def merged(net, x):
    program = capture(net, x)
    return program, *run_passes(program, [MERGE])


@pytest.mark.parametrize("bias", [False, True])
def test_one_linear_instead_of_three(bias):
    net, x = Attention(bias), torch.randn(3, 5, 8)
    before = copy.deepcopy(net.state_dict())
    program, after, (record,) = merged(net, torch.randn(2, 4, 8))
    assert record.modified == 3 and record.name == "merge_parallel_linears"
    changed = {"aten.linear.default": -2, "aten.split_with_sizes.default": 1, "<built-in function getitem>": 3}
    assert record.op_changes == changed
    weight = after.tensor("q_k_v.weight")
    assert torch.equal(weight, torch.cat([net.q.weight, net.k.weight, net.v.weight]))
    assert ("q_k_v.bias" in after.state) == bias
    assert not {"q.weight", "k.weight", "v.weight", "q.bias"} & set(after.state)
    assert {"gate.weight", "up.weight", "shared.weight"} <= set(after.state)  # a bias and none: left alone
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert program.op_counts()["aten.linear.default"] == 8  # the program given is as it was


def test_once_more_changes_nothing():
    net, x = Attention(), torch.randn(2, 4, 8)
    _, after, _ = merged(net, x)
    again, (record,) = run_passes(after, [MERGE])
    assert record.modified == 0 and record.op_changes == {}
    assert [str(n) for n in again.graph.nodes] == [str(n) for n in after.graph.nodes]


def test_only_sites_are_merged():
    net, x = Attention(), torch.randn(2, 4, 8)
    program = capture(net, x)
    but_one = partial(find_linears, exclude=["k"])
    after, (record,) = run_passes(program, [partial(merge_parallel_linears, find=but_one)])
    assert record.modified == 2 and "q_v.weight" in after.state and "k.weight" in after.state
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-6, atol=1e-6)
    untouched, (record,) = run_passes(program, [partial(merge_parallel_linears, find=lambda _: [])])
    assert record.modified == 0
    assert [n.name for n in untouched.graph.nodes] == [n.name for n in program.graph.nodes]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.c.bias = self.a.bias
        self.out = nn.LayerNorm(8)

    def forward(self, x):
        return self.out(self.a(x) * self.b(x) + self.c(x))


def test_tied_weights_stay_alone_and_a_shared_bias_stays():
    net, x = Tied(), torch.randn(2, 4, 8)
    _, after, (record,) = merged(net, x)
    assert record.modified == 0
    torch.testing.assert_close(after.module()(x), net(x))


def test_the_merged_program_trains_and_saves(tmp_path):
    net, x = Attention(bias=True), torch.randn(2, 4, 8)
    _, after, _ = merged(net, x)
    module = after.module()
    module(x).square().sum().backward()
    assert module.get_parameter("q_k_v.weight").grad.shape == (16, 8)
    torch.export.save(after.exported, tmp_path / "m.pt2")
    again = torch.export.load(tmp_path / "m.pt2").module()
    assert same_products(again(x), module(x))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_language_models(tiny, name):
    found = tiny(name)
    after, (record,) = run_passes(found.program, [MERGE])
    layers = 2 if name == "llama" else 1
    assert record.modified == layers * (5 if name == "llama" else 3)
    batch = found.batch(rows=3, length=7)
    torch.testing.assert_close(after.module()(**batch).logits, found.model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_names():
    assert merged_name(["a.0.q_proj", "a.0.k_proj"]) == "a.0.q_proj_k_proj"
    assert merged_name(["gate", "up"]) == "gate_up"
    assert merged_name(["a.b.c", "a.d"]) == "a.b_c_d"
    assert merged_name(["a.b", "a.b.c"]) == "a.b._c"


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears_merge_too(bias):
    net = Attention(bias)
    sf.sparsify(net, example_inputs=torch.randn(2, 4, 8))
    sf.lower_modules(net, gate=False)
    x = torch.randn(3, 5, 8)
    program, after, (record,) = merged(net, torch.randn(2, 4, 8))
    sparse = "sparseforge.sparse_linear.default"
    assert record.modified == 3 and record.op_changes[sparse] == -2
    assert torch.equal(after.tensor("q_k_v.weight_values"), torch.cat([net.q.weight_values, net.k.weight_values, net.v.weight_values]))
    assert torch.equal(after.tensor("q_k_v.weight_bitmask"), torch.cat([net.q.weight_bitmask, net.k.weight_bitmask, net.v.weight_bitmask]))
    assert ("q_k_v.bias" in after.state) == bias and "q.weight_values" not in after.state
    assert {"gate.weight_values", "up.weight_values", "shared.weight_values"} <= set(after.state)  # a bias and none; used twice
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-6, atol=1e-6)
    _, (record,) = run_passes(after, [MERGE])
    assert record.modified == 0 and program.op_counts()[sparse] == 8


class Twice(nn.Module):
    """A weight that is read twice, once beside another linear of the same input."""

    def __init__(self, tied):
        super().__init__()
        self.other, self.twice, self.tied = (nn.Linear(8, 8) for _ in range(3))
        if tied == "object":
            self.tied.weight = self.twice.weight
        if tied == "memory":
            self.tied.weight = nn.Parameter(self.twice.weight.detach())
        self.last = "tied" if tied else "twice"  # a name: a module with two has ties
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        y = self.other(x) * self.twice(x)
        return self.norm(y + self.get_submodule(self.last)(torch.tanh(y)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [None, "object", "memory"])
def test_a_weight_that_is_read_twice_is_not_stored_twice(tied, packed):
    net, x = Twice(tied), torch.randn(2, 4, 8)
    if packed:
        sf.sparsify(net, example_inputs=x)
        sf.lower_modules(net, gate=False)
    program, after, (record,) = merged(net, x)
    if packed and tied == "memory":  # packing gave each module its own
        assert record.modified == 2
    else:
        assert record.modified == 0 and after.state.keys() == program.state.keys()
    torch.testing.assert_close(after.module()(x), net(x))


def test_packed_linears_with_an_activation_stay_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(torch.relu(self.a(x)) + torch.nn.functional.silu(self.b(x)) + self.c(x))

    net, x = Net(), torch.randn(2, 4, 8)
    sf.sparsify(net, example_inputs=x)
    program = capture(net, x)
    _, *unmerged = deploy_passes(find_linears, all_in_rows)
    program, _ = run_passes(program, unmerged)  # activations fused
    after, (record,) = run_passes(program, [MERGE])
    assert record.modified == 0
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-5, atol=1e-5)
