"""SLoRB: starts as the identity at a mask of ones, and keeps the mean of every block's pruned part at a hard one."""

import io

import pytest
import torch
from rounding import same_products
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes import find_linears, harden_masks, insert_low_rank, run_passes, train_passes
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

BLOCK = 4
TRANSPOSED = {"up.weight": False, "down.weight": True, "twice.weight": False, "to_six.weight": False}


@pytest.fixture
def masked(program):
    return run_passes(program, train_passes(find_linears(program)))[0]


@pytest.fixture
def branched(masked):
    return run_passes(masked, [lambda p: insert_low_rank(p, BLOCK)])[0]


def choose_masks(masked):
    for fqn, transposed in TRANSPOSED.items():
        mask = masked.tensor(mask_name(fqn))
        mask.copy_(hard_mask(torch.rand_like(mask), TWO_FOUR, dim=0 if transposed else 1))


def test_operator_counts(masked, branched):
    before, after = masked.op_counts(), branched.op_counts()
    assert {op: after[op] - before[op] for op in after if after[op] != before[op]} == {
        "aten.linear.default": 12,
        "aten.add.Tensor": 6,
    }
    new = set(branched.state) - set(masked.state)
    assert new == {name for fqn in TRANSPOSED for name in branch_names(fqn)}, "one branch per weight, ties share it"
    assert all(branched.state[name].requires_grad for name in new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_a_mask_of_ones_it_computes_what_was_computed(net, x, dtype):
    net, x = net.to(dtype), x.to(dtype)
    program = capture(net, x)
    branched, _ = run_passes(program, train_passes(find_linears(program), slorb_block=BLOCK))
    assert same_products(branched.module()(x), net(x))


def test_at_a_hard_mask_the_branch_keeps_the_mean_of_each_pruned_block(masked, x):
    choose_masks(masked)
    branched, _ = run_passes(masked, [lambda p: insert_low_rank(p, BLOCK)])
    for fqn, transposed in TRANSPOSED.items():
        x_name, s_name = branch_names(fqn)
        correction = branched.tensor(s_name) @ branched.tensor(x_name)  # [out, in]
        pruned = branched.tensor(fqn) * (1 - branched.tensor(mask_name(fqn)))
        pruned = pruned.t() if transposed else pruned
        assert correction.shape == pruned.shape and pruned.any()
        blocks, wanted = (t.unflatten(1, (-1, BLOCK)) for t in (correction, pruned))
        torch.testing.assert_close(blocks.mean(-1), wanted.mean(-1))
        torch.testing.assert_close(blocks, wanted.mean(-1, keepdim=True).expand_as(blocks))
        assert (branched.tensor(x_name) == torch.block_diag(*[torch.ones(1, BLOCK)] * (pruned.shape[1] // BLOCK))).all()


def test_the_branch_is_a_lora_adapter_of_the_masked_weight(x):
    net = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    program = capture(net, x)
    masked, _ = run_passes(program, train_passes(find_linears(program)))
    masked.tensor("0.weight_mask").copy_(hard_mask(torch.rand(4, 8), TWO_FOUR))
    branched, _ = run_passes(masked, [lambda p: insert_low_rank(p, BLOCK)])
    a, b = (branched.tensor(n) for n in branch_names("0.weight"))
    out = branched.module()(x)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight * masked.tensor("0.weight_mask") + b @ a)
    torch.testing.assert_close(net(x), out)


def test_both_factors_and_the_masked_weight_train(branched, net, x):
    module = branched.module()
    with torch.no_grad():
        for fqn in TRANSPOSED:
            module.get_parameter(branch_names(fqn)[1]).normal_()
    module(x).square().sum().backward()
    for fqn in TRANSPOSED:
        assert all(module.get_parameter(n).grad.any() for n in branch_names(fqn)) and net.get_parameter(fqn).grad.any()


def test_nothing_matches_nothing_changes(program):
    other = program.copy()
    code = other.exported.graph_module.code
    assert insert_low_rank(other, BLOCK).modified == 0
    assert other.exported.graph_module.code == code


def test_a_second_run_changes_nothing(branched):
    code, state = branched.exported.graph_module.code, dict(branched.state)
    assert insert_low_rank(branched, BLOCK).modified == 0
    branched.validate()
    assert branched.exported.graph_module.code == code and branched.state == state


@pytest.mark.parametrize("block", [0, 3, 32])
def test_a_block_that_does_not_divide_is_refused(masked, block):
    with pytest.raises(SparseForgeError, match=rf"block {block} does not divide the input width 8 of up.weight"):
        insert_low_rank(masked, block)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_reload_unflatten_and_harden(masked, x):
    choose_masks(masked)
    branched, _ = run_passes(masked, [lambda p: insert_low_rank(p, BLOCK)])
    expected = branched.module()(x)
    file = io.BytesIO()
    torch.export.save(branched.exported, file)
    file.seek(0)
    assert same_products(torch.export.load(file).module()(x), expected)
    assert same_products(torch.export.unflatten(branched.exported)(x), expected)
    hardened, _ = run_passes(branched, [harden_masks])
    assert same_products(hardened.module()(x), expected), "the branch stays beside the hardened weight"
    assert hardened.op_counts()[str(OP)] == 0


def test_a_linear_that_is_a_user_output(x):
    net = nn.Linear(8, 8)
    program = capture(net, x)
    sites = find_linears(program, include=["*"])
    branched, _ = run_passes(program, train_passes(sites, slorb_block=BLOCK))
    with torch.no_grad():
        branched.tensor(branch_names("weight")[1]).fill_(1.0)
    module = branched.module()
    torch.testing.assert_close(module(x), net(x) + x.sum(-1, keepdim=True))
    assert program.op_counts() == {"aten.linear.default": 1}
