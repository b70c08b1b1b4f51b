"""plan as a command, and sparsify under what it wrote."""

import json

import pytest
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

from sparseforge_fx import cli
from sparseforge_fx.deploy.lowering import cost
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
        row = lambda s, t: cost.Timing(s, "rows", t, 20.0, (1.0, 1.0), 10.0, (1.0, 1.0))  # noqa: E731
        return {s: {"rows": {t: row(s, t) for t in tokens}} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)
    text = ("--data", home / "text.txt", "--set", "calibration=2", "--set", "length=16")
    path = tmp_path / "plan.json"
    said = run(
        "plan", home / "dense", *text, "--speedup", "1.3", "--tokens", "4", "--format", "2:4", "--device", "cpu",
        "-o", path,
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    plan = Plan.read(path)
    assert "linears: 1." in said.stdout and plan.tokens == (4,) and 1.3 <= plan.speedup < 2
    sparse = {name for name, form in plan.formats.items() if form.is_sparse}
    said = run("sparsify", home / "dense", "--method", "magnitude", "--plan", path, "-o", tmp_path / "out")
    assert said.exit_code == 0, said.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {s["name"] for s in report["sites"]} == sparse and 0 < len(sparse) < len(plan.weights)
    assert report["recipe"]["plan"] == str(path)


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
