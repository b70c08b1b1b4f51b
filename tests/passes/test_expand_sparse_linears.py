"""The sparse operator becomes plain ones: the same numbers, packed tensors kept, and nothing else touched."""

from functools import partial

import pytest
import torch
from chosen_layouts import all_in
from rounding import same_products
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering.lower import sparse_sites
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.layouts import LAYOUTS
from sparseforge_fx.passes import expand_sparse_linears, fuse_epilogues, lower_sparse_linears, run_passes

SPARSE = "sparseforge.sparse_linear.default"


class Net(nn.Module):
    """A tie, a bias and none, a linear followed by relu, and one width that 8 does not divide."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.twice = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        return self.norm(self.twice(torch.tanh(self.twice(y))))


def lowered(dtype=torch.float32, layout="rows", *more):
    net = Net().to(dtype)
    sf.sparsify(net, example_inputs=torch.randn(2, 3, 12, dtype=dtype))
    program = capture(net, torch.randn(2, 3, 12, dtype=dtype))
    one = partial(lower_sparse_linears, find=sparse_sites, choose=all_in(LAYOUTS[layout]))
    program, _ = run_passes(program, [one, *more])
    return net, program


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_operators_and_the_values_of_the_dense_model(dtype, layout):
    net, program = lowered(dtype, layout)
    after, (record,) = run_passes(program, [expand_sparse_linears])
    assert program.op_counts()[SPARSE] == 4 and record.modified == 4
    assert record.op_changes[SPARSE] == -4 and record.op_changes["aten.linear.default"] == 4
    assert all(op.startswith(("aten.", "<built-in")) for op in after.op_counts())
    assert set(after.state) == set(program.state)  # packed, one copy of the weight that is used twice
    for shape in ((1, 1, 12), (4, 7, 12)):
        x = torch.randn(shape).to(dtype)
        assert same_products(after.module()(x), net(x))


def test_once_more_changes_nothing():
    _, program = lowered()
    after, _ = run_passes(program, [expand_sparse_linears])
    _, (record,) = run_passes(after, [expand_sparse_linears])
    assert record.modified == 0 and record.op_changes == {}


def test_a_graph_without_the_operator_is_untouched(program):
    code = program.exported.graph_module.code
    after, (record,) = run_passes(program, [expand_sparse_linears])
    assert record.modified == 0 and after.exported.graph_module.code == code


def test_fused_activations_are_left_alone():
    net, program = lowered(torch.float32, "rows", fuse_epilogues)
    after, (record,) = run_passes(program, [expand_sparse_linears])
    assert record.modified == 3 and after.op_counts()[SPARSE] == 1
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-5, atol=1e-6)


def test_the_result_survives_a_file(tmp_path):
    net, program = lowered()
    after, _ = run_passes(program, [expand_sparse_linears])
    torch.export.save(after.exported, tmp_path / "m.pt2")
    x = torch.randn(3, 2, 12)
    assert same_products(torch.export.load(tmp_path / "m.pt2").module()(x), net(x))
