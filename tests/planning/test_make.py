"""sf.plan: prices from a table and from the model, the choice under each budget, refusals."""

import math
from functools import partial

import pytest
import torch
from plan_tables import table_of_shares

import sparseforge_fx as sf
from sparseforge_fx.decision import OutOfReach
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.planning import candidates as planning_candidates
from sparseforge_fx.report import environment

FORMATS = ["2:4", "dense int8", "2:4 int8"]
TIMES = {"2:4": 0.6, "dense int8": 0.5, "2:4 int8": 0.4}


@pytest.fixture
def planned(captured_once, monkeypatch):
    """planned(name, **options): sf.plan of that tiny model, with times that are shares of the dense ones."""

    def run(name, **options):
        found = captured_once(name)
        table = table_of_shares(found.program, TIMES)
        data = [found.batch(seed) for seed in range(3)]
        return found, sf.plan(found.model, data, **{"formats": FORMATS, "table": table, "calibration": 6, **options})

    return run


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "vit", "moe", "gpt_oss"])
def test_each_budget_is_kept_and_the_model_left_as_it_was(planned, name):
    found, fast = planned(name, speedup=1.9)
    assert fast.speedup >= 1.9 and fast.loss > 0 and set(fast.speedups) == {1, 8}
    assert all(torch.equal(v, found.model.state_dict()[n]) for n, v in found.first.items())
    _, small = planned(name, bytes=0.7)
    assert small.bytes <= 0.7
    _, exact = planned(name, loss=fast.loss / 2)
    assert 0 < exact.loss <= fast.loss / 2 and exact.speedup > 1
    assert {w.name for w in fast.weights} | set(fast.skipped) >= set(found.weights)
    chosen = {w.chosen for w in fast.weights if len(w.shape) == 3}
    assert chosen == ({2} if name in ("moe", "gpt_oss") else set())
    assert all(w.chosen is None for w in fast.weights if len(w.shape) == 2)
    unused = ["no gradient of the answers reaches pooler.dense.weight: nothing is predicted to cost there"]
    few = [note for note in fast.notes if "saw fewer than 32 calibration tokens: predicted from one input" in note]
    assert not few or name in ("moe", "gpt_oss")
    others = [note for note in fast.notes if note not in few]
    assert fast.machine == environment()["device"] and others == (unused if name == "vit" else [])


def test_a_plan_of_more_speed_costs_more(planned):
    losses = [planned("llama", speedup=s)[1].loss for s in (1.2, 1.9, 2.2)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_a_tied_head_and_its_embedding_are_one_weight(planned):
    _, made = planned("opt", speedup=1.9)
    head = next(w for w in made.weights if w.name == "model.decoder.embed_tokens.weight")
    dense, int8 = 97 * 32 * 4, 97 * 32 + 97 * 4
    assert {str(f): p.bytes for f, p in head.prices.items()} == {"dense": dense, "dense int8": int8}
    assert head.prices[DENSE].loss == 0 < head.prices[parse_format("dense int8")].loss


def test_what_the_embedding_loses_is_counted_or_a_copy_of_the_head(captured_once, monkeypatch):
    found = captured_once("opt")
    data = [found.batch(seed) for seed in range(3)]
    table = table_of_shares(found.program, TIMES)
    name, int8 = "model.decoder.embed_tokens.weight", parse_format("dense int8")

    def price():
        made = sf.plan(found.model, data, speedup=1.9, formats=FORMATS, table=table, calibration=6)
        return next(w for w in made.weights if w.name == name).prices[int8]

    together = price()
    monkeypatch.setattr(planning_candidates, "_taken", lambda *_: ())  # as where the embedding is of a class of its own
    apart = price()
    assert apart.bytes == together.bytes + 97 * 32 * 4 and 0 < apart.loss < together.loss


def test_a_group_has_one_format_and_its_share_of_the_products_time(captured_once, monkeypatch):
    found = captured_once("llama")
    data = [found.batch(seed) for seed in range(3)]
    seen = []

    def measured(shapes, tokens, device, layouts):
        seen.extend((s.out_features, s.in_features) for s in shapes)
        us = {s: float(s.out_features) for s in shapes}
        return {
            s: {
                "rows": {
                    t: cost_table.Timing(s, "rows", t, 2 * us[s], (us[s], us[s]), us[s], (us[s], us[s])) for t in tokens
                }
            }
            for s in shapes
        }

    monkeypatch.setattr(cost, "measure", measured)
    made = sf.plan(found.model, data, speedup=1.3, formats=FORMATS, calibration=6)
    of = {w.name: w for w in made.weights}
    attention = [of[f"model.layers.0.self_attn.{leaf}_proj.weight"] for leaf in "qkv"]
    together = sum(w.shape[0] for w in attention)
    assert {w.group for w in attention} == {attention[0].name} and len({w.format for w in attention}) == 1
    assert (together, attention[0].shape[1]) in seen and attention[1].shape not in seen
    assert all(w.prices[DENSE].microseconds[1] == pytest.approx(2 * w.shape[0]) for w in attention)
    formats = {w.group: set() for w in made.weights}
    for w in made.weights:
        formats[w.group].add(w.format)
    assert all(len(f) == 1 for f in formats.values()) and len({f for g in formats.values() for f in g}) > 1
    again = sf.Plan.from_plain(made.describe())
    assert again == made


def test_a_price_is_of_one_layout_for_all_token_counts(captured_once, monkeypatch):
    """That which a weight would be kept in, not the fastest at each count."""
    found = captured_once("mlp")
    us = {"rows": {1: 10.0, 8: 20.0}, "pairs": {1: 8.0, 8: 40.0}}

    def measured(shapes, tokens, device, layouts):
        row = lambda s, layout, t: cost_table.Timing(s, layout, t, 50.0, (1.0, 1.0), us[layout][t], (1.0, 1.0))  # noqa: E731
        return {s: {layout: {t: row(s, layout, t) for t in tokens} for layout in us} for s in shapes}

    monkeypatch.setattr(cost, "measure", measured)
    made = sf.plan(found.model, [found.batch(0, rows=64)], bytes=0.9, tokens=[1, 8], formats=["2:4"])
    assert all(w.prices[parse_format("2:4")].microseconds == us["rows"] for w in made.weights)


def test_what_is_measured_here(captured_once, monkeypatch):
    found = captured_once("mlp")
    monkeypatch.setattr(cost, "measure", partial(cost.measure, rounds=2, seconds=1e-5))
    made = sf.plan(found.model, [found.batch(0, rows=64)], bytes=0.9, tokens=[2], formats=["2:4"])
    assert [str(f) for f in made.formats.values()] in (["dense", "2:4"], ["2:4", "dense"])
    assert all(
        set(w.prices) == {DENSE, parse_format("2:4")} and w.prices[DENSE].microseconds[2] > 0 for w in made.weights
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "exactly one of speedup, bytes and loss as the budget of a plan, not none"),
     ({"speedup": 2, "loss": 0.1}, "not speedup and loss"),
     ({"speedup": 9}, r"no formats give speedup 9: with these it is 2\.\d\d at most; ask for less"),
     ({"bytes": 0.01}, r"no formats give bytes 0.01: with these it is 0\.\d\d at least"),
     ({"bytes": 2}, "bytes is 2: give a finite number above 0 and up to 1"),
     ({"speedup": 2, "tokens": [1, 2]}, r"has no time of \d+ x \d+ torch.float32 \(.*\) at 1, 2 tokens: measure again"),
     ({"speedup": 2, "tokens": []}, "give a list of token counts"),
     ({"speedup": 2, "formats": ["3:4"]}, "'3:4' is no format"),
     ({"speedup": 2, "steps": 4}, "a plan has no option steps; it has include, exclude"),
     ({"speedup": 2, "include": "*.nothing"}, "nothing to prune")],
)  # fmt: skip
def test_refusals(planned, options, message):
    with pytest.raises(SparseForgeError, match=message):
        planned("llama", **options)


def test_a_format_without_times_is_not_considered_and_said(planned):
    _, made = planned("llama", bytes=0.9, formats=["2:4", "2:4 int4/32"])
    assert made.notes[-1].startswith("2:4 int4/32 has no times for") and math.isfinite(made.loss)
    assert not any(parse_format("2:4 int4") in w.prices for w in made.weights)


# -- another budget from the prices of a plan ------------------------------------------------------------------------
@pytest.mark.parametrize("goal", [{"speedup": 2.2}, {"bytes": 0.6}, {"loss": 0.01}])
def test_a_plan_again_is_what_the_model_would_get(planned, tmp_path, goal):
    _, made = planned("llama", speedup=1.2)
    made.save(tmp_path / "plan.json")
    _, fresh = planned("llama", **goal)
    for source in (made, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        again = sf.plan(source, **goal)
        assert again.formats == fresh.formats and again.goal == goal
        assert [w.prices for w in again.weights] == [w.prices for w in made.weights]


def test_a_plan_again_with_fewer_formats_and_tokens(planned):
    _, made = planned("llama", speedup=1.2)
    again = sf.plan(made, bytes=0.9, formats=["dense int8"], tokens=[8])
    assert {str(form) for form in again.formats.values()} == {"dense", "dense int8"} and again.tokens == (8,)
    assert sf.plan(sf.Plan.from_plain(again.describe()), speedup=2.2).speedup >= 2.2  # it forgot no price


@pytest.mark.parametrize(
    ("options", "message"),
    [({"data": "text.txt"}, "nothing is measured or read: leave data out"),
     ({"table": "costs.json", "length": 4}, "leave table, length out"),
     ({"tokens": [1, 3]}, "has times at 1, 8 tokens, not at 3: plan the model again for these"),
     ({"tokens": []}, "give a list of token counts"),
     ({"formats": ["dense int4"]}, "has no prices of dense int4"),
     ({"speedup": 99.0}, "no formats give speedup 99"),
     ({"bytes": 0.5}, "exactly one of")],
)  # fmt: skip
def test_what_a_plan_again_refuses(planned, options, message):
    _, made = planned("llama", speedup=1.2)
    with pytest.raises(SparseForgeError, match=message):
        sf.plan(made, **{"speedup": 1.3, **options})


def test_what_cannot_be_met_gives_the_prices_and_the_nearest(planned):
    with pytest.raises(OutOfReach) as caught:
        planned("llama", speedup=9)
    nearest = sf.plan(caught.value.plan, speedup=caught.value.nearest)
    assert nearest.speedup == pytest.approx(caught.value.nearest, abs=0.011) and str(caught.value).count("9") >= 1
    with pytest.raises(OutOfReach) as caught:
        planned("llama", bytes=0.001)
    assert sf.plan(caught.value.plan, bytes=caught.value.nearest).bytes <= caught.value.nearest


def test_a_plan_of_a_model_needs_data(captured_once):
    with pytest.raises(SparseForgeError, match="needs data"):
        sf.plan(captured_once("mlp").model, speedup=1.1)
    with pytest.raises(SparseForgeError, match="cannot be read: No such file"):
        sf.plan("nowhere.json", speedup=1.1)
    with pytest.raises(SparseForgeError, match=r"gpt2 is no plan .* load it first"):
        sf.plan("openai-community/gpt2", speedup=1.1)
    with pytest.raises(SparseForgeError, match="expected a model or a plan, got int"):
        sf.plan(3, speedup=1.1)
