"""Linears over 2:4 weights -> sparse_linear over packed ones: every orientation, ties once, the rest untouched."""

import copy
from functools import partial

import pytest
import torch
from chosen_layouts import all_in_rows
from rounding import same_products
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.packed import Packed, unpack
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import find_linears, lower_sparse_linears, run_passes
from sparseforge_fx.passes.lower_sparse_linears import keep_dense


class Net(nn.Module):
    """A linear, a Conv1D, one weight under two names, one used twice, W @ x, and one that is not 2:4."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), Conv1D(8, 12)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.w = nn.Parameter(torch.randn(8, 8))
        self.dense = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.down.weight)

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        y = self.two(self.one(y)) + self.one(x)
        y = (self.w @ y.mT).mT.contiguous()
        return self.norm(self.dense(y))


SITES = {"up.weight", "down.weight", "one.weight", "w"}


@pytest.fixture
def lowered():
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 5, 8)
    sf.sparsify(net, example_inputs=x, exclude=["dense"])
    program = capture(net, x)
    sites = keep_dense(program, find_linears(program))
    after, (record,) = run_passes(program, [lower(sites)])
    return net, x, program, sites, after, record


def lower(sites):
    return partial(lower_sparse_linears, find=lambda _: sites, choose=all_in_rows)


def test_what_is_not_chosen_stays_dense(lowered):
    net, x, program, sites, _, _ = lowered
    only_up = lambda sites: {"up.weight": all_in_rows(sites)["up.weight"]}  # noqa: E731
    after, (record,) = run_passes(program, [partial(lower_sparse_linears, find=lambda _: sites, choose=only_up)])
    assert record.modified == 1 and {"down.weight", "one.weight", "w"} <= set(after.state)
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_operator_counts(lowered):
    *_, after, record = lowered
    assert record.modified == 6  # uses
    assert record.op_changes[str(OP)] == 6
    assert record.op_changes["aten.linear.default"] == -4 and record.op_changes["aten.addmm.default"] == -1
    assert after.op_counts()["aten.linear.default"] == 1  # the dense one


def test_the_value_is_that_of_the_masked_dense_model(lowered):
    net, _, program, _, after, _ = lowered
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-5, atol=1e-5)
    assert same_products(program.module()(x), net(x))  # the program given is as it was


def test_packed_tensors_take_the_place_of_the_weight(lowered):
    net, _, _, _, after, _ = lowered
    assert not (SITES | {"two.weight"}) & set(after.state)
    for fqn in SITES:
        values, meta = after.tensor(f"{fqn}_values"), after.tensor(f"{fqn}_bitmask")
        weight = net.get_parameter(fqn)
        weight = weight.t() if fqn == "down.weight" else weight
        assert torch.equal(unpack(Packed(values, meta, weight.shape[1])), weight)
    nodes = after.graph.find_nodes(op="call_function", target=OP)
    assert len({n.args[1] for n in nodes}) == 4, "a tie shares its packed tensors"
    assert {"dense.weight", "dense.bias", "up.bias"} <= set(after.state)


def test_once_more_changes_nothing(lowered):
    *_, sites, after, _ = lowered
    for again in (sites, find_linears(after)):
        found = keep_dense(after, again) if again is not sites else again
        twice, (record,) = run_passes(after, [lower(found)])
        assert record.modified == 0 and [str(n) for n in twice.graph.nodes] == [str(n) for n in after.graph.nodes]


def test_reasons(lowered):
    _, _, _, sites, _, _ = lowered
    reasons = {s.fqn: s.reason for s in sites if s.reason}
    assert reasons == {"dense.weight": "not 2:4: a group of four has more than two non-zeros"}


def test_an_eligible_site_that_is_not_sparse_is_refused_and_the_program_kept():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(2, 8)
    program = capture(net, x)
    before = copy.deepcopy(dict(program.state))
    with pytest.raises(SparseForgeError, match="more than two non-zeros"):
        run_passes(program, [partial(lower_sparse_linears, find=find_linears, choose=all_in_rows)])
    assert program.state.keys() == before.keys() and same_products(program.module()(x), net(x))


def test_saving_and_loading_keeps_the_values(lowered, tmp_path):
    *_, after, _ = lowered
    torch.export.save(after.exported, tmp_path / "m.pt2")
    x = torch.randn(3, 4, 8)
    assert same_products(torch.export.load(tmp_path / "m.pt2").module()(x), after.module()(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_language_models(captured_once, name):
    found = captured_once(name)
    sf.sparsify(found.model)
    after, (record,) = run_passes(found.program, [lower(keep_dense(found.program, find_linears(found.program)))])
    assert record.modified == {"llama": 14, "gpt2": 4, "opt": 6}[name]
    batch = found.batch(rows=3, length=7)
    torch.testing.assert_close(after.module()(**batch).logits, found.model(**batch).logits, rtol=1e-4, atol=1e-5)
