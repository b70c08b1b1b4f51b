"""The folder of a walk: whatever kills it, what is there is whole or gone on with; other data and weights are refused."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint

from sparseforge_fx import files
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.compute_dtype import ComputeDtype
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.training import walk_folder
from sparseforge_fx.training.from_disk import sparsify_on_disk
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.walk_folder import JOURNAL, WalkFolder, check_place, how_to_go_on

IDENTITY = {"recipe": {}, "data": ""}
RUN = {"method": "wanda", "length": 32, "calibration": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("walk") / "dense")


@pytest.fixture(scope="module")
def report(dense, tmp_path_factory):
    return sparsify_on_disk(dense, output=tmp_path_factory.mktemp("report") / "sparse", method="magnitude")


@pytest.fixture
def ids():
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


def opened(dense, output):
    place = check_place(output, resume=True, overwrite=True)
    return WalkFolder(place, StreamedModel(dense), IDENTITY, ComputeDtype(torch.float32, torch.float32))


def killed_at(moment, go):
    """Was ``go``, in a process of its own, ended before its call number ``moment`` that changes the disk?"""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def killing(real):
            def call(*args, **options):
                if next(count) == moment:
                    os._exit(9)
                return real(*args, **options)

            return call

        try:
            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
                setattr(os, name, killing(getattr(os, name)))
            go()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("before", [(), ("model.safetensors", "mine.txt")], ids=["new", "overwriting"])
def test_a_kill_at_any_place_of_the_end_is_gone_on_with(dense, report, tmp_path, before):
    for moment in itertools.count(1):
        output = tmp_path / str(moment) / "sparse"
        output.parent.mkdir()
        for name in before:
            output.mkdir(exist_ok=True)
            (output / name).write_text("old")
        work = opened(dense, output)
        (work.scratch / "border-2").mkdir()
        (work.scratch / "border-2" / "0.pt").write_text("alive")
        work.journal["border"] = 2
        work.save()
        if not killed_at(moment, lambda: work.finish(output, report, Recipe())):  # noqa: B023
            break
        assert "2 finished blocks" in how_to_go_on(output)
        again = opened(dense, output)
        assert again.journal["border"] == 2
        again.finish(output, again.finished or report, Recipe())
        made = {"report.json", "report.html", "recipe.yaml"}
        assert {f.name for f in dense.iterdir()} | made == set(os.listdir(output))
        assert os.listdir(output.parent) == ["sparse"]
    assert moment > 20


def test_what_was_overwritten_comes_back_where_the_new_folder_is_not_in_its_place(dense, report, tmp_path, monkeypatch):
    output = tmp_path / "sparse"
    output.mkdir()
    (output / "mine.txt").write_text("old")
    work, replace = opened(dense, output), os.replace

    def stopped(old, new):
        if new == output:
            monkeypatch.undo()
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        work.finish(output, report, Recipe())
    assert os.listdir(output) == ["mine.txt"] and sorted(os.listdir(tmp_path)) == ["sparse", "sparse.unfinished"]
    os.replace(output, tmp_path / ".sparse.old")  # as a kill would have left it
    check_place(output, resume=True, overwrite=True)
    assert os.listdir(output) == ["mine.txt"]


def test_a_symbolic_link_stays_one(dense, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("old")
    (tmp_path / "sparse").symlink_to("elsewhere")
    sparsify_on_disk(dense, output=tmp_path / "sparse", method="magnitude", overwrite=True)
    assert (tmp_path / "sparse").is_symlink() and (tmp_path / "sparse" / "report.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "sparse"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_hours_of_work(dense, tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(
        SparseForgeError, match=r"mounted is the working folder or a mount point, .*: name a folder in it"
    ):
        sparsify_on_disk(dense, output=tmp_path / "mounted", method="magnitude")
    monkeypatch.chdir(tmp_path / "mounted")
    for name in (".", "../mounted", "below/.."):
        with pytest.raises(SparseForgeError, match=r"is the working folder or a mount"):
            check_place(Path(name), resume=False, overwrite=True)
    assert os.listdir(tmp_path) == ["mounted"] and os.listdir() == []


def test_what_a_killed_writer_left_is_not_taken_for_the_new_folder(tmp_path):
    output, new, left = tmp_path / "sparse", tmp_path / "new", tmp_path / ".sparse.partial"
    for folder in (output, new, left):
        folder.mkdir()
    files.replace_folder(output, new)
    assert os.listdir(tmp_path) == ["sparse"]


def test_what_the_journal_says_is_on_the_disk_before_it(dense, ids, tmp_path, monkeypatch):
    pending, journals = set(), []
    write, fsync, replace = Shards.write, os.fsync, os.replace

    def written(self, name, value):
        write(self, name, value)
        pending.add(str(self.places[name].file))

    def moved(old, new):
        if os.path.basename(new) == JOURNAL:
            journals.append(sorted(pending))
        replace(old, new)
        pending.add(os.path.dirname(new))  # the name

    monkeypatch.setattr(Shards, "write", written)
    monkeypatch.setattr(os, "fsync", lambda h: (pending.discard(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(os, "replace", moved)
    make = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *rest: (make(path, *rest), pending.add(os.path.dirname(path))))
    sparsify_on_disk(dense, ids, output=tmp_path / "sparse", **RUN)
    assert len(journals) == 4  # the copy, two blocks, the end
    assert not any(journals)


def test_other_data_and_other_weights_are_refused(dense, ids, tmp_path):
    source, output = shutil.copytree(dense, tmp_path / "dense"), tmp_path / "sparse"
    sparsify_on_disk(source, ids, output=output, blocks=1, **RUN)
    with pytest.raises(SparseForgeError, match=r"the data are not those that the run in .* began with"):
        sparsify_on_disk(source, ids.flip(1), output=output, resume=True, **RUN)
    weights, name = Shards(source), "model.layers.1.mlp.up_proj.weight"
    value = weights.read(name)
    weights.write(name, value.flip(0))
    with pytest.raises(SparseForgeError, match=r"dense/model.safetensors is not what the run in .* began with"):
        sparsify_on_disk(source, ids, output=output, resume=True, **RUN)
    weights.write(name, value)
    with (source / "config.json").open("a") as config:
        config.write(" ")
    with pytest.raises(SparseForgeError, match=r"dense/config.json is not what"):
        sparsify_on_disk(source, ids, output=output, resume=True, **RUN)


def test_files_that_were_not_touched_are_not_read_again(dense, ids, tmp_path, monkeypatch):
    source = shutil.copytree(dense, tmp_path / "dense")
    sparsify_on_disk(source, ids, output=tmp_path / "sparse", blocks=1, **RUN)
    read = []
    real = walk_folder.fingerprint.of_file
    monkeypatch.setattr(walk_folder.fingerprint, "of_file", lambda file: (read.append(file.name), real(file))[1])
    sparsify_on_disk(source, ids, output=tmp_path / "sparse", blocks=1, resume=True, **RUN)
    assert read == []
    os.utime(source / "model.safetensors")
    sparsify_on_disk(source, ids, output=tmp_path / "sparse", resume=True, **RUN)
    assert read == ["model.safetensors"]


def test_what_is_left_is_told(dense, ids, tmp_path):
    output = tmp_path / "sparse"
    assert how_to_go_on(output) is None
    opened(dense, output)
    assert "a copy of the model, and no finished block" in how_to_go_on(output)
    shutil.rmtree(tmp_path / "sparse.unfinished")
    sparsify_on_disk(dense, ids, output=output, blocks=1, **RUN)
    told = f"{output}.unfinished holds 1 finished block: go on with the same command and --resume"
    assert how_to_go_on(output) == told
