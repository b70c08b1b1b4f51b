"""Files and folders that are written whole or not at all, and whether they can be."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparseforge_fx.errors import SparseForgeError

#: what a write says that the disk, a quota or a limit ended: as a number; as the words of Rust; of torch.save
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FULL_TEXTS = ("No space left", "File too large", "quota exceeded", "unexpected pos ")


@contextmanager
def disk_full_told(place: Path, then: str = "repeat the command") -> Iterator[None]:
    """Raise SparseForgeError, with what to do ``then``, where something inside finds the disk full, in whatever words
    and however deep."""
    try:
        yield
    except Exception as error:  # each library has an error of its own
        if _full(error):
            raise SparseForgeError(f"the disk of {place} is full: make room there and {then}") from error
        raise


def _full(error: BaseException | None) -> bool:
    if error is None:
        return False
    found = isinstance(error, OSError) and error.errno in FULL
    return found or any(text in str(error) for text in FULL_TEXTS) or _full(error.__cause__)


@contextmanager
def new_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file to write; it becomes ``path`` when the block ends well, and vanishes when it does not.

    Args:
        shared: other processes may write the same file at the same time, so that each needs a name of its own; what a
            kill leaves behind is then overwritten by nobody.

    Raises SparseForgeError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial" if shared else f"{path.name}.partial")
    try:
        with disk_full_told(path):
            yield partial
            move_file(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def move_file(made: Path, path: Path) -> None:
    """Let a file that is complete, on the same disk, take the place of ``path``: its bytes are there before its name,
    so that after a power failure ``path`` is the old file or the new one."""
    sync(made)
    os.replace(made, path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """What was written to it is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk."""
    with suppress(OSError):  # not every file system can, and the name is there for all who look now
        sync(folder)


def sync_all(folder: Path) -> None:
    """All that lies in a folder is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)
        elif file.is_dir():
            sync_folder(file)
    sync_folder(folder)


# -- folders ---------------------------------------------------------------------------------------------------------
@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes ``folder`` when the block ends well, and vanishes when it does not.

    A symbolic link stays one: what it points to is replaced. A mount point, which cannot be replaced, and the working
    folder, which whoever stands in it would lose, are filled: their former content goes when the new one is complete.
    Raises SparseForgeError if ``folder`` is a file, cannot be written, or is not empty and ``overwrite`` is False; and
    where the disk is full.
    """
    finish_replacement(folder)
    check_output(folder, overwrite=overwrite)
    folder = Path(os.path.realpath(folder))
    inside = stays(folder)
    partial = folder / PARTIAL if inside else folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk_full_told(folder):
            yield partial
            sync_all(partial)
            if not inside:
                try:
                    replace_folder(folder, partial)
                    return
                except OSError as error:
                    if error.errno not in (errno.EBUSY, errno.EXDEV) or not folder.is_dir():
                        raise
                # a mount that looks like a folder: bound from elsewhere on the same disk
                shutil.rmtree(folder / PARTIAL, ignore_errors=True)
                shutil.move(partial, folder / PARTIAL)
            os.replace(folder / PARTIAL, folder / COMPLETE)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        finish_replacement(folder)  # had it failed between two renames, the old one comes back
        raise
    _empty_out(folder)


#: in a folder that cannot be replaced: what is being written; what is complete and still has the old content beside it;
#: what is on its way up; the old content
PARTIAL, COMPLETE, MOVING, OLD = (f".sparseforge-{n}" for n in ("partial", "complete", "moving", "old"))
LOST = "lost+found"  # of a file system, at its root


def finish_replacement(folder: Path) -> None:
    """Put things right after a kill during :func:`new_folder`: a new folder that was complete takes its place."""
    folder = Path(os.path.realpath(folder))
    partial, old = (folder.with_name(f".{folder.name}.{n}") for n in ("partial", "old"))
    if os.path.exists(old):  # False for a name that is too long
        if not folder.exists():
            os.replace(partial if partial.exists() else old, folder)
        shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        _empty_out(folder)


def check_output(folder: Path, *, overwrite: bool = False) -> None:
    """Raise SparseForgeError if a result cannot or must not be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise SparseForgeError(f"the output {folder} is a file: name a folder")
    if not overwrite and folder.exists() and any(f.name != LOST for f in folder.iterdir()):
        raise SparseForgeError(f"the output folder {folder} is not empty: name another one, or allow overwriting")
    folder = Path(os.path.realpath(folder))
    if folder in Path.cwd().parents:
        raise SparseForgeError(f"the output folder {folder} holds the working folder, which would go: work elsewhere")
    if folder.is_dir():
        _check_writable(folder, folder)
    if not folder.is_dir() or not stays(folder):
        check_parent(folder)


def check_parent(path: Path) -> None:
    """Raise SparseForgeError unless something can be written at ``path``, whose parents need not be there yet."""
    path = Path(os.path.abspath(path))
    there = next(p for p in path.parents if p.exists())
    if not there.is_dir():
        raise SparseForgeError(f"{path} cannot be written: {there} is a file; name another place")
    _check_writable(there, path, f".{path.name}.")


def _check_writable(folder: Path, wanted: Path, prefix: str = ".sparseforge-") -> None:
    """By trying, with a name as long as any on the way: rights say nothing of read-only file systems, nor to the
    root user."""
    try:
        os.rmdir(tempfile.mkdtemp(".partial", prefix, folder))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SparseForgeError(
                f"the name {wanted.name} is too long for the files that stand beside it while it is made: shorten it"
            ) from error
        raise SparseForgeError(
            f"{wanted} cannot be written: {folder} takes no new files ({error.strerror}); name another place"
        ) from error


def stays(folder: Path) -> bool:
    """Is this a folder that must not be renamed: a mount point, one whose parent is not ours to write, or the working
    folder?"""
    if not folder.is_dir():
        return False
    mounted = os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)
    return mounted or os.path.samefile(folder, os.curdir)


def replace_folder(folder: Path, new: Path) -> None:
    """Let a folder that is complete, on the same disk, take the place of ``folder``."""
    old, partial = (folder.with_name(f".{folder.name}.{n}") for n in ("old", "partial"))
    if new != partial:  # what a killed writer left there would be taken for the complete one
        shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _empty_out(folder: Path) -> None:
    """Let the complete new content in a folder take the place of the old; begins where a kill ended it."""
    complete, moving, old = (folder / name for name in (COMPLETE, MOVING, OLD))
    if complete.exists():
        old.mkdir(exist_ok=True)
        for entry in folder.iterdir():
            if entry.name not in (COMPLETE, OLD, LOST):
                os.replace(entry, old / entry.name)
        os.replace(complete, moving)
    if moving.exists():
        for entry in moving.iterdir():
            os.replace(entry, folder / entry.name)
        moving.rmdir()
    shutil.rmtree(old, ignore_errors=True)
