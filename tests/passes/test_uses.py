"""Stacks of matrices, however a graph multiplies by them: sites whose groups run along each expert's inputs, masked,
probed and hardened in place."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from rounding import same_products
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes import find_linears, harden_masks, insert_hessian_hooks, insert_soft_masks, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask

E, IN, OUT, ROWS = 3, 8, 16, 5


class Stack(nn.Module):
    """Experts [E, ...] of x [E, ROWS, IN], computed as ``how`` says."""

    def __init__(self, how, dtype=torch.float32):
        super().__init__()
        self.how = how
        shape = (E, IN, OUT) if HOW[how][1] else (E, OUT, IN)
        self.w = nn.Parameter(torch.randn(shape).to(dtype))
        self.b = nn.Parameter(torch.randn(E, 1, OUT).to(dtype))
        self.register_buffer("ends", torch.tensor([4, 4, E * ROWS], dtype=torch.int32))

    def forward(self, x):
        return torch.sin(HOW[self.how][0](self, x).float())


def grouped(m, x, w):
    return F.grouped_mm(x.flatten(0, 1), w, offs=m.ends)


#: how it is written -> (function, the weight is stored [experts, in, out], operators)
HOW = {
    "bmm(x, W)": (lambda m, x: torch.bmm(x, m.w), True, 1),
    "bmm(x, W.mT)": (lambda m, x: torch.bmm(x, m.w.mT), False, 1),
    "bmm(x, W.transpose)": (lambda m, x: torch.bmm(x, m.w.transpose(-2, -1)), False, 1),
    "bmm(x, W.permute)": (lambda m, x: torch.bmm(x, m.w.permute(0, 2, 1)), False, 1),
    "x @ W": (lambda m, x: x @ m.w, True, 1),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b, x, m.w), True, 1),
    "grouped_mm(x, W)": (lambda m, x: grouped(m, x, m.w), True, 1),
    "grouped_mm(x, W.mT)": (lambda m, x: grouped(m, x, m.w.transpose(1, 2)), False, 1),
    "linear of slices": (lambda m, x: torch.stack([F.linear(x[e], m.w[e]) for e in range(E)]), False, E),
    "products of slices": (lambda m, x: torch.stack([x[e] @ m.w[e] for e in range(E)]), True, E),
    "a slice of all but one": (lambda m, x: F.linear(x[0], m.w[0]) + F.linear(x[1], m.w[-1]), False, 2),
}


SWAPS = ("aten.transpose.int", "aten.mT.default", "aten.permute.default")


def inputs(dtype):
    return torch.randn(E, ROWS, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(module, x, weights):
    out = module(x)
    return out, torch.autograd.grad(out.pow(3).sum(), weights, allow_unused=True)


@pytest.fixture(params=HOW)
def how(request):
    return request.param


@pytest.fixture
def net(how):
    return Stack(how, torch.bfloat16 if "grouped" in how else torch.float32)


@pytest.fixture
def x(net):
    return inputs(net.w.dtype)


def masked_by(program, sites):
    return run_passes(program, [lambda p: insert_soft_masks(p, sites)])


def test_a_stack_is_one_site(net, x, how):
    program = capture(net, x)
    before = program.op_counts()
    (site,) = eligible(sites := find_linears(program))
    assert (site.fqn, site.experts, site.transposed, len(site.uses)) == ("w", E, *HOW[how][1:])
    assert (site.in_features, site.out_features) == (IN, OUT) and site.shape[site.reduction_dim] == IN
    assert program.op_counts() == before and find_linears(program.copy()) == sites


def test_a_mask_of_ones_changes_nothing(net, x, how):
    program = capture(net, x)
    masked, records = masked_by(program, sites := find_linears(program))
    assert records[0].modified == HOW[how][2]
    counts = masked.op_counts()
    assert counts[str(EXPERTS_OP)] + counts[str(OP)] == HOW[how][2]
    assert masked.tensor("w") is net.w and masked.tensor(mask_name("w")).shape == net.w.shape
    assert insert_soft_masks(masked, sites).modified == insert_soft_masks(masked, find_linears(masked)).modified == 0
    (got, got_grad), (expected, grad) = (gradients(m, x, [net.w]) for m in (masked.module(), net))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, grad)


def test_hardened_in_place_the_graph_is_the_captured_one(net, x):
    program = capture(net, x)
    (site,) = eligible(sites := find_linears(program))
    masked, _ = masked_by(program, sites)
    mask, before, address = masked.tensor(mask_name("w")), net.w.detach().clone(), net.w.data_ptr()
    mask.uniform_()
    keep = hard_mask(mask, TWO_FOUR, site.reduction_dim)
    hardened, _ = run_passes(masked, [harden_masks])
    assert torch.equal(net.w, torch.where(keep, before, 0)) and net.w.data_ptr() == address
    assert check_pattern(net.w, TWO_FOUR, site.reduction_dim)
    counts = [p.op_counts() for p in (hardened, program)]
    swaps = [sum(c.pop(op, 0) for op in SWAPS) for c in counts]
    assert counts[0] == counts[1] and swaps[0] == swaps[1] and hardened.state.keys() == program.state.keys()
    assert same_products(hardened.module()(x), net(x)) and same_products(program.module()(x), net(x))
    assert harden_masks(hardened).modified == 0


def test_ties_between_equal_entries_keep_the_earlier_ones(how, x, net):
    with torch.no_grad():
        net.w.fill_(-1.0)
    program = capture(net, x)
    (site,) = eligible(sites := find_linears(program))
    run_passes(masked_by(program, sites)[0], [harden_masks])
    rows = net.w.detach().movedim(site.reduction_dim, -1).unflatten(-1, (-1, 4))
    assert (rows[..., :2] == -1).all() and (rows[..., 2:] == 0).all()


@pytest.mark.parametrize("estimator", ["gauss_newton", "activation"])
def test_curvature_of_each_expert_is_of_its_own_rows(net, x, how, estimator):
    """Against one linear for each expert; an expert without rows gets zeros."""
    program = capture(net, x)
    masked, _ = masked_by(program, find_linears(program))
    probed, _ = run_passes(masked, [lambda p: insert_hessian_hooks(p, estimator)])
    assert insert_hessian_hooks(probed, estimator).modified == 0
    probe = probed.tensor(probe_name("w"))
    w = net.w.detach().float() if HOW[how][1] else net.w.detach().float().mT
    assert probe.shape == (net.w.shape if estimator == "gauss_newton" else (E, IN))
    out = probed.module()(x)
    torch.testing.assert_close(out, masked.module()(x))
    (got,) = torch.autograd.grad(out.sum(), [probe])
    flat, ends = x.float().flatten(0, 1), [0, 4, 4, E * ROWS] if "grouped" in how else [0, ROWS, 2 * ROWS, 3 * ROWS]
    if how == "a slice of all but one":
        rows, total = [x[0], x[0][:0], x[1]], x[0] @ w[0] + x[1] @ w[2]
        gradient = [total.cos(), total[:0], total.cos()]
    else:
        rows = [flat[a:b] for a, b in itertools.pairwise(ends)]
        bias = net.b.detach() if how == "baddbmm" else torch.zeros(E, 1, OUT)
        gradient = [(r @ w[e] + bias[e]).cos() for e, r in enumerate(rows)]
    for e in range(E):
        if estimator == "activation":
            wanted = rows[e].square().sum(0)
        else:
            wanted = gradient[e].square().t() @ rows[e].square()
            wanted = wanted.t() if HOW[how][1] else wanted
        torch.testing.assert_close(
            got[e].float(), wanted, rtol=0.1 if "grouped" in how else 1e-4, atol=0.3 if "grouped" in how else 1e-4
        )


REFUSED = {
    "from the left": (lambda m, x: torch.bmm(m.w, x.mT), "3-D weight, read by aten.bmm.default"),
    "scaled": (lambda m, x: torch.baddbmm(m.b, x, m.w.mT, alpha=2), "3-D weight, read by aten.baddbmm.default"),
    "along both": (lambda m, x: torch.bmm(torch.bmm(x, m.w.mT), m.w), "used along both of its dimensions (W and W^T)"),
    "gathered": (
        lambda m, x: torch.bmm(x, m.w[torch.arange(E)].mT),
        "3-D weight, read by aten.bmm.default through aten.index.Tensor",
    ),
    "one expert's norm": (
        lambda m, x: torch.bmm(x, m.w.mT) * m.w[0].norm(),
        "3-D weight, read by aten.linalg_vector_norm.default",
    ),
    "a bias, too": (lambda m, x: torch.baddbmm(m.w, x, m.w.mT), "3-D weight, read by aten.baddbmm.default"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_site_has_a_reason(case):
    HOW["refused"] = (REFUSED[case][0], False, 0)
    try:
        net = Stack("refused")
        if case == "a bias, too":
            net.w = nn.Parameter(torch.randn(E, IN, IN))
        rows = torch.randn(E, IN if case == "a bias, too" else ROWS, IN)
        program = capture(net, rows)
        sites = {s.fqn: s.reason for s in find_linears(program)}
        assert sites["w"] == REFUSED[case][1]
        assert masked_by(program, find_linears(program))[1][0].modified == 0
    finally:
        del HOW["refused"]


def test_a_stack_with_several_uses_has_one_mask():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(E, IN, IN))

        def forward(self, x):
            return torch.sin(
                torch.bmm(torch.bmm(x, self.w), self.w) + torch.stack([x[e] @ self.w[e] for e in range(E)])
            )

    net, x = Twice(), inputs(torch.float32)
    dense = copy.deepcopy(net)
    program = capture(net, x)
    (site,) = eligible(sites := find_linears(program))
    assert len(site.uses) == 2 + E
    masked, _ = masked_by(program, sites)
    assert [n for n in masked.state if n.endswith("_mask")] == [mask_name(site.fqn)]
    torch.testing.assert_close(masked.module()(x), dense(x))
    mask = masked.tensor(mask_name(site.fqn)).copy_(hard_mask(net.w.detach().abs(), TWO_FOUR, 1))
    hardened, _ = run_passes(masked, [harden_masks])
    assert torch.equal(net.w, dense.w * mask)
    assert hardened.op_counts() == program.op_counts()
