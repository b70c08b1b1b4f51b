"""Training state on disk: written beside the old one, then put in its place, so that a kill leaves a whole file.

The file is what ``torch.save`` writes, then a mark and the SHA-256 of all before the mark: no changed byte goes unseen.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError

FORMAT, VERSION = "sparseforge-fx training state", 2
MARK = b"sparseforge-fx SHA-256"
_TAIL = len(MARK) + hashlib.sha256().digest_size


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        hashing = _Hashing(file)
        torch.save({"format": FORMAT, "version": VERSION, **state}, hashing)  # type: ignore[arg-type]
        file.write(MARK + hashing.digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


# -- does a value that was read fit? ---------------------------------------------------------------------------------
def misfit(found: Any, wanted: Any, name: str) -> str | None:
    """What is wrong with a value that must have the form of ``wanted``: the same keys and lengths, tensors of the same
    shape and dtype, plain values of the same type. None: nothing."""
    if isinstance(wanted, Tensor):
        if not isinstance(found, Tensor):
            return f"{name} is no tensor"
        if found.shape != wanted.shape or found.dtype != wanted.dtype or found.layout != wanted.layout:
            return (
                f"{name} is {found.dtype} {list(found.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
            ).replace("torch.", "")
        return None
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is no dictionary"
        if set(found) != set(wanted):
            one = sorted(map(str, set(found) ^ set(wanted)))[0]
            return f"{name} {'lacks' if one in map(str, wanted) else 'has a foreign entry'} {one}"
        return next((m for k in wanted if (m := misfit(found[k], wanted[k], f"{name}[{k}]"))), None)
    if isinstance(wanted, list | tuple):
        if type(found) is not type(wanted) or len(found) != len(wanted):
            return f"{name} is no {type(wanted).__name__} of {len(wanted)}"
        pairs = enumerate(zip(found, wanted, strict=True))
        return next((m for i, (a, b) in pairs if (m := misfit(a, b, f"{name}[{i}]"))), None)
    if type(found) is not type(wanted) and not (type(found) is int and type(wanted) is float):
        return f"{name} is of type {type(found).__name__} instead of {type(wanted).__name__}"
    return None
