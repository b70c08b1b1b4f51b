"""The frontier's points: how they are given, which are dominated, what the table says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint, write_text

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def frontier_tables(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import frontier_tables

    return frontier_tables


def point(name, perplexity, speed, size):
    said = {"name": name, "perplexity": perplexity, "tokens_per_second": {"1": speed, "8": speed}, "bytes": size}
    said["prompt_tokens_per_second"] = {"1": 2 * speed, "8": 3 * speed}
    asked = {"windows": 1, "context": 8, "text": "t"}
    run = {"device": "cpu", "threads": 1, "commit": "c", "prompt": 2, "tokens": 2, "asked": asked}
    return {**said, **run, "zero_shot_mean": 0.5, "runtime": "ours"}


def test_who_is_dominated_and_by_whom(frontier_tables):
    points = [
        point("dense", 20, 10, 100),
        point("half", 25, 20, 50),
        point("worse", 25, 15, 50),
        point("as", 25, 20, 50),
    ]
    assert frontier_tables.dominators(points) == {"dense": [], "half": [], "worse": ["half", "as"], "as": []}
    assert frontier_tables.dominators([]) == {}


def test_faster_at_one_batch_alone_dominates_nobody(frontier_tables):
    slow, fast = point("a", 20, 10, 100), point("b", 20, 20, 100)
    fast["tokens_per_second"]["8"] = 5
    assert frontier_tables.dominators([slow, fast]) == {"a": [], "b": []}


def test_slower_behind_a_longer_prompt_dominates_nobody(frontier_tables, monkeypatch):
    slow, fast = point("a", 20, 10, 100e6), point("b", 20, 20, 100e6)
    for each, speed in ((slow, 9), (fast, 8)):
        each["longer_prompts"] = {"512": {"tokens_per_second": {"1": speed, "8": speed + 0.5}}}
    assert frontier_tables.dominators([slow, fast]) == {"a": [], "b": []}
    monkeypatch.setattr(frontier_tables, "read", lambda folder: [slow, fast])
    lines = frontier_tables.frontier_table().splitlines()
    assert "| a | 20.00 | 50.0 | 10.0 | 10.0 | 9.0 | 9.5 | 30 | 100 MB | nobody |" in lines
    assert "behind 512 tokens, batch 1 | behind 512 tokens, batch 8 |" in "\n".join(lines)
    del slow["longer_prompts"]  # an older run
    assert frontier_tables.dominators([slow, fast]) == {"a": ["b"], "b": []}


def test_the_table_names_them(frontier_tables, monkeypatch):
    points = [point("half", 25, 20, 50e6), point("worse", 30, 15, 60e6)]
    points[1] |= {"predicted_tokens_per_second": {"1": 15.5, "8": None}, "predicted_from": "half"}
    monkeypatch.setattr(frontier_tables, "read", lambda folder: points)
    lines = frontier_tables.frontier_table().splitlines()
    assert "| half | 25.00 | 50.0 | 20.0 | 20.0 | 60 | 50 MB | nobody |" in lines
    assert "| worse | 30.00 | 50.0 | 15.0 (15.5) | 15.0 | 45 | 60 MB | half |" in lines
    points[:] = [each | {"zero_shot_mean": None} for each in points]
    assert "| half | 25.00 | 20.0 | 20.0 | 60 | 50 MB | nobody |" in frontier_tables.frontier_table().splitlines()


def test_how_a_point_is_given(frontier_tables):
    from frontier import read_point

    given = read_point("2:4 int4=folder/a:b")
    assert given[:3] == ("2:4 int4", "folder/a:b", None) and given.label == "2-4-int4" and not given.is_gguf
    assert read_point("dense=model:float32")[:3] == ("dense", "model", "float32")
    assert read_point("q=x.gguf").is_gguf
    with pytest.raises(SystemExit, match="write NAME=PATH"):
        read_point("folder")


def test_what_makes_points_wants_a_model_to_make_them_of(frontier_tables, tmp_path):
    from frontier import main

    for given in ({"recipe": tmp_path}, {"two_four": tmp_path}):
        with pytest.raises(SystemExit, match="name it with --model"):
            main(tmp_path, tmp_path / "files", **given)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([16, 16], "different numbers"),
        ([512, 16], "the least first"),
        ([0], "different numbers"),
        ([16, 1000], "no room for 64 more"),
        ([1025], "a window has 1024 tokens"),
    ],
)
def test_prompts_that_could_not_be_timed_are_refused_first(frontier_tables, tmp_path, prompts, message):
    from frontier import main

    with pytest.raises(SystemExit, match=message):
        main(tmp_path, tmp_path / "files", prompt=prompts)
    assert not (tmp_path / "files").exists()


def test_points_that_are_made_of_a_model(frontier_tables, tmp_path, monkeypatch):
    """Each in its formats, with what the prices say of it; what is there is not made again."""
    import frontier_points as points

    import sparseforge_fx as sf
    from sparseforge_fx.deploy.lowering import cost, cost_table

    us = {"2:4": 60.0, "dense int8": 50.0, "2:4 int8": 40.0, "dense int4/32": 45.0, "2:4 int4/32": 35.0}

    def measure(shapes, tokens, *_, **__):
        row = lambda s, t: cost_table.Timing(s, "rows", t, 100.0 * t, (1.0, 1.0), us[str(s.format)] * t, (1.0, 1.0))  # noqa: E731
        return {s: {"rows": {t: row(s, t) for t in tokens}} if str(s.format) in us else {} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(points, "QUANTIZED", ())  # each would be captured and rounded for itself, as the plan is
    model = str(write_checkpoint(tmp_path / "dense", num_hidden_layers=1))
    data = str(write_text(tmp_path / "text.txt"))
    recipe = points.recipe_of(None).changed(calibration=2, length=32, batch_size=2)
    maker = points.Maker(model, data, recipe, 2, "bfloat16")
    goals = [points.Goal("speedup", 2.3), points.Goal("speedup", 9.0), points.Goal("bytes", 0.36)]
    ask = (tmp_path, [1, 8], goals, False)
    made = points.made(maker, *ask)
    names = ["dense bf16", "dense fp32", "2:4 bf16", "plan 2.3x", "plan 36% bytes"]
    assert [p.name for p in made] == names and made[4].label == "plan-36-bytes" and made[4].plan.bytes <= 0.36
    assert points.made(maker, *ask) == made
    with pytest.raises(SystemExit, match="holds points of another model"):
        points.made(replace(maker, dtype="float32"), *ask)
    given = replace(maker, two_four=str(tmp_path / "2-4"))
    by_others = points.made(given, tmp_path / "of-a-folder", [1, 8], [], False)
    assert [p.name for p in by_others] == names[:3] and not (tmp_path / "of-a-folder/2-4").exists()
    planned, two_four = made[3], made[2]
    assert points.predicted(two_four.plan)["formats"] == {"2:4": 7, "dense": 1}
    said = points.predicted(planned.plan)
    assert said["speedup"] == {t: pytest.approx(2.3, abs=0.2) for t in "18"}
    loaded, _ = sf.load(planned.path, dtype=planned.dtype)
    found = [str(m.format) for m in loaded.modules() if hasattr(m, "weight_values")]
    assert {f: found.count(f) for f in found} == {f: n for f, n in said["formats"].items() if f != "dense"}
    now = points.price_now([two_four.plan, planned.plan], "bfloat16")
    for of in (two_four.plan, planned.plan):  # nothing has changed since
        assert points.time_of(of, now) == {
            t: pytest.approx(us) for t, us in points.predicted(of)["microseconds"].items()
        }


def test_stacks_are_timed_with_the_experts_that_a_token_goes_to(frontier_tables, monkeypatch):
    import frontier_points as points

    from sparseforge_fx.deploy.lowering import cost, cost_table
    from sparseforge_fx.errors import SparseForgeError
    from sparseforge_fx.formats import DENSE, parse_format
    from sparseforge_fx.passes.find_routing import Routing
    from sparseforge_fx.plans import Plan, PlannedWeight, Price

    int8, sparse, routing, asked = parse_format("dense int8"), parse_format("2:4"), Routing(8, 2), []

    def measure(shapes, tokens, *_, **__):
        """Every matrix that a row meets takes a microsecond, half of it if packed."""
        asked.extend(shapes)
        us = lambda s, t: float(t * (s.routing.chosen if s.routing else 1))  # noqa: E731
        row = lambda s, t: cost_table.Timing(s, "rows", t, us(s, t), (1.0, 1.0), us(s, t) / 2, (1.0, 1.0))  # noqa: E731
        return {s: {"rows": {t: row(s, t) for t in tokens}} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)
    prices = {DENSE: Price(0.0, 1.0, {1: 1.0, 8: 1.0})}
    stack = lambda name, form, chosen: PlannedWeight(name, (8, 16, 32), form, prices, name, chosen)  # noqa: E731
    matrices = [PlannedWeight(n, (16, 32), int8, prices, "q") for n in "qk"]
    matrices.append(PlannedWeight("o", (16, 32), int8, prices))  # the same sides as an expert's
    weights = [*matrices, stack("up", int8, 2), stack("down", sparse, 2), stack("last", DENSE, 2)]
    plan = Plan(weights, (1, 8), {"bytes": 1.0}, None, 1)
    wanted = {(32, 32, None, int8): 1, (16, 32, None, int8): 1}
    wanted |= {(16, 32, routing, form): 1 for form in (int8, sparse, DENSE)}
    assert points.products(plan) == wanted
    now = points.price_now([plan], "bfloat16")
    assert {(s.out_features, s.in_features, s.routing, s.format) for s in asked} == set(wanted) - {
        (16, 32, routing, DENSE)
    }
    assert points.time_of(plan, now) == {"1": 2 * 0.5 + 1.0 + 1.0 + 2.0, "8": 8 * 5.0}
    plan.weights.append(stack("older", int8, None))
    with pytest.raises(SparseForgeError, match="does not say how many experts of older a token goes to: plan again"):
        points.products(plan)


def test_what_speed_follows_from_the_linears_of_a_step(frontier_tables):
    from frontier_points import expected_speed

    linears, known = {"1": 300.0, "8": 300.0}, {"1": 800.0, "8": 800.0}
    speed = {"1": 1e6 / 2000, "8": 8e6 / 4000}
    assert expected_speed(linears, known, speed) == {"1": pytest.approx(1e6 / 1500), "8": pytest.approx(8e6 / 3500)}
    assert expected_speed(known, known, speed) == {b: pytest.approx(s) for b, s in speed.items()}
    assert expected_speed(linears, known, {"1": 1e6 / 700}) == {"1": pytest.approx(1e6 / 300)}


def test_what_is_decoded_is_what_comes_behind_the_first_token(frontier_tables):
    from frontier import decoded

    rounds = [{"tokens_per_second": {"2": [2 * 5 / 3.0] * 2}, "first_token_seconds": {"2": [1.0, 1.0]}}] * 2
    of = decoded(rounds, prompt=16, tokens=5)
    assert of["tokens_per_second"] == {"2": pytest.approx(4.0)} and of["quartiles"] == {"2": [pytest.approx(4.0)] * 2}
    assert of["prompt_tokens_per_second"] == {"2": 32.0}


def test_weights_that_were_trained_in_int4_are_packed_as_they_are(frontier_tables, tmp_path):
    import frontier_points as points

    import sparseforge_fx as sf

    model = str(write_checkpoint(tmp_path / "dense", num_hidden_layers=1))
    data = str(write_text(tmp_path / "text.txt"))
    recipe = sf.Recipe(method="sparseforge", steps=2, calibration=2, length=32, batch_size=2, lr=1e-3)
    maker = points.Maker(model, data, recipe, 2, "float32")
    maker.sparse(tmp_path / "trained", {"values": "int4"})
    maker.rounded(tmp_path / "trained", tmp_path / "packed", values="int4", include="*")
    trained, packed = sf.load(tmp_path / "trained")[0], sf.load(tmp_path / "packed")[0]
    found = {n: str(m.format) for n, m in packed.named_modules() if hasattr(m, "weight_values")}
    assert found.pop("model.embed_tokens") == "dense int4/32" and set(found.values()) == {"2:4 int4/32"} and len(found) == 7
    for name in found:
        torch.testing.assert_close(
            packed.get_submodule(name).weight, trained.get_submodule(name).weight, rtol=0, atol=0
        )


def test_each_piece_of_a_point_is_made_once_and_anew_where_another_is_asked(frontier_tables, tmp_path, monkeypatch):
    import frontier_prepared as prepared

    text = write_text(tmp_path / "text.txt")
    model = str(write_checkpoint(tmp_path / "dense", num_hidden_layers=1))
    made = []

    def instead(name, found):
        def make(point, folder, text, asked):
            made.append(name)
            return dict(found)

        monkeypatch.setattr(prepared, name, make)

    instead("_perplexity", {"perplexity": 20.0})
    instead("_export", {"file_bytes": 7, "packed": 1, "kept_dense_by_gate": 0})
    instead("_zero_shot", {"zero_shot": {"rte": {"acc": 0.5}}, "zero_shot_mean": 0.5})
    of = prepared.Point("dense", model)
    first = prepared.prepared(of, tmp_path, text, [1, 8], 2, 0, 64)
    assert made == ["_perplexity", "_export"] and first["zero_shot_mean"] is None and first["perplexity"] == 20
    asked = prepared.prepared(of, tmp_path, text, [1, 8], 2, 3, 64)
    assert made[2:] == ["_zero_shot"] and asked["zero_shot_mean"] == 0.5 and asked["asked"]["tasks"] == 3
    assert prepared.prepared(of, tmp_path, text, [1, 8], 2, 3, 64) == asked and len(made) == 3
    prepared.prepared(of, tmp_path, text, [1], 2, 0, 64)
    assert made[3:] == ["_export"]
    del made[:]
    found = prepared.prepared(prepared.Point("q", "x.gguf"), tmp_path, text, [1], 2, 0, 64)
    assert made == ["_perplexity"] and found["runtime"] == "llama.cpp"


def test_a_piece_is_what_it_says(frontier_tables, tmp_path):
    """Of a packed point: the perplexity of its kernels, and files that the next steps find."""
    import frontier_prepared as prepared
    import torch

    import sparseforge_fx as sf

    text = write_text(tmp_path / "text.txt")
    model, tokenizer = sf.load(write_checkpoint(tmp_path / "dense", num_hidden_layers=1, max_position_embeddings=1024))
    sf.quantize(model, "int8")
    sf.save_packed(model, tokenizer, tmp_path / "int8")
    of = prepared.Point("int8", str(tmp_path / "int8"))
    asked = {"text": "text.txt", "windows": 1, "context": prepared.CONTEXT}
    found = prepared._perplexity(of, tmp_path, text, asked)
    assert 1 < found["perplexity"] < 1e6 and torch.load(tmp_path / "windows.pt").shape == (1, prepared.CONTEXT)
    assert prepared.held_bytes(of) < prepared.held_bytes(prepared.Point("dense", str(tmp_path / "dense")))
