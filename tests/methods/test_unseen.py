"""Weights whose inputs no calibration token ever set: the largest stay, as they are, and the report says so."""

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.methods.one_shot import LAYERWISE, SparseGPTConfig
from sparseforge_fx.methods.unseen import rank_unseen, tell_unseen
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def layer(dead, out=12, width=16):
    """A weight, and the moments of inputs among which ``dead`` are always zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x[:, dead] = 0
    return torch.randn(out, width, generator=generator), x.t() @ x / 64


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(4, 8), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("method", LAYERWISE)
def test_a_layer_without_a_token_is_pruned_by_magnitude(method, pattern):
    weight, moments = layer(slice(None))
    result = LAYERWISE[method](pattern).solve(weight, torch.ones_like(weight), moments)
    grouped = Pattern(8, 16) if method == "wanda" and isinstance(pattern, Unstructured) else pattern  # by rows
    assert torch.equal(result.weight, weight * result.mask)
    assert torch.equal(result.mask.bool(), hard_mask(weight.abs(), grouped))
    assert result.mask.float().mean() == pattern.density


@pytest.mark.parametrize("method", LAYERWISE)
def test_dead_inputs_beside_live_ones(method):
    """One group dead as a whole, and three of four in another: there the live weight stays and the largest dead one."""
    dead = [4, 5, 6, 7, 8, 9, 11]
    weight, moments = layer(dead)
    result = LAYERWISE[method](TWO_FOUR).solve(weight, torch.ones_like(weight), moments)
    mask = result.mask.bool()
    assert torch.equal(mask[:, 4:8], hard_mask(weight[:, 4:8].abs(), TWO_FOUR))
    assert torch.equal(result.weight[:, dead], (weight * mask)[:, dead])  # they keep their values
    assert (mask.view(12, 4, 4).sum(-1) == 2).all()
    assert mask[:, 10].all()
    assert torch.equal(mask[:, [8, 9, 11]].int().argmax(1), weight[:, [8, 9, 11]].abs().argmax(1))
    seen = [0, 1, 2, 3, 12, 13, 14, 15]
    small = moments[seen][:, seen]
    alone = LAYERWISE[method](TWO_FOUR).solve(weight[:, seen], torch.ones(12, 8), small)
    assert method != "wanda" or torch.equal(alone.mask, mask[:, seen])  # live groups as if the dead were not there


def test_a_given_mask_stays_and_so_do_its_dead_weights():
    weight, moments = layer([0, 1, 2, 3])
    wanted = torch.tensor([1.0, 1, 0, 0] * 4).expand(12, 16)
    result = SparseGPTConfig(TWO_FOUR, choose_masks=False).solve(weight, wanted, moments)
    assert torch.equal(result.mask, wanted.bool())
    assert torch.equal(result.weight[:, :4], (weight * wanted)[:, :4])


def test_ranks_of_the_unseen_by_hand():
    scores = torch.tensor([[0.0, 5.0, 0.0, 9.0]])
    weight = torch.tensor([[1e-3, 1.0, -2.0, 0.0]])
    ranked = rank_unseen(scores, weight, torch.tensor([True, False, True, True]))
    assert ranked.argsort(descending=True).tolist() == [[1, 2, 0, 3]] and torch.isfinite(ranked).all()


def test_what_is_said():
    assert tell_unseen(torch.eye(4)) == ""
    assert tell_unseen(torch.zeros(4, 4)) == "saw no calibration token: pruned by magnitude"
    assert tell_unseen(torch.diag(torch.tensor([1.0, 0, 0, 1]))).startswith("2 of 4 inputs are zero")


class Experts(nn.Module):
    """Tokens go to one of three experts; none ever to the last."""

    def __init__(self):
        super().__init__()
        self.router, self.out = nn.Linear(16, 3), nn.Linear(16, 4)
        self.first, self.second = (nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3)) for _ in range(2))
        self.router.bias.data = torch.tensor([0.0, 0.0, -1e4])

    def forward(self, x):
        gates = nn.functional.one_hot(self.router(x).argmax(-1), 3).to(x.dtype)
        pairs = zip(self.first, self.second, strict=True)
        mixed = sum(b(torch.relu(a(x * gates[:, k : k + 1]))) for k, (a, b) in enumerate(pairs))
        return self.out(mixed.tanh())


@pytest.mark.parametrize(("method", "options"), [*((m, {}) for m in LAYERWISE), ("sparsegpt", {"values": "int8"})])
def test_an_expert_without_tokens_keeps_its_largest_weights(method, options):
    torch.manual_seed(0)
    model = Experts()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = sf.sparsify(model, [torch.randn(64, 16)], method=method, calibration=64, **options).report
    for name in ("first.2.weight", "second.2.weight"):
        now, mask = model.get_parameter(name), hard_mask(before[name].abs(), TWO_FOUR)
        assert torch.equal(now != 0, mask)
        assert options or torch.equal(now, before[name] * mask)
        rounded = "; saw no calibration token: its own nearest values" if options else ""
        assert report["layer_notes"][name] == f"saw no calibration token: pruned by magnitude{rounded}"
    assert "first.0.weight" not in report["layer_notes"]
    assert check_pattern(model.get_parameter("first.0.weight"), TWO_FOUR)
