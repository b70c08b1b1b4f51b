"""Random models out of linears of every kind: each pass keeps what it must keep, and hardening is exact."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import same_products
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.gate import Gate
from sparseforge_fx.deploy.lowering.lower import sparse_sites
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import (
    deploy_passes,
    find_linears,
    harden_masks,
    insert_hessian_hooks,
    run_passes,
    train_passes,
)
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, to_groups

KINDS = [
    "linear",
    "linear without bias",
    "conv1d",
    "x @ W",
    "W @ x",
    "the last again",
    "its weight",
    "its weight turned",
]
WIDTHS = [4, 6, 8, 12]


class RandomNet(nn.Module):
    """A chain of (kind, width, relu, residual) steps; three kinds of step reuse the weight of an earlier one."""

    def __init__(self, steps, features):
        super().__init__()
        self.layers, self.plan = nn.ModuleList(), []
        width = features
        for kind, out, relu, residual in steps:
            last = self.layers[-1] if len(self.layers) else None
            weight = getattr(last, "weight", None)
            in_out = isinstance(last, Conv1D) or getattr(last, "transposed", False)
            if kind == "its weight turned":
                in_out = not in_out
            fits = weight is not None and weight.shape[0 if in_out else 1] == width
            if fits and kind == "the last again":
                layer = last
            elif fits and kind in ("its weight", "its weight turned"):
                layer = Shared(weight, transposed=in_out)
            elif kind == "conv1d":
                layer = Conv1D(out, width)
                nn.init.normal_(layer.weight)
            elif kind in ("x @ W", "W @ x"):
                layer = Matmul(width, out, left=kind == "W @ x")
            else:
                layer = nn.Linear(width, out, bias=kind != "linear without bias")
            self.layers.append(layer)
            self.plan.append((relu, residual))
            with torch.no_grad():
                width = layer(torch.zeros(1, 1, width)).shape[-1]
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        for layer, (relu, residual) in zip(self.layers, self.plan, strict=True):
            y = layer(torch.relu(x) if relu else x)
            x = x + y if residual and y.shape[-1] == x.shape[-1] else y
        return self.norm(x)


class Matmul(nn.Module):
    def __init__(self, features, out, left):
        super().__init__()
        self.w, self.left = nn.Parameter(torch.randn(*((out, features) if left else (features, out)))), left

    def forward(self, x):
        return (self.w @ x.mT).mT.contiguous() if self.left else x @ self.w


class Shared(nn.Module):
    def __init__(self, weight, transposed):
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, x):
        return nn.functional.linear(x, self.weight.t() if self.transposed else self.weight)


step = st.tuples(st.sampled_from(KINDS), st.sampled_from(WIDTHS), st.booleans(), st.booleans())


@settings(max_examples=12)
@given(st.lists(step, min_size=1, max_size=5), st.sampled_from(WIDTHS), st.integers(0, 2**16))
def test_random_graphs(steps, features, seed):
    torch.manual_seed(seed)
    model = RandomNet(steps, features)
    x = torch.randn(3, 5, features)
    expected = model(x).detach()
    program = capture(model, torch.randn(2, 4, features))
    sites = find_linears(program)
    matrices = {id(p) for p in model.parameters() if p.dim() == 2}
    assert {id(program.tensor(s.fqn)) for s in sites} == matrices and len(sites) == len(matrices), "each of them once"
    slorb = 2 if all(s.in_features % 2 == 0 for s in sites) else None
    masked, _ = run_passes(program, train_passes(sites, slorb_block=slorb))
    probed, _ = run_passes(masked, [insert_hessian_hooks])
    for edited in (masked, probed):
        assert same_products(edited.module()(x), expected, depth=2 * len(steps))

    masked, _ = run_passes(program, train_passes(sites))
    for site in eligible(sites):
        masked.tensor(mask_name(site.fqn)).copy_(torch.randint(0, 3, site.shape))  # many ties
    hardened, _ = run_passes(masked, [harden_masks])
    for site in eligible(sites):
        kept = to_groups(program.tensor(site.fqn), TWO_FOUR, site.reduction_dim) != 0
        assert (kept.sum(-1) == 2).all() and check_pattern(program.tensor(site.fqn), TWO_FOUR, site.reduction_dim)
    torch.testing.assert_close(hardened.module()(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)

    sites, chosen = sparse_sites(program), Gate([ROWS], [1], None)
    lowered, _ = run_passes(program, deploy_passes(sparse_sites, chosen))
    assert lowered.op_counts()[str(OP)] == sum(len(s.uses) for s in eligible(chosen.sites))
    torch.testing.assert_close(lowered.module()(x), model(x), rtol=1e-4, atol=1e-4)

    values = copy.deepcopy(model.state_dict())
    again, _ = run_passes(program, train_passes(sites))
    for site in eligible(sites):
        again.tensor(mask_name(site.fqn)).copy_(program.tensor(site.fqn).abs())
    run_passes(again, [harden_masks])
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items()), "re-hardening changes nothing"
