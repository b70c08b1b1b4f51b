"""Layer-wise OBS over a graph against the same done by hand on the source model, layer after layer."""

import pytest
import torch
from torch import nn

from sparseforge_fx.formats import parse_format
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.layerwise import prune_layer_by_layer, round_layer_by_layer
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.one_shot import SparseGPTConfig
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import Pattern, hard_mask

TWO_FOUR = Pattern(2, 4)


def soft_masked(program):
    sites = [s for s in find_linears(program) if s.reason is None]
    masked, _ = run_passes(program, train_passes(find_linears(program)))
    weights = [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim) for s in sites
    ]
    return masked, weights


def by_hand(model, order, batches, dim):
    """prune_obs with the moments that hooks see, one layer after another; inputs shared by several layers once."""
    masks = {}
    with torch.no_grad():
        for fqn in order:
            rows = []
            owner = model.get_submodule(fqn.rpartition(".")[0])
            handle = owner.register_forward_hook(
                lambda module, args, out, rows=rows: rows.append(args[0].flatten(0, -2))
            )
            for batch in batches:
                model(**batch)
            handle.remove()
            x = torch.cat(rows)
            value = model.get_parameter(fqn)
            result = prune_obs(value if dim else value.t(), x.t() @ x / len(x), TWO_FOUR)
            value.copy_(result.weight if dim else result.weight.t())
            masks[fqn] = result.mask if dim else result.mask.t()
    return masks


@pytest.mark.parametrize(("name", "dim"), [("llama", 1), ("gpt2", 0), ("opt", 1)])
def test_sparsegpt_equals_the_same_by_hand(tiny, name, dim):
    found = tiny(name)
    batches = [found.batch(seed, rows=4, length=16) for seed in range(4)]
    masked, weights = soft_masked(found.program)
    notes = prune_layer_by_layer(masked, weights, batches, SparseGPTConfig(TWO_FOUR).solve)
    got = {w.fqn: (w.weight.detach().clone(), w.mask.clone()) for w in weights}
    found.reset()
    # the order that the graph has; a layer that reads what another one read is not upset by that one's pruning
    masks = by_hand(found.model, [w.fqn for w in weights], batches, dim)
    for fqn, (weight, mask) in got.items():
        assert torch.equal(mask.bool(), masks[fqn]), fqn
        torch.testing.assert_close(weight, found.weights[fqn].detach(), rtol=1e-3, atol=1e-3, msg=fqn)
        assert not weight[mask == 0].any()
    assert notes == {}


def output_error(found, batches, dense):
    with torch.no_grad():
        return sum((found.model(**b).logits - d).square().mean().item() for b, d in zip(batches, dense, strict=True))


def test_layerwise_solution_beats_magnitude_on_the_output(tiny):
    found = tiny("llama")
    batches = [found.batch(seed, rows=8, length=16) for seed in range(4)]
    with torch.no_grad():
        dense = [found.model(**b).logits for b in batches]
    masked, weights = soft_masked(found.program)
    prune_layer_by_layer(masked, weights, batches, SparseGPTConfig(TWO_FOUR).solve)
    layerwise = output_error(found, batches, dense)
    found.reset()
    with torch.no_grad():
        for w in weights:
            w.weight.mul_(hard_mask(w.weight.abs(), TWO_FOUR, w.dim))
    assert layerwise < 0.9 * output_error(found, batches, dense)


def test_masks_that_are_given_are_kept(tiny):
    found = tiny("gpt2")
    masked, weights = soft_masked(found.program)
    generator = torch.Generator().manual_seed(0)
    for w in weights:
        w.mask.copy_(torch.rand(w.mask.shape, generator=generator))
    wanted = {w.fqn: hard_mask(w.mask, TWO_FOUR, w.dim) for w in weights}
    before = {w.fqn: w.weight.detach().clone() for w in weights}
    prune_layer_by_layer(masked, weights, [found.batch(rows=8)], SparseGPTConfig(TWO_FOUR, choose_masks=False).solve)
    for w in weights:
        assert torch.equal(w.mask.bool(), wanted[w.fqn])
        assert not w.weight[~wanted[w.fqn]].any()
        assert not torch.allclose(w.weight[wanted[w.fqn]], before[w.fqn][wanted[w.fqn]])  # compensated


def test_only_the_weights_that_are_asked_for(tiny):
    found = tiny("llama")
    masked, weights = soft_masked(found.program)
    prune_layer_by_layer(masked, weights[3:5], [found.batch()], SparseGPTConfig(TWO_FOUR).solve)
    for i, w in enumerate(weights):
        assert torch.equal(w.weight, found.first[w.fqn]) == (i not in (3, 4))
        assert (w.mask == 1).all() == (i not in (3, 4))


def test_raised_damping_is_reported_by_name():
    """One token: a Hessian of rank one, which no tiny damping makes definite."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16))
    masked, weights = soft_masked(capture(model, torch.randn(2, 16)))
    notes = prune_layer_by_layer(masked, weights, [torch.randn(1, 16)], SparseGPTConfig(TWO_FOUR, damping=1e-13).solve)
    assert set(notes) == {"0.weight", "2.weight"} and all("damping raised to" in note for note in notes.values())
    assert all(torch.isfinite(w.weight).all() for w in weights)


def test_bfloat16_weights_hold_the_rounded_solution(tiny):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16))
    x = torch.randn(64, 16).bfloat16()
    first = model[0].weight.detach().bfloat16()
    expected = prune_obs(first, x.float().t() @ x.float() / 64, TWO_FOUR)
    masked, weights = soft_masked(capture(model.bfloat16(), x[:4]))
    prune_layer_by_layer(masked, weights, [x], SparseGPTConfig(TWO_FOUR).solve)
    assert weights[0].weight.dtype == weights[0].mask.dtype == torch.bfloat16
    assert torch.equal(weights[0].weight, expected.weight.bfloat16())
    assert torch.equal(weights[0].mask.bool(), expected.mask)


# -- rounding --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "dim"), [("llama", 1), ("gpt2", 0)])
def test_rounded_weights_answer_as_the_model_before(tiny, name, dim):
    """Nearer than by their own nearest values, at the end of the model, on tokens that nobody calibrated on."""
    found = tiny(name)
    batches = [found.batch(seed, rows=8, length=16) for seed in range(8)]
    unseen = [found.batch(seed, rows=8, length=16) for seed in range(20, 24)]
    masked, weights = soft_masked(found.program)
    for w in weights:
        w.mask.copy_(hard_mask(w.weight.abs(), TWO_FOUR, w.dim))
        w.weight.data.mul_(w.mask)
    sparse = {w.fqn: w.weight.detach().clone() for w in weights}
    with torch.no_grad():
        want = [found.model(**b).logits for b in unseen]
    formats = {w.fqn: parse_format("2:4 int4/32") for w in weights if w.weight.shape[w.dim] % 32 == 0}
    assert formats
    rounded, notes = round_layer_by_layer(masked, weights, batches, formats)
    assert set(rounded) == set(formats) and notes == {}
    walked = output_error(found, unseen, want)
    for w in weights:
        now = w.weight.t() if dim == 0 else w.weight
        assert torch.equal(now, rounded[w.fqn].weight) if w.fqn in formats else torch.equal(w.weight, sparse[w.fqn])
        assert not w.weight[sparse[w.fqn] == 0].any()
    with torch.no_grad():
        for w in weights:
            if w.fqn in formats:
                value = sparse[w.fqn].t() if dim == 0 else sparse[w.fqn]
                nearest = round_weight(value, formats[w.fqn]).weight
                w.weight.copy_(nearest.t() if dim == 0 else nearest)
    assert walked < 0.8 * output_error(found, unseen, want)
