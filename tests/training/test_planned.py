"""A run under a plan: what becomes sparse, what stays and why, and plans that do not fit."""

import json

import pytest
import torch

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.plans import Plan, PlannedWeight, Price
from sparseforge_fx.training.recipe import Recipe

UP, DOWN, GATE = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "down", "gate"))
FORMATS = {UP: "2:4 int8", DOWN: "dense int8", GATE: "2:4", "lm_head.weight": "dense int8"}


def as_plan(found, formats, machine=None):
    """A plan of these formats, which are all that it knows."""
    shapes = {s.fqn: (s.out_features, s.in_features) for s in found.sites}
    price = Price(0.0, 1.0, {1: 1.0})
    weights = [PlannedWeight(n, shapes[n], parse_format(f), {DENSE: price}) for n, f in formats.items()]
    return Plan(weights, (1,), {"speedup": 1.5}, machine, 1)


def sparse_weights(found):
    return {n for n, w in found.weights.items() if check_pattern(w, TWO_FOUR)}


@pytest.mark.parametrize("form", ["plan", "path", "text", "mapping"])
def test_only_what_the_plan_makes_sparse_is_pruned(captured_once, tmp_path, form):
    found = captured_once("llama")
    plan = as_plan(found, FORMATS)
    plan.save(tmp_path / "plan.json")
    path = tmp_path / "plan.json"
    given = {"plan": plan, "path": path, "text": str(path), "mapping": FORMATS}[form]
    result = sf.sparsify(found.model, [found.batch()], method="wanda", plan=given, calibration=2)
    assert sparse_weights(found) == {UP, GATE}
    assert [s["name"] for s in result.report["sites"]] == [GATE, UP]
    reasons = {s["name"]: s["reason"] for s in result.report["skipped"]}
    assert reasons[DOWN] == reasons["lm_head.weight"] == "plan: dense int8"
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "not in the plan"
    assert any(n.startswith("the plan keeps 3 weights in few bits") for n in result.report["notes"])
    again = Recipe.from_plain(json.loads(json.dumps(result.recipe.describe())))
    assert again.plan == {"path": str(path), "text": str(path)}.get(form, FORMATS)


def test_a_tied_head_has_its_reason(captured_once):
    found = captured_once("opt")
    formats = {"model.decoder.layers.0.fc1.weight": "2:4", "model.decoder.embed_tokens.weight": "dense int8"}
    report = sf.sparsify(found.model, plan=as_plan(found, formats)).report
    assert {s["name"]: s["reason"] for s in report["skipped"]}[
        "model.decoder.embed_tokens.weight"
    ] == "plan: dense int8"


def test_a_trained_method_trains_what_the_plan_makes_sparse(captured_once):
    found = captured_once("llama")
    other = found.weights[DOWN].clone()
    sf.sparsify(found.model, [found.batch()], plan=FORMATS, steps=2, method="ast", show_progress=False)
    assert sparse_weights(found) == {UP, GATE} and torch.equal(found.weights[DOWN], other)


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [({"nowhere.weight": "2:4"}, {}, "names nowhere.weight, which is no linear of the model"),
     ({UP: "dense"}, {}, "the plan makes no weight sparse"),
     ({UP: "2:5"}, {}, "'2:5' is no format"),
     ({UP: "2:4"}, {"pattern": "1:4"}, "the plan makes weights 2:4 and the pattern is 1:4"),
     ({UP: "2:4"}, {"include": "*.up_proj"}, "leave out include and exclude"),
     ({"model.embed_tokens.weight": "2:4"}, {}, "makes model.embed_tokens.weight 2:4, which it cannot be: read by"),
     ("nowhere.json", {}, "nowhere.json cannot be read: No such file"),
     (3, {}, "give a Plan, the path of one, or formats by the weights' names")],
)  # fmt: skip
def test_plans_that_do_not_fit(captured_once, plan, options, message):
    found = captured_once("llama")
    with pytest.raises(SparseForgeError, match=message):
        sf.sparsify(found.model, plan=plan, **options)
    assert sparse_weights(found) == set()


def test_a_plan_of_another_machine_or_model(captured_once):
    found = captured_once("llama")
    with pytest.raises(SparseForgeError, match="the plan was measured on Z80"):
        sf.sparsify(found.model, plan=as_plan(found, FORMATS, machine="Z80"))
    plan = as_plan(found, FORMATS)
    plan.weights[0].shape = (64, 64)
    with pytest.raises(SparseForgeError, match=rf"{UP} is 64 x 64 in the plan and 64 x 32 in the model"):
        sf.sparsify(found.model, plan=plan)
    assert sparse_weights(found) == set()
