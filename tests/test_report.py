"""report.json, and what a number needs beside it."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from sparseforge_fx import report
from sparseforge_fx.passes import LinearSite

ROW = {"step": 1, "loss": 3.0, "task": 2.0, "kl": 1.0, "temperature": 1.0, "lambda": 1.0}
ROW |= {"mask_distance_from_binary": 0.1, "density": 0.9, "flip_rate": 0.01}


def test_environment_names_what_a_number_depends_on():
    found = report.environment()
    assert {"versions", "device", "threads", "commit"} <= set(found)
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "sparseforge-fx"} <= set(found["versions"])
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    json.dumps(found, allow_nan=False)


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True, capture_output=True
    )


def test_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "report.py").write_text("x")
    monkeypatch.setattr(report, "__file__", str(package / "report.py"))
    assert report.environment()["commit"] is None  # no repository at all
    git(tmp_path, "init")
    (tmp_path / "other").write_text("1")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "a user's project, the package installed in its .venv")
    assert report.environment()["commit"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "the package itself")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    commit = report.environment()["commit"]
    assert len(commit) >= 7 and head.startswith(commit)
    (package / "report.py").write_text("y")
    assert report.environment()["commit"] == commit + "+"


def test_peak_memory_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = report.peak_memory_bytes()
    assert 50 << 20 < before < 1 << 40
    block = torch.ones(60 << 20)  # 240 MiB
    del block
    assert report.peak_memory_bytes() >= max(before, 240 << 20)


def test_peak_memory_is_that_of_a_cuda_device_if_it_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert report.peak_memory_bytes() == 123
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)  # a model on the CPU of such a machine
    assert report.peak_memory_bytes() > 50 << 20


def test_sites_and_skipped_ones():
    chosen = LinearSite("a.weight", (8, 16), torch.float32, ties=("b.weight",))
    conv = LinearSite("c.weight", (8, 16), torch.float32, transposed=True)
    skipped = LinearSite("d.weight", (6, 10), torch.float32, reason="too odd")
    found = report.describe_sites([chosen, conv, skipped])
    assert [(s["name"], s["out"], s["in"]) for s in found["sites"]] == [("a.weight", 8, 16), ("c.weight", 16, 8)]
    assert found["sites"][0]["ties"] == ["b.weight"]
    assert found["skipped"] == [{"name": "d.weight", "shape": [6, 10], "reason": "too odd"}]
    assert found["site_parameters"] == 2 * 128
    json.dumps(found)


def test_json_comes_back(tmp_path):
    path = tmp_path / "deep" / "report.json"
    value = {"curves": [ROW], "path": Path("x/y"), "pattern": "2:4", "none": None}
    report.write_json(path, value)
    assert json.loads(path.read_text()) == {**value, "path": "x/y"}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_has_no_nan_and_a_failure_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "report.json"
    report.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError):
        report.write_json(path, {"loss": bad})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_what_became_of_a_weight():
    dense = torch.tensor([[3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    pruned = torch.tensor([[3.0, 0.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = report.describe_change(pruned, dense)
    assert found["kept"] == pytest.approx((9 + 4 + 1 + 1) / 18.25) and found["moved"] == pytest.approx(
        (3.25 / 18.25) ** 0.5
    )
    assert report.describe_change(dense, dense) == {"kept": 1.0, "moved": 0.0}
    assert report.describe_change(torch.zeros(2, 4), torch.zeros(2, 4)) == {"kept": 0.0, "moved": 0.0}


def test_sides_of_a_matrix_and_of_a_stack():
    assert report.readable_sides({"out": 8, "in": 16}) == "8 x 16"
    assert report.readable_sides({"out": 8, "in": 16, "experts": 4}) == "4 x 8 x 16"
    assert report.readable_sides({"out": 8, "in": 16, "experts": 4, "chosen": 2}) == "4 x 8 x 16, 2 a token"
