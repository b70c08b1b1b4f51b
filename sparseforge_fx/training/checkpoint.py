"""Training state on disk: written beside the old one, then put in its place, so that a kill leaves a whole file.

The file is what ``torch.save`` writes, then a mark and the SHA-256 of all before the mark: no changed byte goes unseen.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import new_file

FORMAT, VERSION = "sparseforge-fx training state", 4
MARK = b"sparseforge-fx SHA-256"
_TAIL = len(MARK) + hashlib.sha256().digest_size


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    with new_file(path) as partial, open(partial, "wb") as file:
        hashing = _Hashing(file)
        torch.save({"format": FORMAT, "version": VERSION, **state}, hashing)  # type: ignore[arg-type]
        file.write(MARK + hashing.digest.digest())


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; nothing in the file is executed, and a byte that changed since is noticed.
    Raises SparseForgeError on any other file."""
    try:
        with open(path, "rb") as file:
            whole = _is_whole(file)
            written_before = not whole and _is_older(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True) if whole else None
    except Exception as error:  # whatever a foreign file makes of the unpickler: there is no end to the list
        raise SparseForgeError(
            f"{path} is not a training state of sparseforge-fx ({type(error).__name__}); delete it to start anew"
        ) from error
    if written_before:
        raise SparseForgeError(
            f"{path} is a training state of another release or a damaged one; delete it to start anew"
        )
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SparseForgeError(f"{path} is not a training state of sparseforge-fx or is torn; delete it to start anew")
    if state.get("version") != VERSION:
        raise SparseForgeError(
            f"{path} has version {state.get('version')}, this release reads {VERSION}; delete it to start anew"
        )
    return state


class _Hashing:
    """A file to write to that keeps the digest of what it was given: the state is never twice in memory."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _is_whole(file: IO[bytes]) -> bool:
    """Does the file end in the digest of the rest, and claim no more than it holds?"""
    size = os.fstat(file.fileno()).st_size
    if size <= _TAIL:
        return False
    file.seek(size - _TAIL)
    tail = file.read()
    if not tail.startswith(MARK):
        return False
    file.seek(0)
    digest, left = hashlib.sha256(), size - _TAIL
    while left and (block := file.read(min(left, 1 << 24))):
        digest.update(block)
        left -= len(block)
    if MARK + digest.digest() != tail:
        return False
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist()) <= size


def _is_older(file: IO[bytes]) -> bool:
    """Does it say that it is a state of this package, though not one that is written today?"""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return bool(names) and FORMAT.encode() in archive.open(names[0]).read(1 << 20)
