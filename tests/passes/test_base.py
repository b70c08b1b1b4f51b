"""The runner: what it records, what it leaves alone, and that it refuses a broken program."""

import pytest
import torch
from rounding import same_products
from torch._export.verifier import SpecViolationError
from torch.export.graph_signature import InputKind

from sparseforge_fx.passes import PassResult, find_linears, insert_hessian_hooks, run_passes, train_passes
from sparseforge_fx.passes.base import PassRecord


def test_the_log_has_a_line_per_pass_with_its_operator_counts(program):
    edited, records = run_passes(program, [*train_passes(find_linears(program), slorb_block=4), insert_hessian_hooks])
    assert records == [
        PassRecord(
            "insert_soft_masks",
            6,
            {"aten.addmm.default": -1, "aten.linear.default": -5, "sparseforge.soft_masked_linear.default": 6},
        ),
        PassRecord("insert_low_rank", 6, {"aten.add.Tensor": 6, "aten.linear.default": 12}),
        PassRecord("insert_hessian_hooks", 6, {}),
    ]
    assert edited.op_counts()["aten.layer_norm.default"] == 1


def test_the_given_program_is_left_as_it_was(program):
    code, state, inputs = program.exported.graph_module.code, dict(program.state), list(program.signature.input_specs)
    edited, _ = run_passes(program, train_passes(find_linears(program), slorb_block=4))
    assert program.exported.graph_module.code == code
    assert program.state == state and program.signature.input_specs == inputs
    assert all(edited.tensor(fqn) is value for _, fqn, value in program.lifted(InputKind.PARAMETER))
    program.validate()


def test_no_passes_give_an_equal_copy(program, net, x):
    same, records = run_passes(program, [])
    assert records == [] and same.op_counts() == program.op_counts()
    assert same_products(same.module()(x), net(x))


def test_a_pass_that_breaks_the_program_is_caught(program):
    def forgets_the_signature(program):
        (old,) = program.graph.output_node().all_input_nodes
        new = program.insert_before(old, torch.ops.aten.neg.default, old.args[0], value=old.meta["val"])
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)
        return PassResult(program, 1)

    def drops_an_input_spec(program):
        program.signature.input_specs.pop()
        return PassResult(program, 1)

    for broken, told in ((forgets_the_signature, "output"), (drops_an_input_spec, "input")):
        with pytest.raises(SpecViolationError, match=told):
            run_passes(program, [broken])
