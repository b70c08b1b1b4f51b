"""The tensors of a checkpoint's safetensors files, one at a time: read without mapping a file, written in place.

The header is the format's (https://github.com/huggingface/safetensors#format): 8 bytes of length, then json.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import sync

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor stands: ``start`` and ``size`` in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """``places`` by name. Raises SparseForgeError for files that are missing or damaged, before anything is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = _files(folder)
        self.places: dict[str, Place] = {}
        self._written: set[Path] = set()
        for file in self.files:
            self.places |= _places(file)

    @property
    def bytes(self) -> int:
        return sum(place.size for place in self.places.values())

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory, in the file's dtype."""
        place = self.places[name]
        value = torch.empty(place.shape, dtype=place.dtype)
        with place.file.open("rb") as file:
            file.seek(place.start)
            if file.readinto(_memory(value)) != place.size:
                raise _damaged(place.file, f"it ends within {name}")
        return value

    def write(self, name: str, value: Tensor) -> None:
        """Over the tensor of that name, in the file's dtype."""
        place = self.places[name]
        assert tuple(value.shape) == place.shape, name
        with place.file.open("r+b") as file:
            file.seek(place.start)
            file.write(_memory(value.to(place.dtype).contiguous()))
        self._written.add(place.file)

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        while self._written:
            sync(self._written.pop())


def _memory(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, "it is no index of weights") from error
    else:
        names = [SINGLE]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise SparseForgeError(f"{folder} lacks {absent[0]}: fetch the checkpoint's safetensors files, all of them")
    return [folder / name for name in names]


def _places(file: Path) -> dict[str, Place]:
    try:
        with safe_open(file, "np"):  # the checks of the library; for "pt" it would map all of it as memory of our own
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise _damaged(file, str(error).strip().rstrip(".")) from error
    header.pop("__metadata__", None)
    if strange := [name for name, entry in header.items() if entry["dtype"] not in DTYPES]:
        raise SparseForgeError(f"{strange[0]} in {file} is {header[strange[0]]['dtype']}: give a dense checkpoint")
    found, front = {}, 8 + length
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Place(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), front + start, end - start)
    return found


def _damaged(file: Path, why: str) -> SparseForgeError:
    return SparseForgeError(f"{file} is damaged ({why}): fetch it again")
