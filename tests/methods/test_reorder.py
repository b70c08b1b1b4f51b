"""An order of the inputs: a permutation that keeps at least as much, and the same whether channels moved before or on
the way."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods import reorder as module
from sparseforge_fx.methods.reorder import find_order
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_channels import find_channels
from sparseforge_fx.pattern import TWO_FOUR, Pattern, hard_mask

PATTERNS = [TWO_FOUR, Pattern(1, 4), Pattern(4, 8), Pattern(6, 8), Pattern(1, 2), Pattern(3, 4)]


def kept(worth, pattern):
    return (worth * hard_mask(worth, pattern, 1)).sum()


@given(st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
def test_a_permutation_that_never_keeps_less(pattern, groups, rows, seed):
    worth = torch.rand(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed)).square()
    order = find_order(worth, pattern, rounds=12)
    assert sorted(order.tolist()) == list(range(worth.shape[1]))
    assert kept(worth[:, order], pattern) >= kept(worth, pattern) * (1 - 1e-6)
    assert torch.equal(order, find_order(worth, pattern, rounds=12))


def test_what_belongs_together_is_found():
    """Four columns that matter, in one group of two places: two of them go elsewhere, and nothing is lost."""
    worth = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]]).expand(3, 8)
    assert kept(worth, TWO_FOUR) == 6
    assert kept(worth[:, find_order(worth, TWO_FOUR)], TWO_FOUR) == 12


@pytest.mark.parametrize("worth", [torch.ones(3, 16), torch.zeros(3, 16), torch.rand(4, 4)])
def test_nothing_moves_where_nothing_gains(worth):
    assert torch.equal(find_order(worth, TWO_FOUR), torch.arange(worth.shape[1]))


def text(rows=4):
    return [{"input_ids": torch.randint(3, 50, (rows, 24))} for _ in range(3)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_moved_on_the_way_is_moved_before(name, monkeypatch):
    """The walk has computed a weight's inputs when it gives them an order: what it holds must get that order, too."""
    orders = []

    def remember(worth, pattern):
        orders.append(torch.randperm(worth.shape[1]))
        return orders[-1]

    monkeypatch.setattr(module, "find_order", remember)
    model = build(name).eval()
    twin, data = copy.deepcopy(model), text()
    report = sf.sparsify(model, data, method="sparsegpt", reorder=True).report
    assert "new order" in " ".join(report["layer_notes"].values())
    program = capture(twin)
    program = run_passes(program, train_passes(find_linears(program)))[0]
    sets, _ = find_channels(program, TWO_FOUR)
    assert len(orders) == len(sets) > 0
    for each, order in zip(sets, orders, strict=True):
        each.permute(program.state, order)
    expected = sf.sparsify(twin, data, method="sparsegpt").report
    told = [any("does not fit any more" in n for n in r["notes"]) for r in (report, expected)]
    assert told == [True, False]
    for fqn, change in report["layers"].items():  # what became of a weight is told of where its entries stand now
        assert change == pytest.approx(expected["layers"][fqn], rel=1e-2), fqn
    for (fqn, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=fqn)


def test_the_error_of_a_layer_falls():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
    with torch.no_grad():
        net[2].weight.mul_(torch.rand(64).square() * 3)
    x, dense = torch.randn(256, 16), copy.deepcopy(net)
    errors = []
    for reorder in (False, True):
        pruned = copy.deepcopy(dense)
        sf.sparsify(pruned, [x], method="alps", reorder=reorder)
        errors.append((pruned[:3](x) - dense[:3](x)).square().mean().item())
    assert errors[1] < 0.97 * errors[0]


def test_training_goes_on_from_a_new_order():
    data = [{**batch, "labels": batch["input_ids"]} for batch in text()]
    result = sf.sparsify(build("llama"), data, steps=2, reorder=True)
    assert "new order" in " ".join(result.report["layer_notes"].values())
    dense = build("llama")
    assert result.report["curves"][0]["kl"] < 1
    assert all(0 < change["moved"] < 1 for change in result.report["layers"].values())
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("options", [{"start": "wanda"}, {"start": "dense"}, {"quench_end": 0.4}])
def test_masks_that_are_not_final_refuse_it(options):
    with pytest.raises(SparseForgeError, match="reorder is for masks that are final"):
        sf.sparsify(build("llama"), text(), steps=2, reorder=True, **options)


def test_an_order_that_cannot_be_is_said():
    with pytest.raises(SparseForgeError, match="reorder is about the groups of N:M, and 50% has none"):
        sf.sparsify(build("llama"), text(), method="wanda", pattern="50%", reorder=True)
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.LayerNorm(8))
    report = sf.sparsify(net, [torch.randn(9, 16)], method="wanda", reorder=True).report
    assert report["layer_notes"]["0.weight"].startswith("reorder changes nothing")


def test_a_failure_half_way_leaves_every_bias_as_it_was(monkeypatch):
    model = build("opt")
    before = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    follow, calls = module.find_order, []

    def fail(worth, pattern):
        calls.append(worth)
        if len(calls) > 2:
            raise RuntimeError("enough")
        return follow(worth, pattern).flip(0)

    monkeypatch.setattr(module, "find_order", fail)
    with pytest.raises(RuntimeError, match="enough"):
        sf.sparsify(model, text(), method="sparsegpt", reorder=True)
    assert all(torch.equal(value, before[fqn]) for fqn, value in model.state_dict().items())


def test_what_a_method_beside_forward_reads_keeps_its_order():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(8, 16), nn.Linear(16, 8)
            self.out, self.heads = nn.Linear(8, 8), nn.Linear(16, 5)

        def forward(self, x):
            return self.out(self.dec(self.enc(x)).relu())

        def classify(self, x):
            return self.heads(self.enc(x))

    torch.manual_seed(0)
    model, x = Coder(), torch.randn(64, 8)
    report = sf.sparsify(model, [x], method="sparsegpt", reorder=True, include=["enc", "dec"]).report
    assert "new order" not in str(report["layer_notes"])
    assert "heads.weight, which the captured forward does not read" in report["layer_notes"]["dec.weight"]
