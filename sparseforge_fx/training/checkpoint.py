"""Training state on disk, by torch.distributed.checkpoint: a folder for each of the last states.

    STATE/step-00000120/state.json                  plain values, the digests of the files beside it, its own digest
    STATE/step-00000120/shard-*.safetensors         tensors: of each process what it alone holds
    STATE/step-00000080/...

Every process writes its part; another number of processes can read it. A folder has its name from the moment on that it
is complete, so that a kill leaves the one before. Nothing in it is unpickled: torch's own index of a checkpoint is a
pickle, and its writer of safetensors has none.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.files import new_folder
from sparseforge_fx.methods.curvature import processes

FORMAT, VERSION = "sparseforge-fx training state", 7
PLAIN, KEPT = "state.json", 2
_STEP = re.compile(r"step-\d{8,}")


def save_state(path: Path, step: int, state: Any, *, alone: bool = False, keep: int = KEPT) -> None:
    """Write tensors and plain values atomically, as the state after ``step`` steps, and forget all but the last
    ``keep`` states.

    Called by all processes, each with its part of every DTensor; ``alone``: by this one only.
    """
    tensors: dict[str, Tensor] = {}
    plain = _pack(state, tensors, "state")
    several = processes() > 1 and not alone
    first = not several or dist.get_rank() == 0
    with new_folder(path / f"step-{step:08d}", overwrite=True) if first else nullcontext(path) as made:
        place = Path(broadcast_object_list([str(made)])[0]) if several else made
        writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
        with _plainly():
            dcp.save(tensors, storage_writer=writer, no_dist=not several)
        if first:
            files = {file.name: _digest(file) for file in sorted(place.iterdir())}
            text = json.dumps({"format": FORMAT, "version": VERSION, "files": files, "state": plain})
            (place / PLAIN).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n", encoding="utf-8")
    if first:
        for old in _steps(path)[:-keep]:
            shutil.rmtree(old)
    if several:
        dist.barrier()  # nobody looks for the state before it has its name


def find_state(path: Path) -> Path | None:
    """The folder of the last complete state in ``path``; None where there is none yet.
    Raises SparseForgeError where something else is there."""
    steps = _steps(path)
    if steps:
        return steps[-1]
    foreign = path.is_file() or (path.is_dir() and any(not f.name.startswith(".step-") for f in path.iterdir()))
    if foreign:
        raise SparseForgeError(f"{path} is not a training state of this release; delete it to start anew")
    return None


def load_state(path: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Any]:
    """Read the last of what :func:`save_state` wrote; nothing in it is executed, and a byte that changed since is
    noticed. Raises SparseForgeError on anything else.

    Args:
        like: name of a tensor in the state (``state/masters/3``) -> a DTensor to read this process's part of it as;
            None: it is read whole.
    """
    return _read(path, lambda found, packed: _unpack(packed, _tensors(found, like)))


def load_plain(path: Path) -> dict[str, Any]:
    """The same state, with None in the place of every tensor."""
    return _read(path, lambda _, packed: _unpack(packed, defaultdict[str, Any](lambda: None)))


def _read(path: Path, unpack: Callable[[Path, Any], Any]) -> Any:
    found = find_state(path)
    if found is None:
        raise SparseForgeError(f"{path} holds no training state: name the folder that a run left")
    try:
        text, digest = (found / PLAIN).read_text(encoding="utf-8").split("\n", 1)
        whole = hashlib.sha256(text.encode()).hexdigest() + "\n" == digest
        said: Any = json.loads(text) if whole else None
        whole = whole and isinstance(said, dict) and said.get("format") == FORMAT
        if whole and said["version"] == VERSION:
            if processes() == 1 or dist.get_rank() == 0:
                whole = said["files"] == {f.name: _digest(f) for f in found.iterdir() if f.name != PLAIN}
            if whole:
                return unpack(found, said["state"])
    except Exception as error:  # whatever foreign files make of the readers: there is no end to the list
        raise SparseForgeError(
            f"{found} is not a training state of sparseforge-fx ({one_line(error)}); {_instead(path)}"
        ) from error
    if not whole:
        raise SparseForgeError(f"{found} is not a training state of sparseforge-fx or is damaged; {_instead(path)}")
    raise SparseForgeError(
        f"{found} has version {said['version']}, this release reads {VERSION}; delete {path} to start anew"
    )


def _instead(path: Path) -> str:
    before = "go on from the one before it" if len(_steps(path)) > 1 else "start anew"
    return f"delete it to {before}"


def _steps(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if _STEP.fullmatch(f.name)) if path.is_dir() else []


def _tensors(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """All tensors in a folder, by name."""
    tensors: dict[str, Tensor] = {}
    for name, stored in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        wanted = like(name)
        size, dtype = stored.size, stored.properties.dtype  # type: ignore[union-attr]
        if wanted is not None and wanted.shape == size:
            tensors[name] = torch.empty_like(wanted, dtype=dtype)
        else:
            tensors[name] = torch.empty(size, dtype=dtype)
    if tensors:
        reader = HuggingFaceStorageReader(str(folder))
        with _plainly():
            dcp.load(tensors, storage_reader=reader, no_dist=processes() == 1)
    return tensors


@contextmanager
def _plainly() -> Iterator[None]:
    """What goes wrong on any process is raised as itself; one process alone is not worth a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- plain values ----------------------------------------------------------------------------------------------------
def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value as json can hold it, to the bit; its tensors go to ``tensors``, by their place in it."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(inner, tensors, f"{name}/{key}")] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(inner, tensors, f"{name}/{i}") for i, inner in enumerate(value)]}
    return value


def _unpack(packed: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in value}
    inside = [_unpack(inner, tensors) for inner in value]
    return tuple(inside) if kind == "tuple" else inside
