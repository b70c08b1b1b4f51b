"""What a run was started with, in few characters: a resumed run goes on only with the same weights and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_fx.data.batches import Batches, leaves
from sparseforge_fx.data.tokens import TokenData

SAMPLE = 1024  # entries of a tensor that are hashed as they are
CHUNK = 1 << 22  # bytes of a file at a time
BATCHES = 2  # of a user's own that are looked at
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def of_tensors(tensors: Mapping[str, Tensor], sample: int | None = SAMPLE) -> str:
    """12 hexadecimal digits that depend on names, shapes, dtypes and values, not on the device.

    Of each tensor a strided sample is hashed, and the sum of all entries' bits as integers: one pass at the speed of
    the memory, which a changed entry changes; a cryptographic hash of 7B weights would take a minute. ``sample`` None:
    all entries are hashed.
    """
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(tensors):
        tensor = tensors[name]  # one at a time: a mapping may fetch them
        value = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = value.detach().reshape(-1).view(_INTEGERS[value.element_size()])
        step = 1 if sample is None else max(1, bits.numel() // sample)
        total = int(bits.sum(dtype=torch.int64)) if bits.numel() else 0
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), total)).encode())
        digest.update(bits[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_file(file: Path, copy: Path | None = None) -> str:
    """Of all bytes of a file. They are written to ``copy`` on the way, so that a large file is read once."""
    digest = hashlib.blake2b(digest_size=6)
    with file.open("rb") as opened, nullcontext() if copy is None else copy.open("wb") as to:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            if to is not None:
                to.write(chunk)
    return digest.hexdigest()


def of_batches(batches: Batches) -> str | None:
    """Of token data all ids, with length and batch size; of a user's batches the first two.

    None where the same batch comes out different each time (augmentation that torch's seed does not reach): such a run
    cannot be recognised.
    """
    data = getattr(batches, "data", None)
    if isinstance(data, TokenData):
        return f"{data.fingerprint}-{len(batches.batch(0)['input_ids'])}"
    first = [_of_value(batches.batch(step)) for step in range(BATCHES)]
    return "-".join(first) if _of_value(batches.batch(0)) == first[0] else None


def _of_value(value: Any) -> str:
    """The tensors of a batch, by the way to them; of any other value its text is part of the name."""
    found = {}
    for path, leaf in leaves(value):
        name = "".join(f".{key}" for key in path)
        if isinstance(leaf, Tensor):
            found[name] = leaf
        elif isinstance(leaf, str | int | float | bool | None):
            found[f"{name}={leaf!r}"] = torch.empty(0, dtype=torch.uint8)
    return of_tensors(found)
