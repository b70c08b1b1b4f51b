"""plan as a command, and sparsify under what it wrote."""

import json
import os
import re

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli
from sparseforge_fx.deploy.checkpoints.packed_state import packed_linears
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.plans import Plan


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("plan")
    write_checkpoint(home / "dense", num_hidden_layers=1)
    (home / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    return home


def test_a_plan_is_written_shown_and_followed(home, tmp_path, monkeypatch):
    def measure(shapes, tokens, *_):
        us = {"2:4": 8.0, "dense int8": 9.0, "2:4 int8": 5.0}
        row = lambda s, t: cost_table.Timing(s, "rows", t, 20.0, (1.0, 1.0), us[str(s.format)], (1.0, 1.0))  # noqa: E731
        return {s: {"rows": {t: row(s, t) for t in tokens}} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)
    text = ("--data", home / "text.txt", "--set", "calibration=2", "--set", "length=16")
    path, formats = tmp_path / "plan.json", ("--format", "2:4", "--format", "dense int8", "--format", "2:4 int8")
    said = run(
        "plan", home / "dense", *text, "--speedup", "2.5", "--tokens", "4", *formats, "--device", "cpu", "-o", path
    )
    assert said.exit_code == 0, said.output
    plan = Plan.read(path)
    assert "linears: 2." in said.stdout and plan.tokens == (4,) and plan.speedup >= 2.5
    wanted = {name: str(form) for name, form in plan.formats.items()}
    sparse = {name for name, form in wanted.items() if form.startswith("2:4")}
    assert sparse and {"dense int8", "2:4 int8"} <= set(wanted.values()) and "model.embed_tokens.weight" in wanted
    next_steps = f"--plan {path} -o sparse; then sparseforge-fx quantize sparse --data"
    assert next_steps in " ".join(said.stdout.split())
    said = run("sparsify", home / "dense", "--method", "magnitude", "--plan", path, "-o", tmp_path / "out")
    assert said.exit_code == 0 and f"sparseforge-fx quantize {tmp_path / 'out'} --plan" in " ".join(said.stdout.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {s["name"] for s in report["sites"]} == sparse and report["recipe"]["plan"] == str(path)
    said = run("quantize", tmp_path / "out", "--plan", path, *text, "--device", "cpu", "-o", tmp_path / "packed")
    assert said.exit_code == 0 and "note: lm_head and model.embed_tokens stay one" in said.stdout, said.output
    model, tokenizer = sf.load(tmp_path / "packed")
    held = {name.removesuffix(".weight"): form for name, form in wanted.items() if form != "dense"}
    assert {n: str(m.format) for n, m in packed_weights(model).items()} == held and tokenizer is not None


def test_all_linears_in_few_bits(home, tmp_path):
    said = run("quantize", home / "dense", "--values", "int4", "--exclude", "*.o_proj", "-o", tmp_path / "int4")
    assert said.exit_code == 0 and said.stdout.startswith("6 packed linears"), said.output
    said = run("quantize", home / "dense", "--values", "int5", "-o", tmp_path / "int5")
    assert said.exit_code == 2 and "'int5' is no format" in said.stderr and not (tmp_path / "int5").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "give exactly one of speedup, bytes and loss"),
     (("--speedup", "2", "--loss", "1"), "give exactly one of speedup, bytes and loss"),
     (("--speedup", "2", "--set", "steps=3"), "--set steps=3: write NAME=VALUE with one of include, exclude"),
     (("--speedup", "2", "--format", "1:4"), "'1:4' is no format")],
)  # fmt: skip
def test_refusals(home, tmp_path, options, message):
    said = run("plan", home / "dense", "--data", home / "text.txt", *options, "-o", tmp_path / "plan.json")
    assert said.exit_code == 2 and message in " ".join(said.stderr.split()) and not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("values", ["int8", "int4/16"])
def test_values_on_a_grid_are_packed_by_their_own_scales(home, tmp_path, values):
    out, text = tmp_path / "out", ("--data", home / "text.txt", "--calibration", "2", "--length", "16")
    said = run("sparsify", home / "dense", *text, "--method", "sparsegpt", "--set", f"values={values}", "-o", out)
    assert said.exit_code == 0, said.output
    dense = sf.load(out)[0]
    said = run("quantize", out, "-o", tmp_path / "packed", "--device", "cpu")
    assert said.exit_code == 0, said.output
    packed = sf.load(tmp_path / "packed")[0]
    found = packed_linears(packed)
    assert found and {str(m.format) for m in found.values()} == {f"2:4 {values}"}
    assert all(torch.equal(m.weight, dense.get_submodule(name).weight) for name, m in found.items())
    said = run("quantize", out, "--values", "int4", "-o", tmp_path / "other", "--device", "cpu")
    assert said.exit_code == 2 and f"on a grid of {values}, not int4" in said.output and not (tmp_path / "other").exists()
    said = run("quantize", out, "--include", "*.q_proj", "-o", tmp_path / "asked", "--device", "cpu")
    assert said.exit_code == 0 and "is not used: include asks" in said.output


def test_what_was_measured_in_vain_serves_another_budget(home, tmp_path):
    text = ("--data", home / "text.txt", "--set", "length=32", "--set", "calibration=2", "--set", "batch_size=2")
    options = ("--format", "2:4 int8", "--tokens", "4", "--device", "cpu")
    said = run("plan", home / "dense", *text, *options, "--bytes", "0.01", "-o", tmp_path / "plan.json")
    assert said.exit_code == 2 and sorted(os.listdir(tmp_path)) == ["plan.prices.json"]
    told = re.search(r"What was measured is kept: sparseforge-fx (.*)", said.stderr)[1].split()
    said = run(*told)
    assert said.exit_code == 0 and "sparsify MODEL --data DATA --plan" in " ".join(said.stdout.split())
    assert Plan.read(tmp_path / "plan.json").bytes <= float(told[told.index("--bytes") + 1])
    said = run(*told, "--data", home / "text.txt", "--device", "cpu")
    assert said.exit_code == 2 and "leave data, device out" in said.stderr
    said = run("plan", home / "dense", "--bytes", "0.5", "-o", tmp_path / "other.json")
    assert said.exit_code == 2 and "give --data" in said.stderr and not (tmp_path / "other.json").exists()


def test_an_error_names_options_as_they_are_typed(home, tmp_path):
    text = ("--data", home / "text.txt")
    said = run("plan", home / "dense", *text, "--speedup", "1.1", "--set", "length=4096", "-o", tmp_path / "plan.json")
    assert said.exit_code == 2 and re.search(r"positions: pass --set length=\d+$", said.stderr.strip()), said.stderr
    said = run("sparsify", home / "dense", *text, "--length", "4096", "-o", tmp_path / "out")
    assert said.exit_code == 2 and re.search(r"positions: pass --length \d+$", said.stderr.strip()), said.stderr
