"""Training state on disk: what comes back, what is refused, and that a whole file is never replaced by half of one."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training import checkpoint
from sparseforge_fx.training.checkpoint import load_state, save_state

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
STATE = {
    "step": 7,
    "masters": [torch.arange(3.0), torch.ones(2, 2, dtype=torch.bfloat16)],
    "method": {"fixed": False, "lambda": 0.25, "soft": {}, "none": None},
    "curves": [{"loss": 1.5}, {"loss": math.pi}],
}


def test_everything_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "new" / "folder" / "state.pt"
    save_state(path, STATE)
    state = load_state(path)
    for mine, saved in zip(state["masters"], STATE["masters"], strict=True):
        assert torch.equal(mine, saved) and mine.dtype == saved.dtype
    assert {k: state[k] for k in ("step", "method", "curves")} == {k: STATE[k] for k in ("step", "method", "curves")}
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


def test_the_last_state_replaces_the_one_before(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    save_state(path, STATE | {"step": 8})
    assert load_state(path)["step"] == 8


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    good = path.read_bytes()

    def half(value, file):
        file.write(good[: len(good) // 2])
        raise KeyboardInterrupt

    def stopped(*args):
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr(checkpoint.torch, "save", half)
    else:
        monkeypatch.setattr("sparseforge_fx.files.os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, STATE | {"step": 8})
    assert path.read_bytes() == good
    monkeypatch.undo()
    save_state(path, STATE | {"step": 9})  # the leftover is in nobody's way
    assert load_state(path)["step"] == 9


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


FOREIGN = {
    "text": lambda path: path.write_text("hello\n"),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"version": 1})),
    "weights": lambda path: torch.save({"layer.weight": torch.ones(2)}, path),
    "a state of another program": lambda path: torch.save({"version": 1, "step": 3}, path),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "code": lambda path: torch.save({"version": 1, "x": Malicious()}, path),
    "folder": lambda path: path.mkdir(),
    "zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_refused(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"
    FOREIGN[what](path)
    with pytest.raises(SparseForgeError, match=r"state\.pt.* is not a training state") as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path):
    with pytest.raises(SparseForgeError, match=r"state\.pt"):
        load_state(tmp_path / "state.pt")


def test_version_from_the_future(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    save_state(path, STATE)
    monkeypatch.undo()
    with pytest.raises(SparseForgeError, match=f"has version {checkpoint.VERSION + 1}, this release reads"):
        load_state(path)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(SparseForgeError):
            load_state(path)


@settings(max_examples=100, deadline=None)
@given(start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"]), rest=st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path_factory, start, rest):
    path = tmp_path_factory.getbasetemp() / "arbitrary.pt"
    path.write_bytes(start + rest)
    with pytest.raises(SparseForgeError):
        load_state(path)
