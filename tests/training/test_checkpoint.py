"""Training state on disk: what comes back, what is refused, and that a whole file is never replaced by half of one."""

import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training import checkpoint
from sparseforge_fx.training.checkpoint import PLAIN, find_state, load_plain, load_state, save_state

STATE = {
    "step": 7,
    "masters": [
        torch.arange(3.0),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.tensor(3.0),
        torch.arange(6.0).view(2, 3).t(),
    ],
    "method": {"fixed": False, "lambda": 0.25, "soft": {}, "none": None, 3: (0.9, 0.95), "nan": [math.inf]},
    "curves": [{"loss": 1.5}, {"loss": math.pi}],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "state"
    save_state(path, 7, STATE)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    """A state of its own, and the folder that it is in."""
    path = Path(shutil.copytree(saved, tmp_path / "state"))
    return path, find_state(path)


def seal(folder, text):
    """Write plain values as if this package had."""
    (folder / PLAIN).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


def test_everything_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "new" / "folder" / "state"
    save_state(path, 7, STATE)
    state = load_state(path)
    for mine, saved in zip(state["masters"], STATE["masters"], strict=True):
        assert torch.equal(mine, saved) and mine.dtype == saved.dtype
    plain = ("step", "method", "curves")
    assert {k: state[k] for k in plain} == {k: STATE[k] for k in plain} == {k: load_plain(path)[k] for k in plain}
    assert [p.name for p in path.parent.iterdir()] == ["state"]


def test_the_last_two_are_kept(tmp_path):
    path = tmp_path / "state"
    for step in (8, 9, 9, 10):
        save_state(path, step, STATE | {"step": step})
        assert load_state(path)["step"] == step
    assert sorted(p.name for p in path.iterdir()) == ["step-00000009", "step-00000010"]
    save_state(path, 11, STATE, keep=1)
    assert [p.name for p in path.iterdir()] == ["step-00000011"]


def test_behind_a_damaged_state_there_is_the_one_before(tmp_path):
    path = tmp_path / "state"
    for step in (8, 9):
        save_state(path, step, STATE | {"step": step})
    (find_state(path) / PLAIN).write_text("{")
    with pytest.raises(
        SparseForgeError, match=r"step-00000009 is not a training state.*delete it to go on from the one before"
    ):
        load_state(path)
    shutil.rmtree(find_state(path))
    assert load_state(path)["step"] == 8


@pytest.mark.parametrize("moment", ["while writing", "before the plain values", "before the rename"])
def test_an_interrupted_save_leaves_the_old_state(tmp_path, monkeypatch, moment):
    path = tmp_path / "state"
    save_state(path, 7, STATE)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    where = {
        "while writing": "torch.distributed.checkpoint.filesystem.os.fsync",
        "before the rename": "sparseforge_fx.files.os.replace",
    }
    monkeypatch.setattr(where.get(moment, "sparseforge_fx.training.checkpoint._digest"), stopped)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, 8, STATE | {"step": 8})
    monkeypatch.undo()
    assert load_state(path)["step"] == 7
    (path / ".step-00000009.partial").mkdir()  # what a kill leaves is in nobody's way
    save_state(path, 9, STATE | {"step": 9})
    assert load_state(path)["step"] == 9


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


FOREIGN = {
    "text": lambda path: path.write_text("hello\n"),
    "empty": lambda path: path.write_bytes(b""),
    "weights": lambda path: torch.save({"layer.weight": torch.ones(2)}, path),
    "another folder": lambda path: (path / "config").mkdir(parents=True),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_else_may_stand_there_is_refused(tmp_path, what):
    path = tmp_path / "state"
    FOREIGN[what](path)
    with pytest.raises(SparseForgeError, match=r"state is not a training state of this release; delete it") as error:
        load_state(path)
    assert "\n" not in str(error.value)


INSIDE = {
    "no plain values": lambda folder: (folder / PLAIN).unlink(),
    "plain values of another program": lambda folder: seal(folder, json.dumps({"version": 5, "step": 3})),
    "a list": lambda folder: seal(folder, "[1]"),
    "no json": lambda folder: seal(folder, "{"),
    "no digest": lambda folder: (folder / PLAIN).write_text("{}\n"),
    "one file less": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "one file more": lambda folder: (folder / "more.safetensors").write_bytes(b""),
    "code": lambda folder: next(folder.glob("*.safetensors")).write_bytes(pickle.dumps(Malicious())),
    "torch's own index": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Malicious())),
}


@pytest.mark.parametrize("what", INSIDE)
def test_a_state_that_was_changed_is_refused(copied, monkeypatch, what):
    path, folder = copied
    monkeypatch.chdir(path.parent)
    INSIDE[what](folder)
    with pytest.raises(
        SparseForgeError, match=r"step-00000007 is not a training state.*delete it to start anew"
    ) as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert not (path.parent / "executed").exists()


def test_a_file_whose_digest_was_forged_is_read_as_safetensors_alone(copied, monkeypatch):
    path, folder = copied
    monkeypatch.chdir(path.parent)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(pickle.dumps(Malicious()))
    said = json.loads((folder / PLAIN).read_text().split("\n")[0])
    seal(folder, json.dumps(said | {"files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}}))
    with pytest.raises(SparseForgeError, match="is not a training state"):
        load_state(path)
    assert not (path.parent / "executed").exists()


def test_missing(tmp_path):
    assert find_state(tmp_path / "state") is None
    with pytest.raises(SparseForgeError, match="state holds no training state"):
        load_state(tmp_path / "state")


def test_version_from_the_future(tmp_path, monkeypatch):
    path = tmp_path / "state"
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    save_state(path, 7, STATE)
    monkeypatch.undo()
    with pytest.raises(SparseForgeError, match=f"has version {checkpoint.VERSION + 1}, this release reads"):
        load_state(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 1), place=st.integers(0, 1 << 20), bit=st.integers(-1, 7))
def test_a_changed_byte_or_a_cut_anywhere(copied, which, place, bit):
    path, folder = copied
    file = sorted(folder.iterdir())[which]
    whole = file.read_bytes()
    place %= len(whole)
    flipped = bytes([whole[place] ^ 1 << max(0, bit)]) + whole[place + 1 :]
    file.write_bytes(whole[:place] + (b"" if bit < 0 else flipped))
    with pytest.raises(SparseForgeError) as error:
        load_state(path)
    assert "\n" not in str(error.value)
    file.write_bytes(whole)
    assert load_state(path)["step"] == 7
