"""The sparse operator over planes becomes branches with kernels: the same numbers for every number of rows."""

import pytest
import torch
from test_expand_sparse_linears import SPARSE, lowered

from sparseforge_fx.passes import fuse_epilogues, inline_kernels, run_passes
from sparseforge_fx.passes.inline_kernels import BRANCHES

PLANES = "sparseforge.planes_linear.default"
SHAPES = ((0, 3, 12), (1, 1, 12), (2, 1, 12), (4, 4, 12), (4, 7, 12), (43, 3, 12))  # rows for each branch


def branches(program):
    """The last argument of every kernel, with how often it stands in the graph and its branches."""
    modules = [m for m in program.exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    found = [n.args[6] for m in modules for n in m.graph.nodes if str(n.target) == PLANES]
    return {rows: found.count(rows) for rows in sorted(set(found))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_for_every_kernel_and_the_same_numbers(dtype):
    _, program = lowered(dtype, "planes", fuse_epilogues)
    after, (record,) = run_passes(program, [inline_kernels])
    assert program.op_counts()[SPARSE] == 4 and record.modified == 4
    assert record.op_changes[SPARSE] == -4 and record.op_changes["cond"] == 4
    assert branches(after) == {most: 4 for most in BRANCHES}
    assert set(after.state) == set(program.state)
    before, module = program.module(), after.module()
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype)
            assert torch.equal(module(x), before(x))


def test_without_kernels_there_is_nothing_to_choose():
    net, program = lowered(torch.float32, "planes")
    after, (record,) = run_passes(program, [inline_kernels])
    assert record.modified == 4 and "cond" not in after.op_counts() and branches(after) == {BRANCHES[-1]: 4}
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(after.module()(x), net(x), rtol=1e-5, atol=1e-6)


def test_fixed_sizes_need_no_branch():
    net, program = lowered(torch.bfloat16, "planes")
    for node in program.graph.nodes:  # as in a capture that had to fix batch and sequence
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.dim() == 3:
            with value.fake_mode:
                node.meta["val"] = torch.empty(2, 3, value.shape[-1], dtype=value.dtype)
    after, _ = run_passes(program, [inline_kernels])
    assert "cond" not in after.op_counts() and branches(after) == {0: 4}
    x = torch.randn(2, 3, 12).bfloat16()
    torch.testing.assert_close(after.module()(x), net(x))


def test_once_more_changes_nothing():
    _, program = lowered(torch.bfloat16, "planes")
    after, _ = run_passes(program, [inline_kernels])
    _, (record,) = run_passes(after, [inline_kernels])
    assert record.modified == 0 and record.op_changes == {}


def test_other_layouts_and_graphs_are_untouched(program):
    _, rows = lowered(torch.bfloat16, "rows")
    for graph in (rows, program):
        code = graph.exported.graph_module.code
        after, (record,) = run_passes(graph, [inline_kernels])
        assert record.modified == 0 and after.exported.graph_module.code == code
