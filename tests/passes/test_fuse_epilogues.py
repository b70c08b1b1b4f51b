"""Activations move into the sparse operator where it alone feeds them."""

import math

import pytest
import torch
import torch.nn.functional as F
from chosen_layouts import all_in_rows
from torch import nn
from transformers.activations import NewGELUActivation

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import (
    deploy_passes,
    find_linears,
    fuse_epilogues,
    run_passes,
)

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), activation
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.down(self.activation(self.up(x))))


class Gated(Net):
    def __init__(self, turned=False, other=None):
        super().__init__(F.silu)
        self.gate, self.turned, self.other = nn.Linear(8, 12), turned, other

    def forward(self, x):
        gate, up = F.silu(self.gate(x)), self.up(x)
        y = up * gate if self.turned else gate * up
        y = y + up if self.other == "up" else y + gate if self.other == "silu" else y
        return self.norm(self.down(y))


def lower(net, x):
    torch.manual_seed(0)
    sf.sparsify(net.eval(), example_inputs=x)
    program = capture(net, x)
    return run_passes(program, deploy_passes(find_linears, all_in_rows))


def names(program):
    return sorted(n.args[6] for n in program.graph.find_nodes(op="call_function", target=OP))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_one_operator_less(name):
    net, x = Net(ACTIVATIONS[name]), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 1 and list(records[-1].op_changes.values()) == [-1]
    assert names(program) == sorted([name, "none"])
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
    again, (record,) = run_passes(program, [fuse_epilogues])
    assert record.modified == 0 and [str(n) for n in again.graph.nodes] == [str(n) for n in program.graph.nodes]


@pytest.mark.parametrize("turned", [False, True])
def test_silu_mul(turned):
    net, x = Gated(turned), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 1 and names(program) == ["none", "silu_mul"]
    assert records[-1].op_changes == {
        "<built-in function getitem>": -2,
        "aten.mul.Tensor": -1,
        "aten.silu.default": -1,
        "aten.split_with_sizes.default": -1,
    }
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["up", "silu"])
def test_values_that_something_else_reads_are_left_alone(other):
    net, x = Gated(other=other), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0 and names(program) == ["none", "none"]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


class OtherHalf(Gated):
    """silu of the second half of the merged pair: the operator has silu of the first."""

    def forward(self, x):
        up = self.up(x)
        return self.norm(self.down(up * F.silu(self.gate(x))))


class BothHalves(Gated):
    def forward(self, x):
        return self.norm(self.down(F.silu(self.gate(x)) * F.silu(self.up(x))))


class OneHalf(Gated):
    """An activation of the second half alone."""

    def forward(self, x):
        return self.norm(self.down(self.gate(x) + torch.relu(self.up(x))))


class SplitAndWhole(Net):
    """Split by the model itself, and read as a whole beside that."""

    def forward(self, x):
        y = self.up(x)
        a, b = y.split([6, 6], -1)
        return self.norm(self.down(torch.cat([F.silu(a) * b, a], -1) + y))


class SplitAndWholeOnly(Net):
    def forward(self, x):
        y = self.up(x)
        a, b = y.split([6, 6], -1)
        return self.norm(self.down(torch.cat([F.silu(a) * b, y[..., :6]], -1)))


@pytest.mark.parametrize("kind", [OtherHalf, BothHalves, OneHalf, SplitAndWhole, SplitAndWholeOnly])
def test_other_uses_of_a_merged_pair_are_left_alone(kind):
    net, x = kind(F.silu) if kind.__base__ is Net else kind(), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0 and names(program) == ["none", "none"]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_linear_that_something_else_reads_keeps_its_activation_outside(name, first):
    class Both(Net):
        def forward(self, x):
            y = self.up(x)
            parts = (self.activation(y), y) if first else (y, self.activation(y))  # in either order of the users
            return self.norm(self.down(parts[0] - parts[1]))

    net, x = Both(ACTIVATIONS[name]), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0 and names(program) == ["none", "none"]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_an_output_of_the_program_keeps_its_value():
    class Both(Net):
        def forward(self, x):
            y = self.up(x)
            return self.norm(self.down(torch.relu(y))), y * 2

    net, x = Both(torch.relu), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0
    for got, want in zip(program.module()(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Written(nn.Module):
    """GPT-2's gelu, whole or with one thing changed."""

    def __init__(self, cubic=0.044715, other=None):
        super().__init__()
        self.cubic, self.other = cubic, other

    def forward(self, y):
        inner = math.sqrt(2.0 / math.pi) * (y + self.cubic * torch.pow(y, 3.0))
        out = 0.5 * y * (1.0 + torch.tanh(inner))
        return out + {None: 0, "y": y, "inner": inner}[self.other]


@pytest.mark.parametrize("view", [None, lambda y: y.view(10, 2, 6), lambda y: y.view(10, 12).unsqueeze(0)])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "written"])
def test_behind_a_view(name, view):
    class Net2(Net):
        def forward(self, x):
            y = self.up(x)
            y = self.activation(y if view is None else view(y))
            return self.norm(self.down(y.reshape(2, 5, 12)))

    net, x = Net2(NewGELUActivation() if name == "written" else ACTIVATIONS[name]), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 1
    assert names(program) == sorted(["gelu_tanh" if name == "written" else name, "none"])
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
    assert run_passes(program, [fuse_epilogues])[1][0].modified == 0


@pytest.mark.parametrize("options", [{"cubic": 0.04}, {"other": "y"}, {"other": "inner"}])
def test_what_is_almost_a_gelu_is_left_alone(options):
    net, x = Net(Written(**options)), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0 and names(program) == ["none", "none"]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_view_that_something_else_reads_is_left_alone():
    class Both(Net):
        def forward(self, x):
            y = self.up(x).view(10, 12)
            return self.norm(self.down(torch.relu(y))), y

    net, x = Both(torch.relu), torch.randn(2, 5, 8)
    program, records = lower(net, x)
    assert records[-1].modified == 0
    for got, want in zip(program.module()(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_language_models(captured_once):
    expected = {
        "llama": ["none"] * 6 + ["silu_mul"] * 2,
        "opt": ["none"] * 3 + ["relu"],
        "gpt2": ["none"] * 3 + ["gelu_tanh"],
    }
    for name, activations in expected.items():
        found = captured_once(name)
        sf.sparsify(found.model)
        program, _ = run_passes(found.program, deploy_passes(find_linears, all_in_rows))
        assert names(program) == sorted(activations)
        batch = found.batch(rows=3, length=7)
        torch.testing.assert_close(program.module()(**batch).logits, found.model(**batch).logits, rtol=1e-4, atol=1e-5)
