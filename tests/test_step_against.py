"""A step of this checkout against another's: what runs, and what is made of the times."""

import subprocess
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def against(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    import step_against

    return step_against


def test_a_checkout_trains_in_a_process_of_its_own(against, tmp_path):
    model = write_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    asked = {"batch_size": 1, "length": 16, "steps": 3, "compile": False, "model": str(model), "dtype": "float32"}
    steps = against.run(asked, ROOT)
    assert len(steps) == 3 and all(step["seconds"] > 0 and step["loss"] > 0 for step in steps)


def test_a_folder_without_the_package_is_no_checkout(against, tmp_path):
    with pytest.raises(SystemExit, match="give a checkout"):
        against.run({}, tmp_path)


def test_what_two_checkouts_took(against):
    """The first two steps are not counted; rounds are compared with each other."""
    slow, fast = [9.0, 9.0, 2.0, 2.0], [9.0, 9.0, 1.0, 0.5]
    rows = lambda seconds, loss: [{"seconds": s, "loss": loss} for s in seconds]  # noqa: E731
    found = against.compared({"other": [rows(slow, 3.0)] * 2, "here": [rows(fast, 3.5), rows(slow, 3.5)]})
    assert found["seconds"] == {"other": 2.0, "here": 1.5}
    assert found["speedups"] == [2.0 / 0.75, 1.0] and found["speedup"] == 2.0 / 1.5
    assert found["largest_difference"] == 0.5


def test_a_commit_says_whether_its_tree_has_changes(against, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run([*git, *arguments], check=True)
    clean = against.commit_of(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert against.commit_of(tmp_path) == clean + "+"
