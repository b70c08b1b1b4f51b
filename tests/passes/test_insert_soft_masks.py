"""linear / addmm / mm / matmul -> soft_masked_linear: to the bit at a mask of ones, and nothing else changes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from rounding import same_products
from torch import nn
from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes import find_linears, insert_soft_masks, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

SITES = {"up.weight", "down.weight", "twice.weight", "to_six.weight"}


@pytest.fixture
def sites(program):
    return find_linears(program)


@pytest.fixture
def masked(program, sites):
    return run_passes(program, [lambda p: insert_soft_masks(p, sites)])[0]


def gradients(module, x, weights):
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    # no sum of squares: after a norm that is constant, and its gradient is rounding alone
    return out, torch.autograd.grad(out.float().pow(3).sum(), [leaf, *weights])


def test_operator_counts(program, masked):
    before, after = program.op_counts(), masked.op_counts()
    assert (before["aten.linear.default"], before["aten.addmm.default"]) == (6, 1)
    assert (after["aten.linear.default"], after["aten.addmm.default"]) == (1, 0)  # from_six stays: 6 % 4 != 0
    assert after[str(OP)] == 6
    assert sum(after.values()) == sum(before.values())


def test_one_mask_per_weight_under_its_first_name(masked):
    masks = {fqn: value for _, fqn, value in masked.lifted(InputKind.BUFFER)}
    assert set(masks) == {mask_name(s) for s in SITES}
    for site in SITES:
        mask, weight = masks[mask_name(site)], masked.tensor(site)
        assert (
            mask.shape == weight.shape and mask.dtype == weight.dtype and (mask == 1).all() and not mask.requires_grad
        )
    nodes = masked.graph.find_nodes(op="call_function", target=OP)
    assert len({n.args[2] for n in nodes if n.args[1].name == "p_twice_weight"}) == 1, "a tie shares its mask"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_ones_changes_no_value_or_gradient(net, x, dtype):
    net, x = net.to(dtype), x.to(dtype)
    program = capture(net, x)
    masked = insert_soft_masks(program.copy(), find_linears(program)).program
    parameters = list(net.parameters())
    expected, got = gradients(net, x, parameters), gradients(masked.module(), x, parameters)
    assert same_products(got[0], expected[0])
    assert all(map(same_products, got[1], expected[1]))


def test_a_hard_mask_computes_the_masked_dense_model(masked, net, x):
    twin = copy.deepcopy(net)
    for site in SITES:
        mask = masked.tensor(mask_name(site))
        mask.copy_(hard_mask(torch.rand_like(mask), TWO_FOUR, dim=0 if site == "down.weight" else 1))
        with torch.no_grad():
            twin.get_parameter(site).mul_(mask)
    assert same_products(masked.module()(x), twin(x))


def test_nothing_matches_nothing_changes(program, sites):
    other = program.copy()
    code = other.exported.graph_module.code
    assert insert_soft_masks(other, []).modified == 0
    skipped = [s for s in sites if s.reason]
    assert insert_soft_masks(other, skipped).modified == 0
    assert other.exported.graph_module.code == code and other.op_counts() == program.op_counts()


def test_a_second_run_changes_nothing(masked, sites):
    code, state = masked.exported.graph_module.code, dict(masked.state)
    assert insert_soft_masks(masked, sites).modified == 0  # the sites of before
    assert insert_soft_masks(masked, find_linears(masked)).modified == 0  # and those that it has now
    masked.validate()
    assert masked.exported.graph_module.code == code and masked.state == state
    assert all("soft_masked_linear" in s.reason for s in find_linears(masked) if s.fqn in SITES)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_reload_and_unflatten(masked, net, x):
    for site in SITES:
        masked.tensor(mask_name(site)).uniform_()
    expected = masked.module()(x)
    file = io.BytesIO()
    torch.export.save(masked.exported, file)
    file.seek(0)
    assert same_products(torch.export.load(file).module()(x), expected)
    tree = torch.export.unflatten(masked.exported)
    assert same_products(tree(x), expected)
    assert {n for n, _ in tree.named_parameters()} >= SITES and "weight_mask" in dict(tree.down.named_buffers())


def test_training_the_graph_trains_the_model(masked, net, x):
    module = masked.module()
    assert all(p is net.get_parameter(n) for n, p in module.named_parameters())
    before = net(x).detach()
    module(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not torch.equal(net(x), before) and same_products(net(x), module(x))


class Orientations(nn.Module):
    """Every way to write a linear, as (module, sites)."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.w = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.sin(HOW[self.how][0](x, self.w, self.b))


#: how it is written -> (function, the weight is stored [in, out])
HOW = {
    "F.linear(x, W, b)": (lambda x, w, b: F.linear(x, w, b), False),
    "F.linear(x, W.t())": (lambda x, w, b: F.linear(x, w.t()), True),
    "F.linear(x, W.t(), b)": (lambda x, w, b: F.linear(x, w.t(), b), True),
    "x @ W": (lambda x, w, b: x @ w, True),
    "x @ W + b": (lambda x, w, b: x @ w + b, True),
    "x @ W.T": (lambda x, w, b: x @ w.T, False),
    "x @ W.mT": (lambda x, w, b: x @ w.mT, False),
    "x @ W.transpose": (lambda x, w, b: x @ w.transpose(-2, -1), False),
    "x @ W.permute": (lambda x, w, b: x @ w.permute(1, 0), False),
    "x @ W.t().t()": (lambda x, w, b: x @ w.t().t(), True),
    "W @ x": (lambda x, w, b: w @ x.mT, False),
    "(W @ x).view": (lambda x, w, b: (w @ x.mT).view(-1, 3), False),
    "W.t() @ x": (lambda x, w, b: w.t() @ x.mT, True),
    "addmm": (lambda x, w, b: torch.addmm(b, x[0], w), True),
    "addmm(W.t())": (lambda x, w, b: torch.addmm(b, x[0], w.t()), False),
    "mm": (lambda x, w, b: torch.mm(x[0], w), True),
    "mm(W, x)": (lambda x, w, b: torch.mm(w, x[0].t()), False),
    "matmul(W, vector)": (lambda x, w, b: torch.matmul(w, x[0, 0]), False),
    "matmul(vector, W)": (lambda x, w, b: torch.matmul(x[0, 0], w), True),
}


@pytest.mark.parametrize("how", HOW)
def test_every_way_to_write_a_linear(how, x):
    net = Orientations(how)
    program = capture(net, x)
    (site,) = eligible(find_linears(program))
    assert site.fqn == "w" and site.transposed == HOW[how][1]
    masked, records = run_passes(program, [lambda p: insert_soft_masks(p, [site])])
    assert records[0].modified == 1 and masked.op_counts()[str(OP)] == 1
    module = masked.module()
    (got, got_grad), (expected, grad) = (gradients(m, x, [net.w]) for m in (module, net))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_grad, grad)
    # the groups of four run along what is summed over: zeros of the mask act as zeros of the weight there
    mask = hard_mask(torch.rand(8, 8), TWO_FOUR, dim=site.reduction_dim).float()
    masked.tensor("w_mask").copy_(mask)
    got = module(x)
    with torch.no_grad():
        net.w.mul_(mask)
    torch.testing.assert_close(got, net(x), rtol=1e-6, atol=1e-6)


def test_a_linear_that_is_a_user_output_keeps_its_name_in_the_signature(x):
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            h = self.a(x)
            return {"hidden": h, "head": self.b(h)}

    net = TwoOutputs()
    program = capture(net, x)
    masked, _ = run_passes(program, [lambda p: insert_soft_masks(p, find_linears(p, include=["*"]))])
    assert masked.op_counts() == {str(OP): 2}
    out, expected = masked.module()(x), net(x)
    assert out.keys() == expected.keys() and all(same_products(out[k], expected[k]) for k in out)
    assert same_products(torch.export.unflatten(masked.exported)(x)["hidden"], expected["hidden"])
