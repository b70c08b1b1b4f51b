"""The dump of what passes did: on paper before a pass fails, numbered on, and only where it was asked for."""

import re

import pytest

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.passes import find_linears, harden_masks, run_passes, train_passes
from sparseforge_fx.passes.base import DUMP_VARIABLE


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_graphs_and_the_difference_in_operators(program, tmp_path):
    passes = train_passes(find_linears(program), slorb_block=4)
    run_passes(program, passes, dump=tmp_path / "new" / "graphs")
    folder = tmp_path / "new" / "graphs"
    assert names(folder) == [
        "01-insert_soft_masks.after.txt",
        "01-insert_soft_masks.before.txt",
        "02-insert_low_rank.after.txt",
        "02-insert_low_rank.before.txt",
        "summary.txt",
    ]
    before, after, again = (
        (folder / f"{name}.txt").read_text()
        for name in ("01-insert_soft_masks.before", "01-insert_soft_masks.after", "02-insert_low_rank.before")
    )
    masked = re.compile(r"= torch\.ops\.sparseforge\.soft_masked_linear\.default\(")
    assert not masked.findall(before) and len(masked.findall(after)) == 6 and after == again
    assert (folder / "summary.txt").read_text() == (
        "01-insert_soft_masks: 6 changed\n"
        "       -1  aten.addmm.default\n"
        "       -5  aten.linear.default\n"
        "       +6  sparseforge.soft_masked_linear.default\n"
        "02-insert_low_rank: 6 changed\n"
        "       +6  aten.add.Tensor\n"
        "      +12  aten.linear.default\n"
    )


def test_numbers_go_on_in_a_folder_that_the_environment_names(program, tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    masked, _ = run_passes(program, train_passes(find_linears(program)))
    run_passes(masked, [harden_masks])
    written = [name for name in names(tmp_path) if "after" in name]
    assert written == ["01-insert_soft_masks.after.txt", "02-harden_masks.after.txt"]
    assert (tmp_path / "summary.txt").read_text().startswith("01-insert_soft_masks: 6 changed\n")
    assert "02-harden_masks: 6 changed\n" in (tmp_path / "summary.txt").read_text()


def test_the_graph_that_a_pass_fails_on_is_there(program, tmp_path):
    def fails(program):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run_passes(program, [fails], dump=tmp_path)
    assert names(tmp_path) == ["01-fails.before.txt", "summary.txt"]


def test_nothing_is_written_unasked(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DUMP_VARIABLE, "")
    run_passes(program, train_passes(find_linears(program)))
    assert names(tmp_path) == []


def test_a_file_is_no_folder(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparseForgeError, match=r"no graphs can be dumped into .*file .*: name another folder"):
        run_passes(program, [], dump=tmp_path / "file")
