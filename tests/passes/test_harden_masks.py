"""After it the weights are exactly N:M, in place, and the graph is the one that was captured."""

import copy
import io

import pytest
import torch
from rounding import same_products
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears, harden_masks, insert_hessian_hooks, run_passes, train_passes
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, Pattern, Unstructured, check_pattern, hard_mask

DIM = {"up.weight": 1, "down.weight": 0, "twice.weight": 1, "to_six.weight": 1}  # the reduction dimension


@pytest.fixture
def masked(program):
    masked = run_passes(program, train_passes(find_linears(program)))[0]
    for site in DIM:
        masked.tensor(mask_name(site)).uniform_()
    return masked


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(1, 2)], ids=str)
def test_weights_are_exactly_the_kept_ones(masked, net, pattern):
    before = copy.deepcopy(net)
    keep = {site: hard_mask(masked.tensor(mask_name(site)), pattern, dim) for site, dim in DIM.items()}
    run_passes(masked, [lambda p: harden_masks(p, pattern)])
    for site, dim in DIM.items():
        weight, old = net.get_parameter(site), before.get_parameter(site)
        assert torch.equal(weight, torch.where(keep[site], old, 0.0))
        assert check_pattern(weight, pattern, dim) and (weight != 0).float().mean() == pattern.density
        assert not torch.signbit(weight[weight == 0]).any(), "-0.0 is normalised"
    others = [n for n, _ in net.named_parameters() if n not in DIM]
    assert all(torch.equal(net.get_parameter(n), before.get_parameter(n)) for n in others)
    assert net.tied.weight is net.twice.weight


def test_the_graph_is_the_captured_one_again(masked, program, net, x):
    hardened, records = run_passes(masked, [harden_masks])
    assert hardened.op_counts() == program.op_counts()
    assert records[0].op_changes == {
        "aten.addmm.default": 1,
        "aten.linear.default": 5,
        "sparseforge.soft_masked_linear.default": -6,
    }
    assert hardened.state.keys() == program.state.keys(), "masks are gone"
    assert all(hardened.tensor(n) is p for n, p in net.named_parameters())
    assert same_products(hardened.module()(x), net(x)) and same_products(program.module()(x), net(x))


def test_a_hard_mask_computes_the_same_before_and_after(masked, x):
    for site, dim in DIM.items():
        mask = masked.tensor(mask_name(site))
        mask.copy_(hard_mask(mask, TWO_FOUR, dim))
    before = masked.module()(x)
    assert same_products(run_passes(masked, [harden_masks])[0].module()(x), before)


def test_probes_leave_with_the_masks(masked, program, net, x):
    probed, _ = run_passes(masked, [insert_hessian_hooks])
    hardened, _ = run_passes(probed, [harden_masks])
    assert hardened.state.keys() == program.state.keys()
    assert same_products(hardened.module()(x), net(x))


def test_minus_zero_and_zeros_among_the_kept(x):
    net = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    with torch.no_grad():
        net[0].weight.fill_(-0.0)
        net[0].weight[0, 0] = -1.0
    program = capture(net, x)
    masked, _ = run_passes(program, train_passes(find_linears(program)))
    run_passes(masked, [harden_masks])  # a mask of ones: all tie, the earlier two of each group are kept
    assert net[0].weight[0, 0] == -1 and net[0].weight.count_nonzero() == 1 and torch.signbit(net[0].weight).sum() == 1


def test_nothing_matches_nothing_changes(program, net):
    before = copy.deepcopy(net.state_dict())
    other = program.copy()
    code = other.exported.graph_module.code
    assert harden_masks(other).modified == 0
    assert other.exported.graph_module.code == code
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_hardening_again_changes_nothing(masked, net):
    hardened, _ = run_passes(masked, [harden_masks])
    values, code = copy.deepcopy(net.state_dict()), hardened.exported.graph_module.code
    assert harden_masks(hardened).modified == 0
    assert hardened.exported.graph_module.code == code
    again, _ = run_passes(hardened, train_passes(find_linears(hardened)))
    for site in DIM:  # magnitude of what is 2:4 already
        again.tensor(mask_name(site)).copy_(net.get_parameter(site).abs())
    run_passes(again, [harden_masks])
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_reload_and_unflatten(masked, net, x):
    hardened, _ = run_passes(masked, [harden_masks])
    file = io.BytesIO()
    torch.export.save(hardened.exported, file)
    file.seek(0)
    assert same_products(torch.export.load(file).module()(x), net(x))
    assert same_products(torch.export.unflatten(hardened.exported)(x), net(x))


def test_a_weight_stored_in_out_with_a_bias_on_three_dimensional_inputs(x):
    """linear(x, W.t(), b) keeps its orientation, its groups and its bits."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return torch.sin(nn.functional.linear(x, self.w.t(), self.b))

    net = Net()
    program = capture(net, x)
    hardened, _ = run_passes(program, [*train_passes(find_linears(program)), harden_masks])
    assert hardened.op_counts() == program.op_counts()
    assert check_pattern(net.w, TWO_FOUR, dim=0) and same_products(hardened.module()(x), net(x))


def test_a_linear_that_is_a_user_output(x):
    net = nn.Linear(8, 8)
    program = capture(net, x)
    hardened, _ = run_passes(program, [*train_passes(find_linears(program, include=["*"])), harden_masks])
    assert same_products(hardened.module()(x), net(x)) and check_pattern(net.weight, TWO_FOUR)


def test_an_unstructured_mask_that_keeps_less_is_not_filled_up(x):
    """Wanda rounds the share down in every row: the tensor's own share would let a few more back in."""
    net = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5))
    dense, pattern = net[0].weight.detach().clone(), Unstructured(0.45)  # 22 of 40, or 4 of 8 in a row
    program = capture(net, x)
    masked, _ = run_passes(program, train_passes(find_linears(program, pattern)))
    mask = hard_mask(dense.abs(), Pattern(4, 8))
    masked.tensor(mask_name("0.weight")).copy_(mask)
    run_passes(masked, [lambda p: harden_masks(p, pattern)])
    assert torch.equal(net[0].weight, dense * mask) and net[0].weight.count_nonzero() == 20
