"""Files and folders that are written whole or not at all, whatever stops the writer and wherever they lie."""

import contextlib
import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseforge_fx import files
from sparseforge_fx.errors import SparseForgeError


# -- one file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_there_when_it_is_whole(tmp_path, shared):
    path = tmp_path / "new" / "a.json"
    for content in ("first", "second"):
        with files.new_file(path, shared=shared) as partial:
            partial.write_text("half")
            assert not path.exists() or path.read_text() == "first"
            partial.write_text(content)
        assert path.read_text() == content and os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.json"
    path.write_text("good")
    with pytest.raises(stop), files.new_file(path) as partial:
        partial.write_text("half")
        raise stop
    assert path.read_text() == "good" and os.listdir(tmp_path) == ["a.json"]


def test_two_that_write_the_same_file_are_in_nobodys_way(tmp_path):
    path = tmp_path / "a.json"
    with files.new_file(path, shared=True) as one:
        one.write_text("one")
        with files.new_file(path, shared=True) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.json"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    by_handle = lambda handle: os.readlink(f"/proc/self/fd/{handle}")  # noqa: E731
    monkeypatch.setattr(files.os, "fsync", lambda handle: done.append(by_handle(handle)) or fsync(handle))
    monkeypatch.setattr(files.os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    with files.new_file(tmp_path / "a") as partial:
        partial.write_text("a")
    assert done == [str(partial), "renamed", str(tmp_path)]


# -- a full disk -----------------------------------------------------------------------------------------------------
def by_python(file):
    file.write_text("x" * 10**5)


def by_torch(file):
    torch.save(torch.zeros(10**5), file)


def by_safetensors(file):
    save_file({"a": torch.zeros(10**5)}, file)


def as_a_reason(file):
    try:
        by_python(file)
    except OSError as error:
        raise RuntimeError("some library's own words") from error


@pytest.fixture
def full():
    """Files that may not grow stand for a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [by_python, by_torch, by_safetensors, as_a_reason])
def test_a_full_disk_is_told_and_nothing_stays(tmp_path, full, write):
    told = lambda name: f"the disk of {tmp_path / name} is full: make room there and repeat the command"  # noqa: E731
    with pytest.raises(SparseForgeError) as caught, files.new_file(tmp_path / "file") as file:
        write(file)
    assert str(caught.value) == told("file") and os.listdir(tmp_path) == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "good").write_text("good")
    with (
        pytest.raises(SparseForgeError) as caught,
        files.new_folder(tmp_path / "folder", overwrite=True) as folder,
        files.new_file(folder / "a") as file,
    ):
        write(file)
    assert str(caught.value) == told("folder") and os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["good"]


# -- a folder --------------------------------------------------------------------------------------------------------
def fill(out, name="new", **options):
    with files.new_folder(out, **{"overwrite": True, **options}) as folder:
        (folder / name).write_text(name)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / name).write_text(name)


def whole(out, name="new"):
    return sorted(os.listdir(out)) == [name, "sub"] and os.listdir(out / "sub") == [name]


def test_a_folder_that_is_not_empty_is_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(SparseForgeError, match="not empty"):
        fill(out, overwrite=False)
    assert os.listdir(out) == ["precious"] and os.listdir(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    fill(out)
    assert whole(out) and os.listdir(tmp_path) == ["out"]


def test_a_failure_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "good").write_text("good")
    with pytest.raises(RuntimeError), files.new_folder(out, overwrite=True) as partial:
        (partial / "bad").write_text("half")
        raise RuntimeError
    assert os.listdir(out) == ["good"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_renames_is_put_right_later(tmp_path, monkeypatch, renames):
    """The new folder was complete: it becomes the folder the next time somebody looks."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(a, b):
        if len(done) == renames:
            raise Killed
        done.append((a, b))
        real(a, b)

    def rmtree(path, **options):
        raise Killed

    with pytest.raises(Killed), files.new_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
        monkeypatch.setattr(files.os, "replace", replace)
        monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    monkeypatch.undo()
    files.finish_replacement(out)
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SparseForgeError, match="is a file"):
        fill(tmp_path / "out")


# -- output folders that are no plain folders ------------------------------------------------------------------------
def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / "nowhere").symlink_to("made later")
    for link, target in (("out", "elsewhere"), ("nowhere", "made later")):
        fill(tmp_path / link)
        assert (tmp_path / link).is_symlink() and whole(tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "made later", "nowhere", "out"]


@pytest.mark.parametrize("name", [".", "../out", "../link", "sub/..", None])
def test_the_working_folder_is_filled_and_stays_where_one_stands(tmp_path, monkeypatch, name):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out")
    fill(Path(name or tmp_path / "out"))
    assert whole(Path(".")) and whole(tmp_path / "out") and os.path.samefile(".", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]
    with pytest.raises(RuntimeError), files.new_folder(Path("."), overwrite=True) as folder:
        (folder / "bad").write_text("half")
        raise RuntimeError
    assert whole(Path("."))


def test_what_holds_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out" / "far" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "far" / "sub")
    for name in ("..", "../..", tmp_path / "out"):
        with pytest.raises(SparseForgeError, match=r"holds the working folder, which would go: work elsewhere"):
            fill(Path(name))
    fill(Path("../../beside"))
    assert whole(tmp_path / "out" / "beside")


@pytest.fixture
def mounted(tmp_path):
    """A real mount where this process may make one."""
    out = tmp_path / "mounted"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(out)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield out
    subprocess.run(["umount", str(out)], check=True)


def test_a_mount_point_is_filled(mounted):
    (mounted / "lost+found").mkdir()
    files.check_output(mounted)
    fill(mounted, "old")
    fill(mounted)
    (mounted / "lost+found").rmdir()
    assert whole(mounted) and os.listdir(mounted.parent) == ["mounted"]
    with pytest.raises(RuntimeError), files.new_folder(mounted, overwrite=True) as folder:
        (folder / "bad").write_text("half")
        raise RuntimeError
    assert whole(mounted)


def test_a_read_only_mount_is_seen_before_the_work(mounted):
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for out in (mounted, mounted / "below", mounted / "far" / "below"):
        with pytest.raises(SparseForgeError, match=r"takes no new files \(Read-only") as error:
            files.check_output(out)
        assert "\n" not in str(error.value)


def not_renamed(monkeypatch, out, error):
    real = os.replace

    def replace(a, b):
        if str(out) in (str(a), str(b)):
            raise OSError(error, os.strerror(error))
        real(a, b)

    monkeypatch.setattr(files.os, "replace", replace)


@pytest.mark.parametrize("error", ["EBUSY", "EXDEV"])
def test_a_folder_that_turns_out_to_be_a_mount(tmp_path, monkeypatch, error):
    """Bound from elsewhere on the same disk, it looks like any folder until it is renamed."""
    out = tmp_path / "out"
    fill(out, "old")
    not_renamed(monkeypatch, out, getattr(errno, error))
    fill(out)
    assert whole(out) and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moves", range(9))
def test_a_kill_while_a_mount_is_filled_is_put_right_later(tmp_path, monkeypatch, moves):
    """Old or new, never a mixture: before the new content was complete the old one stays."""
    out = tmp_path / "out"
    fill(out, "old")
    monkeypatch.setattr(files.os.path, "ismount", lambda path: str(path) == str(out))
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(a, b):
        if len(done) == moves:
            raise Killed
        done.append(a)
        real(a, b)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **options: None)
    with contextlib.suppress(Killed):
        fill(out)
    monkeypatch.undo()
    files.finish_replacement(out)
    assert whole(out, "new" if moves else "old"), os.listdir(out)


def test_a_parent_that_is_a_file_or_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "far" / "out"):
        with pytest.raises(SparseForgeError, match=r"cannot be written: .*file is a file") as error:
            files.check_output(out)
        assert "\n" not in str(error.value)
    files.check_output(tmp_path / "far" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("length", [238, 246, 249, 255])
def test_a_name_too_long_for_what_stands_beside_it_is_seen_before_the_work(tmp_path, length):
    for out in (tmp_path / ("x" * length), tmp_path / "far" / ("x" * length)):
        for check in (files.check_parent, files.check_output, fill):
            with pytest.raises(SparseForgeError, match=r"^the name x+ is too long .*: shorten it$"):
                check(out)
    assert os.listdir(tmp_path) == []
    fill(tmp_path / ("x" * 237))
    assert whole(tmp_path / ("x" * 237))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_parent_that_takes_nothing():
    with pytest.raises(SparseForgeError, match=r"/proc takes no new files"):
        files.check_output(Path("/proc/none/out"))
