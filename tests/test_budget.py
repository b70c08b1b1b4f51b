"""The study of budgets: the small model and the runs on it, of seconds; which runs come next, and which rate is taken."""

import json
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
SIZES = {"batch_size": 4, "length": 32, "entries": 300, "width": 64, "layers": 1, "compile": False}
WORDS = "the fox dog has seen many things and none of them mind over lazy jump"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def write_documents(path):
    draw = random.Random(0)
    words = WORDS.split()
    documents = ({"text": " ".join(draw.choices(words, k=60))} for _ in range(400))
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


# -- the small model -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Killed on its way, and gone on with."""
    folder = tmp_path_factory.mktemp("small")
    text, options = write_documents(folder / "a.jsonl"), []
    for name, value in SIZES.items():
        options += ["--no-compile"] if name == "compile" else [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, str(FOLDER / "small_model.py"), str(folder / "model"), "--data", str(text)]
    command += ["--data", str(text), "--tokens", "12800", "--save-seconds", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    ) as first:
        for line in first.stdout:
            if '"step": 20' in line:
                first.kill()
    first.wait()
    done = json.loads((folder / "model" / "training.json").read_text())["steps"]
    assert 0 < done < 100 and not (folder / "model" / "model.safetensors").exists()
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    assert "goes on from step" in said and '"step": 5,' not in said
    return folder / "model"


def test_the_small_model_learns_and_keeps_its_texts_apart(model):
    record = json.loads((model / "training.json").read_text())
    assert record["steps"] == 100 and record["tokens"] == 12800 and record["perplexity"].keys() == {"valid", "test"}
    losses = [row["loss"] for row in record["curve"] if "loss" in row]
    assert losses[-1] < losses[0] - 1 and math.log(record["perplexity"]["test"]) < losses[0] - 1
    assert record.keys() >= {"commit", "device", "threads", "versions", "tokens_per_second", "parameters"}
    parts = {
        p: (model / "text" / f"{p}-0.jsonl").read_text().splitlines() for p in ("train", "further", "valid", "test")
    }
    assert len({line for lines in parts.values() for line in lines}) == sum(map(len, parts.values())) == 400
    assert len(parts["train"]) > 280 and len(parts["further"]) > 30
    assert all(json.loads(line)["text"] in (model / "test.txt").read_text() for line in parts["test"])


def test_a_small_model_that_is_there_is_not_made_again(scripts, model, capsys):
    import small_model

    before = (model / "model.safetensors").stat().st_mtime_ns
    small_model.main(model, ["no.jsonl"])
    assert "already" in capsys.readouterr().out and (model / "model.safetensors").stat().st_mtime_ns == before


def test_every_document_has_one_part(scripts):
    import small_model

    parts = [small_model.part_of(str(i)) for i in range(2000)]
    assert sum(small_model.SHARES.values()) == 100
    assert all(abs(parts.count(part) / 2000 - share / 100) < 0.03 for part, share in small_model.SHARES.items())


# -- the mixture that is made of it -----------------------------------------------------------------------------------
def test_a_mixture_begins_as_the_small_model_and_its_experts_differ_when_trained(scripts, model, tmp_path, monkeypatch):
    import budget_tables
    import mixture
    import torch
    from common import language_model

    dense, ids = language_model(str(model), torch.float32), torch.arange(24)[None]
    monkeypatch.setattr(mixture, "DRAWN", 0.0)
    grown = mixture.upcycled(dense, seed=0)
    assert mixture.alike(grown) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(grown(ids).logits, dense(ids).logits, atol=1e-5)
    monkeypatch.setattr(mixture, "DRAWN", 0.25)
    how = {"tokens": 960, "healing": 320, "batch_size": 2, "length": 32, "calibration": 4, "windows": 2}
    how |= {"methods": "magnitude,wanda,sparseforge alps+kd", "results": tmp_path / "results"}
    mixture.main(model, tmp_path / "mixture", **how)
    runs = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")}
    assert runs.keys() == {"magnitude", "wanda", "sparseforge-alps+kd"} and runs["wanda"]["alike"] < 0.9
    assert runs["sparseforge-alps+kd"]["tokens"] >= 320 and runs["wanda"]["report"]["commit"]
    for stack in runs["wanda"]["report"]["experts"].values():
        assert len(stack["tokens"]) == mixture.EXPERTS and sum(stack["tokens"]) == 4 * 32 * mixture.CHOSEN
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    mixture.main(model, tmp_path / "mixture", **how)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")} == made
    with pytest.raises(SystemExit, match="was trained with"):  # its text would be among that which prunes
        mixture.main(model, tmp_path / "mixture", **how | {"tokens": 640})
    monkeypatch.setattr(budget_tables, "read", lambda folder: list(runs.values()))
    rows = [line for line in budget_tables.mixture_table().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and sum(" to " in row for row in rows) == 2


# -- which runs, in which order, at which rate -----------------------------------------------------------------------
@pytest.fixture
def runs(scripts):
    import budget_runs

    return budget_runs


def finish(known, run, valid, test=None):
    loss = None if valid is None else {"valid": valid, "test": valid if test is None else test}
    known[run.name] = {
        "label": run.name, "method": run.method, "tokens_per_parameter": run.budget, "lr": run.lr, "seed": run.seed,
        "loss": loss, "dense_loss": {"valid": 1.0, "test": 1.0}, "steps": 10, "seconds": 2.0, "tokens": 100, "windows": 4,
        "length": 8, "parameters": 1000, "report": {"device": "a", "commit": "b"},
    }  # fmt: skip


def settle(runs, known, method, budget, best):
    while runs.best(method, budget, known) is None:
        for run in runs.sweep(method, budget, known):
            finish(known, run, abs(math.log(run.lr / best)))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3]),
        (1e-4, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
        (1e-9, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),  # there is nothing lower
        (3e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
    ],
)
def test_a_sweep_goes_on_until_the_best_has_worse_neighbours(runs, best, tried):
    known = {}
    settle(runs, known, "ast", 0.05, best)
    assert [run.lr for run in runs.sweep("ast", 0.05, known)] == tried
    assert runs.best("ast", 0.05, known) == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_long_sweeps_wait_for_the_budget_before_and_begin_beside_its_rate(runs):
    known = {}
    assert runs.sweep("ast", 0.7, known) == [] and runs.tokens_left("ast", 0.7, known) == 0.7 * 5
    settle(runs, known, "ast", 0.2, 3e-3)
    assert [run.lr for run in runs.sweep("ast", 0.7, known)] == [1e-3, 3e-3, 1e-2]
    assert runs.sweep("ast", 2.0, known) == []
    settle(runs, known, "ast", 0.7, 3e-4)
    assert [run.lr for run in runs.sweep("ast", 0.7, known)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert [run.lr for run in runs.sweep("ast", 2.0, known)] == [1e-4, 3e-4, 1e-3]


def test_seeds_follow_at_the_best_rate(runs):
    known = {}
    todo = runs.plan(known, ["ast"], [0.01])
    assert [run.lr for run in todo] == [3e-4, 1e-3, 3e-3] and {run.seed for run in todo} == {0}
    for run, valid in zip(todo, (2.0, 1.5, None), strict=True):  # the last came to no end
        finish(known, run, valid)
    assert [(run.lr, run.seed) for run in runs.plan(known, ["ast"], [0.01])] == [(1e-3, 1), (1e-3, 2)]
    assert runs.tokens_left("ast", 0.01, known) == pytest.approx(0.02)
    for run in runs.plan(known, ["ast"], [0.01]):
        finish(known, run, 1.4)
    assert runs.plan(known, ["ast"], [0.01]) == [] and runs.tokens_left("ast", 0.01, known) == 0
    picked, settled = runs.chosen("ast", 0.01, known)
    assert settled and [(r["lr"], r["seed"]) for r in picked] == [(1e-3, 0), (1e-3, 1), (1e-3, 2)]


def test_of_equal_rates_the_highest_is_taken(runs):
    known = {}
    for run, valid in zip(runs.sweep("ast", 0.01, known), (2.0, 2.0, 2.1), strict=True):
        finish(known, run, valid)
    assert runs.best("ast", 0.01, known) == 1e-3


def test_cheap_and_decisive_runs_come_first(runs):
    order = runs.plan({})
    assert [run.method for run in order[:18:3]] == list(runs.DECISIVE) and {run.budget for run in order[:18]} == {0.01}
    assert all(a.rank <= b.rank for a, b in pairwise(order))
    assert len(order) == 3 * len(runs.METHODS) * 3  # the longest two wait


def test_the_methods_are_those_of_the_package(runs):
    import budget

    from sparseforge_fx.training.recipe import Recipe

    for method in runs.METHODS:
        options = budget.options(method)
        recipe = Recipe(steps=10).changed(**options)
        assert recipe.config(True).steps == 10 and not recipe.settings(True).slorb_block


def test_the_table_and_the_picture_show_what_is_there(runs, monkeypatch, tmp_path):
    import budget_tables
    import plots

    known = {}
    monkeypatch.setattr(budget_tables, "known", lambda: known)
    monkeypatch.setattr(plots, "known", lambda: known)
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    assert budget_tables.budget_table() == "_no runs yet_"
    plots.draw_budget()
    assert not list(tmp_path.iterdir())
    sweep = runs.sweep("ast", 0.01, known)
    finish(known, sweep[0], 1.3)
    assert "| ast | 0.3000 (1), 0.0003, 10 \\* |" in budget_tables.budget_table()
    finish(known, sweep[1], 1.2, test=1.25)
    finish(known, sweep[2], 1.4)
    finish(known, runs.Run("ast", 0.01, 1e-3, 1), 1.3, test=1.35)
    text = budget_tables.budget_table()
    assert "| ast | 0.3000 ± 0.0707 (2), 0.001, 10 |" in text and "| ast | 2 |" in text and "4 runs are done" in text
    plots.draw_budget()
    assert (tmp_path / "budget.png").stat().st_size > 1000


# -- the runs --------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_run_is_one_json_and_goes_on_after_a_kill(runs, model, tmp_path, monkeypatch, capsys):
    import budget

    import sparseforge_fx as sf

    monkeypatch.setattr(budget, "BUDGETS", {b: 1 for b in runs.BUDGETS})
    how = {"folder": tmp_path, "methods": "ast", "budgets": "0.01", "seeds": 2, "length": 32, "windows": 4}
    how |= {"compile": "off", "threads": 1, "save_seconds": 0.0, "only_list": False}
    steps, real = [], sf.sparsify

    def killed(*args, **options):
        def stop(step, row):
            steps.append(step)
            if len(steps) == 10:
                raise Killed

        return real(*args, on_step=stop, **options)

    monkeypatch.setattr(sf, "sparsify", killed)
    with pytest.raises(Killed):
        budget.main(model, **how)
    assert not [file for file in tmp_path.iterdir() if file.is_file()] and len(list(tmp_path.glob("*.state"))) == 1
    budget.main(model, **how)
    assert steps[:12] == [*range(10), 9, 10]  # the step of the kill was not saved
    files = sorted(tmp_path.glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    assert len(records) >= 4 and not list(tmp_path.glob("*.state")) and {r["seed"] for r in records} == {0, 1}
    for record in records:
        assert record["loss"]["test"] > 0 and record["dense_loss"]["test"] > 0 and record["seconds"] > 0
        assert record["tokens"] == record["steps"] * 32 <= 0.01 * record["parameters"]
        assert record["report"].keys() >= {"commit", "device", "versions", "config", "curves"}
    capsys.readouterr()
    budget.main(model, **how)  # nothing is left
    assert "seed" not in capsys.readouterr().out
    budget.main(model, **{**how, "only_list": True})
    assert f"done: {len(records)} at 0.01; left: 0.0 h" in capsys.readouterr().out
    files[0].write_text(json.dumps(records[0] | {"weights": "other"}))
    with pytest.raises(SystemExit, match="another model"):
        budget.main(model, **how)
    with pytest.raises(SystemExit, match="no such method"):
        budget.main(model, **{**how, "methods": "asp"})


def test_a_run_that_diverges_has_a_record_without_a_loss(runs, model, tmp_path, monkeypatch):
    import budget

    study = budget.Study(model, tmp_path, "cpu", 32, 4, False, 100.0)
    monkeypatch.setattr(budget, "BUDGETS", {b: 1 for b in runs.BUDGETS})
    study.run(runs.Run("dense", 0.01, 1e30))
    (record,) = study.known().values()
    assert record["loss"] is None and "lower the learning rate" in record["failed"]


def test_the_control_keeps_every_weight_and_a_fixed_mask_is_fixed(runs, model):
    import budget
    import torch

    import sparseforge_fx as sf

    study = budget.Study(model, model.parent, "cpu", 32, 4, False, 100.0)
    how = {"tokens": 32 * 6, "batch_size": 1, "length": 32, "compile": False, "show_progress": False}
    dense = study.load()
    before = dense.model.layers[0].mlp.up_proj.weight.detach().clone()
    sf.sparsify(dense, study.data(0), lr=1e-3, **how, **runs.METHODS["dense"])
    after = dense.model.layers[0].mlp.up_proj.weight
    assert int((after == 0).sum()) == 0 and not torch.equal(before, after)
    net = study.load()
    sf.sparsify(net, study.data(0), lr=1e-3, **how, **runs.METHODS["magnitude+kd"])
    kept = net.model.layers[0].mlp.up_proj.weight != 0
    from sparseforge_fx.pattern import TWO_FOUR, hard_mask

    assert (kept == hard_mask(before.abs(), TWO_FOUR)).float().mean() > 0.98
