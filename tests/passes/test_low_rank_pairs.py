"""A low-rank pair beside a linear is an adapter, whoever wrote it; what only looks like one is not."""

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

FORMS = {
    "plain": lambda m, x: m.base(x) + m.b(m.a(x)),
    "scaled": lambda m, x: 2.0 * m.b(m.a(x) * 0.5) / m.scale + m.base(x),
    "cast": lambda m, x: m.base(x) + m.b(m.a(x.float()).contiguous()).to(x.dtype),
    "in a residual": lambda m, x: x + (m.base(x) + m.b(m.a(x))),
    "two adapters": lambda m, x: m.base(x) + m.b(m.a(x)) + m.b2(m.a2(x)),
    "matmul": lambda m, x: m.base(x) + (x @ m.a.weight.t()) @ m.b.weight.t(),
}
OTHERS = {
    "a bottleneck": lambda m, x: m.base(x) + m.b(torch.relu(m.a(x))),
    "of another input": lambda m, x: m.base(x) + m.b(m.a(torch.tanh(x))),
    "not added": lambda m, x: m.base(x) * m.b(m.a(x)),
    "gated": lambda m, x: m.base(x) + torch.sigmoid(x) * m.b(m.a(x)),
    "not narrow": lambda m, x: m.base(x) + m.b(m.a(x)),
}


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.base, self.form = nn.Linear(16, 16), form
        self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        if form is FORMS["two adapters"]:
            self.a2, self.b2 = nn.Linear(16, 8), nn.Linear(8, 16)
        if form is OTHERS["not narrow"]:
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.form(self, x)


def model_of(form):
    return nn.Sequential(Layer(form), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)).eval()


def reasons(model, **options):
    return {s.fqn: s.reason for s in find_linears(capture(model, torch.randn(2, 16)), **options)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_pairs_are_left_alone_and_their_frozen_base_is_a_site(form, frozen):
    model = model_of(FORMS[form])
    for module in (model[0].base, model[2]):
        module.requires_grad_(not frozen)
    found = reasons(model)
    assert found.pop("0.base.weight") is None and found.pop("2.weight") is None
    assert len(found) == (4 if form == "two adapters" else 2)
    assert set(found.values()) == {"low-rank branch of 0.base.weight; include it by name to prune it"}
    assert reasons(model, include=["0.a"])["0.a.weight"] is None


@pytest.mark.parametrize("form", OTHERS)
def test_what_only_looks_like_a_pair_is_pruned(form):
    assert set(reasons(model_of(OTHERS[form])).values()) == {None}


def test_frozen_weights_beside_an_unfrozen_matrix_stay_dense():
    model = model_of(FORMS["plain"])
    model[0].base.requires_grad_(False)
    found = reasons(model)
    assert found["2.weight"] is None and found["0.base.weight"].startswith("frozen")


@pytest.mark.parametrize("method", ["wanda", "gmp"])
def test_a_run_keeps_the_pair_bit_for_bit(method):
    model = model_of(FORMS["plain"])
    model[0].base.requires_grad_(False)
    model[2].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    sf.sparsify(model, [torch.randn(8, 16)], method=method, steps=2, calibration=8, show_progress=False)
    assert check_pattern(model[0].base.weight, TWO_FOUR)
    assert all(torch.equal(model[0].get_parameter(n), before[n]) for n in ("a.weight", "b.weight"))
