"""The prediction against what it stands for: the Fisher information, exactly where nothing is left out."""

import pytest
import torch
from torch import nn
from transformers.integrations.moe import _grouped_linear

from sparseforge_fx.data.reading import Reader
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.calibrate import Read
from sparseforge_fx.passes import find_linears
from sparseforge_fx.planning.observe import EXPERTS, drawn_experts, read_of
from sparseforge_fx.planning.sensitivity import drawn_outputs, output_curvature, predicted_loss
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.objective import Objective


def linears(module):
    return {n: Read(n.name, 0) for n in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)}


def curvature_of(model, batches, draws=1):
    program = capture(model, batches[0])
    module, reader = program.module(), Reader(program)
    nodes = {n: Read(str(n.args[1].target), 0) for n in linears(module)}
    answer = Objective(Distillation(), getattr(model, "config", None), print).answer
    return output_curvature(module, nodes, [reader.read((b,), {}) for b in batches], answer, draws=draws)


class Classifier(nn.Module):
    """One linear whose outputs are the scores."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return {"logits": self.head(x)}


def test_scores_of_classes_have_the_fisher_information_of_a_softmax():
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(40, 6)
    p = model(x)["logits"].softmax(-1)
    found = curvature_of(model, [x[:20], x[20:]], draws=400)
    torch.testing.assert_close(found["head.weight"], (p * (1 - p)).mean(0).detach(), rtol=0.1, atol=0.01)


def test_the_prediction_is_the_divergence_that_a_small_error_makes():
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(400, 6)
    curvature = curvature_of(model, [x], draws=200)["head.weight"]
    error = torch.zeros(3, 6)
    error[1] = 0.05 * torch.randn(6)  # one output alone: nothing is left out
    before = model(x)["logits"].log_softmax(-1)
    after = (x @ (model.head.weight + error).t() + model.head.bias).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert predicted_loss(error, x.t() @ x / len(x), curvature) == pytest.approx(divergence, rel=0.1)


def test_what_is_at_stake_where_rows_are_taken():
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 5)), torch.randint(30, (1, 500))
    program = capture(model, ids)
    module = program.module()
    (taken,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    answer = Objective(Distillation(), None, print).answer
    batches = [Reader(program).read((ids,), {})]
    (stake,) = output_curvature(module, {}, batches, answer, draws=200, taken=[taken]).values()
    with torch.no_grad():
        rows, y = model[0](ids)[0], model(ids)[0]
        error = 0.01 * torch.randn(30, 16)[ids[0]] * rows.square().mean(1, keepdim=True).sqrt()  # even over the width
        relative = (model[1](error) - model[1].bias).square().sum(1) / y.square().sum(1)
    assert 0.5 * 0.01**2 * stake.item() == pytest.approx(relative.mean().item(), rel=0.35)


def test_other_answers_count_their_squared_error_in_relation_to_their_square():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Identity()), torch.randn(300, 6)
    curvature = curvature_of(model, [x], draws=100)["0.weight"]
    error = 0.01 * torch.randn(4, 6)
    with torch.no_grad():
        y = model(x)
        relative = ((x @ error.t()).square().sum(1) / y.square().sum(1)).mean().item()
    # rows weigh by their own answers, which the moments average over
    assert predicted_loss(error, x.t() @ x / len(x), curvature) == pytest.approx(relative, rel=0.35)


def test_neither_gradients_nor_flags_of_the_model_change(tiny):
    found = tiny("llama")
    found.model.lm_head.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in found.model.named_parameters()}
    module, reader = found.program.module(), Reader(found.program)
    answer = Objective(Distillation(), found.model.config, print).answer
    with torch.no_grad():
        curvature = output_curvature(module, linears(module), [reader.read((), found.batch())], answer)
    assert len(curvature) == 15 and all(bool((g > 0).any()) for g in curvature.values())
    assert {n: p.requires_grad for n, p in found.model.named_parameters()} == flags
    assert all(p.grad is None for p in found.model.parameters())
    again = output_curvature(module, linears(module), [reader.read((), found.batch())], answer)
    assert all(torch.equal(curvature[n], again[n]) for n in curvature)


def test_padding_has_no_part_in_it(tiny):
    found = tiny("llama")
    ids = found.batch(rows=1)["input_ids"]
    mask = torch.ones_like(ids)
    program = capture(found.model, {"input_ids": ids, "attention_mask": mask})
    module, reader = program.module(), Reader(program)
    answer = Objective(Distillation(), found.model.config, print).answer
    wide = [torch.cat([t, torch.zeros_like(t)], 1) for t in (ids, mask)]
    short, padded = (
        output_curvature(module, linears(module), [reader.read((), {"input_ids": i, "attention_mask": m})], answer)
        for i, m in ((ids, mask), wide)
    )
    for name in short:
        torch.testing.assert_close(short[name], padded[name], rtol=1e-3, atol=1e-6)


def skewed_weight():
    torch.manual_seed(0)
    weight = torch.randn(2000, 16) * torch.rand(2000, 1) ** 4
    x = torch.randn(500, 16) @ torch.randn(16, 16)
    return weight, x.t() @ x / len(x), torch.rand(2000) ** 6  # few outputs matter


def test_some_outputs_stand_for_all():
    weight, moments, curvature = skewed_weight()
    error = 0.1 * weight * torch.randn_like(weight)
    whole = predicted_loss(error, moments, curvature)
    rows, shares = drawn_outputs(weight, moments, curvature, 256)
    assert len(rows) <= 256 and (rows.diff() > 0).all()
    assert predicted_loss(error[rows], moments, shares) == pytest.approx(whole, rel=0.1)
    signal, drawn = predicted_loss(weight, moments, curvature), predicted_loss(weight[rows], moments, shares)
    assert drawn == pytest.approx(signal, rel=0.01)  # what they are drawn by is known of all


@pytest.mark.parametrize("count", [1, 7, 1999, 2000, 5000])
def test_any_number_of_outputs_is_drawn(count):
    weight, moments, curvature = skewed_weight()
    rows, shares = drawn_outputs(weight, moments, curvature, count)
    assert 1 <= len(rows) == len(shares) <= min(count, 2000) and rows.max() < 2000
    if count >= 2000:
        assert torch.equal(rows, torch.arange(2000)) and torch.equal(shares, curvature)


def test_outputs_that_nothing_depends_on_can_be_drawn():
    weight, moments, _ = skewed_weight()
    rows, shares = drawn_outputs(weight, moments, torch.zeros(2000), 100)
    assert len(rows) == 100 and predicted_loss(weight[rows], moments, shares) == 0


# -- stacks of experts -------------------------------------------------------------------------------------------------
ENDS = [7, 7, 30]  # the second expert sees nothing


class Stack(nn.Module):
    """Three experts whose outputs are the scores, multiplied in three ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x):
        if self.way == "grouped":
            logits = _grouped_linear(x, self.weight, torch.tensor(ENDS, dtype=torch.int32))
        elif self.way == "all":
            logits = torch.bmm(x.view(3, -1, 8), self.weight.mT)
        else:
            each = x.view(3, -1, 8)
            logits = torch.stack([nn.functional.linear(each[e], self.weight[e]) for e in range(3)])
        return {"logits": logits}


def sites_of(program):
    return [s for s in find_linears(program, include="*") if s.experts]


@pytest.mark.parametrize("way", ["grouped", "all", "one by one"])
def test_every_expert_of_a_stack_has_the_fisher_information_of_its_own_rows(way):
    torch.manual_seed(0)
    model, x = Stack(way), torch.randn(30, 8)
    program = capture(model, x)
    (site,) = sites_of(program)
    module = program.module()
    uses = {use.node: use for use in site.uses}
    nodes = {n: read_of(n, site, uses[n.name]) for n in module.graph.nodes if n.name in uses}
    answer = Objective(Distillation(), None, print).answer
    found = output_curvature(module, nodes, [Reader(program).read((x,), {})], answer, draws=400)["weight"]
    p = model(x)["logits"].softmax(-1).detach().reshape(30, 4)
    ends = ENDS if way == "grouped" else [10, 20, 30]
    rows = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    want = torch.stack([(p[r] * (1 - p[r])).sum(0) for r in rows]) / 30
    torch.testing.assert_close(found, want, rtol=0.1, atol=0.01)
    assert way != "grouped" or not found[1].any()


def test_some_experts_stand_for_all():
    torch.manual_seed(0)
    stack = torch.randn(40, 8, 16) * torch.rand(40, 1, 1) ** 2
    curvature = torch.rand(40, 8) ** 3
    shares = drawn_experts(stack, curvature)
    assert len(shares) <= EXPERTS and all(0 <= e < 40 for e in shares)
    energies = (stack.square().sum(-1) * curvature).sum(-1)
    assert sum(float(energies[e]) * s for e, s in shares.items()) == pytest.approx(float(energies.sum()), rel=0.01)
    assert drawn_experts(stack[:5], curvature[:5]) == dict.fromkeys(range(5), 1.0)
