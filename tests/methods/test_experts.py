"""Experts of a mixture in the layer-wise walk: each on the tokens that were routed to it, or on all of them."""

import pytest
import torch

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.layerwise import LayerSolution, prune_layer_by_layer
from sparseforge_fx.methods.one_shot import SparseGPTConfig, WandaConfig
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask


def masked_weights(program):
    sites = find_linears(program)
    masked, _ = run_passes(program, train_passes(sites))
    return masked, [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim)
        for s in eligible(sites)
    ]


def stacks(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


def routed(model, batches):
    """By stack, the inputs of every expert, from the model's own modules: [tokens, in] each."""
    found = {}

    def see(module, args, kwargs):
        hidden, chosen, _ = [*args, *kwargs.values()]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        name = names[module]
        for e in range(module.num_experts):
            x = hidden[(chosen == e).any(-1)]
            up = x @ module.gate_up_proj[e] if module.is_transposed else x @ module.gate_up_proj[e].t()
            up = up + module.gate_up_proj_bias[e] if module.has_bias else up
            for leaf, value in (("gate_up_proj", x), ("down_proj", module._apply_gate(up))):
                found.setdefault(f"{name}.{leaf}", {}).setdefault(e, []).append(value)

    names = {m: n for n, m in model.named_modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")}
    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {n: {e: torch.cat(rows) for e, rows in parts.items()} for n, parts in found.items()}


def keeping(seen):
    """A method that changes nothing and notes what it was given."""

    def solve(weight, mask, moments):
        seen.append((weight.shape, moments))
        return LayerSolution(weight.clone(), mask.clone())

    return solve


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_moments_are_of_the_tokens_routed_to_each_expert(tiny, name):
    found = tiny(name)
    batches = [found.batch(seed, rows=2) for seed in range(3)]
    expected = routed(found.model, batches)
    masked, weights = masked_weights(found.program)
    experts, order = Experts(TWO_FOUR, 1), [w.fqn for w in weights if w.weight.dim() == 3]
    assert set(order) == set(stacks(found.model)) == set(expected)
    seen = []
    chosen = [w for w in weights if w.fqn in order]
    prune_layer_by_layer(masked, chosen, batches, keeping(seen), experts)
    each = [(fqn, e) for fqn in order for e in range(4)]
    assert len(seen) == len(each)
    for (fqn, e), (shape, moments) in zip(each, seen, strict=True):
        x = expected[fqn][e]
        assert experts.tokens[fqn][e] == len(x) and shape[1] == x.shape[1]
        torch.testing.assert_close(moments, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    assert sum(experts.tokens[order[0]]) == 3 * 2 * 12 * 2  # batches x rows x tokens x experts per token


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_every_token_to_every_expert(tiny, name):
    """What the experts' own modules compute of all rows."""
    found = tiny(name)
    batches = [found.batch(seed, rows=2) for seed in range(2)]
    model, hidden = found.model, []
    part = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts"))
    handle = part.register_forward_pre_hook(
        lambda m, args, kw: hidden.append([*args, *kw.values()][0].flatten(0, -2)), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat(hidden)
    masked, weights = masked_weights(found.program)
    experts, seen = Experts(TWO_FOUR, 1, every_token=True), []
    chosen = [w for w in weights if w.weight.dim() == 3]
    before = masked.module()(**batches[0])[0]
    prune_layer_by_layer(masked, chosen, batches, keeping(seen), experts)
    assert all(counts == [len(x)] * 4 for counts in experts.tokens.values())
    for e in range(4):
        torch.testing.assert_close(seen[e][1], x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            up = x @ part.gate_up_proj[e] if part.is_transposed else x @ part.gate_up_proj[e].t()
            up = part._apply_gate(up + part.gate_up_proj_bias[e] if part.has_bias else up)
        torch.testing.assert_close(seen[4 + e][1], up.t() @ up / len(up), rtol=1e-4, atol=1e-5)
    assert torch.equal(masked.module()(**batches[0])[0], before)


def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_named(tiny):
    found = tiny("moe")
    batches = [found.batch()]
    counts = {fqn: [len(x) for x in parts.values()] for fqn, parts in routed(found.model, batches).items()}
    first = next(iter(counts))
    limit = sorted(counts[first])[2]  # two experts have less, but for ties
    few = [e for e, n in enumerate(counts[first]) if n < limit]
    assert few
    dense = {n: p.detach().clone() for n, p in stacks(found.model).items()}
    masked, weights = masked_weights(found.program)
    experts = Experts(TWO_FOUR, limit)
    chosen = [w for w in weights if w.fqn == first]
    notes = prune_layer_by_layer(masked, chosen, batches, WandaConfig(TWO_FOUR).solve, experts)
    assert experts.tokens == {first: counts[first]}
    assert experts.describe()["experts"][first]["by_magnitude"] == few
    listed = ", ".join(map(str, few))
    assert f"{listed} saw fewer than {limit} calibration tokens: pruned by magnitude" in notes[first]
    weight = found.model.get_parameter(first).detach()
    assert check_pattern(weight, TWO_FOUR)
    for e in range(4):
        by_size = dense[first][e] * hard_mask(dense[first][e].abs(), TWO_FOUR)
        assert torch.equal(weight[e], by_size) == (e in few)


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_sparsegpt_on_each_expert_is_sparsegpt_on_a_linear(tiny, name):
    """In place, and stored either way round."""
    found = tiny(name)
    batches = [found.batch(seed, rows=4) for seed in range(2)]
    masked, weights = masked_weights(found.program)
    (w, *_) = (w for w in weights if w.weight.dim() == 3)
    inputs, dense = routed(found.model, batches)[w.fqn], w.weight.detach().clone()
    address = w.weight.data_ptr()
    config = SparseGPTConfig(TWO_FOUR)
    prune_layer_by_layer(masked, [w], batches, config.solve, Experts(TWO_FOUR, 1))
    assert w.weight.data_ptr() == address and check_pattern(w.weight, TWO_FOUR, w.dim)
    for e, x in inputs.items():
        stored = dense[e].t() if w.dim == 1 else dense[e]
        alone = config.solve(stored, torch.ones_like(stored), x.t() @ x / len(x))
        got = w.weight[e].t() if w.dim == 1 else w.weight[e]
        torch.testing.assert_close((got @ x.t()).detach(), alone.weight @ x.t(), rtol=1e-2, atol=1e-3)


def test_an_expert_that_no_token_reached(tiny):
    found = tiny("moe")
    with torch.no_grad():
        router = next(m for n, m in found.model.named_modules() if n.endswith("mlp.gate"))
        router.weight[3] = 0
        router.weight[:3] = router.weight[:3].abs() * 0
        found.model.get_input_embeddings().weight.abs_()
    program = capture(found.model, found.example)
    masked, weights = masked_weights(program)
    experts = Experts(TWO_FOUR, 0)
    notes = prune_layer_by_layer(
        masked, [w for w in weights if w.weight.dim() == 3], [found.batch()], SparseGPTConfig(TWO_FOUR).solve, experts
    )
    (counts, *_) = experts.tokens.values()
    assert 0 in counts and all("saw no calibration token" in text for text in notes.values())
    assert all(check_pattern(p, TWO_FOUR) for p in stacks(found.model).values())


def test_what_an_expert_lost(tiny):
    """The squared error of its outputs, on the tokens that it saw."""
    found = tiny("moe")
    batches = [found.batch(rows=4)]
    masked, weights = masked_weights(found.program)
    (w, *_) = (w for w in weights if w.weight.dim() == 3)
    inputs, dense = routed(found.model, batches)[w.fqn], w.weight.detach().clone()
    experts = Experts(TWO_FOUR, len(inputs[0]) + 1)  # the first, at least, by magnitude
    prune_layer_by_layer(masked, [w], batches, SparseGPTConfig(TWO_FOUR).solve, experts)
    for e, x in inputs.items():
        was, gone = x @ dense[e].t(), x @ (w.weight[e] - dense[e]).t().detach()
        wanted = float(gone.square().sum() / was.square().sum())
        assert experts.describe()["experts"][w.fqn]["error"][e] == pytest.approx(wanted, rel=1e-3) and 0 < wanted < 1


def test_an_expert_that_the_graph_never_reads_is_pruned_by_magnitude():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return torch.sin(x @ self.w[0] + x @ self.w[2])

    net = Two()
    dense = net.w.detach().clone()
    masked, weights = masked_weights(capture(net, torch.randn(4, 8)))
    experts = Experts(TWO_FOUR, 1, every_token=True)
    notes = prune_layer_by_layer(masked, weights, [torch.randn(64, 8)], SparseGPTConfig(TWO_FOUR).solve, experts)
    assert notes["w"].startswith("experts 0, 2 calibrated on the tokens routed there")
    assert check_pattern(net.w, TWO_FOUR, 1) and experts.tokens == {"w": [64, 0, 64]}
    assert "expert 1 is never read by the graph: pruned by magnitude" in notes["w"]
    described = experts.describe()["experts"]["w"]
    assert described["by_magnitude"] == [1] and [e is None for e in described["error"]] == [False, True, False]
    assert torch.equal(net.w[1], dense[1] * hard_mask(dense[1].abs(), TWO_FOUR, 0))
    assert not torch.equal(net.w[0], dense[0] * hard_mask(dense[0].abs(), TWO_FOUR, 0))
