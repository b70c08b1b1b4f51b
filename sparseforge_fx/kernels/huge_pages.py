"""Weights on pages of 2 MiB: a product reads each weight once, and with pages of 4 KiB it also reads where they are.

In virtual machines looking that up costs most. Linux gives such pages to who asks for them (madvise, see
``/sys/kernel/mm/transparent_hugepage/enabled``); where it has none left, memory comes in small ones.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

PAGE = 2 << 20
REGION = 64 * PAGE  # of small weights; until one is full they exist twice
_ALIGNED = 64  # bytes, as torch's own memory is


def on_huge_pages(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same values in the same order, each a tensor of its own, close together; on CPUs alone.

    What is empty, strided, trained, shared with other processes or on another device is given as it is, and everything
    where the system has no such call, or refuses it. It reads ahead as much as fills a region, and gives it before it
    reads on.
    """
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        mine = _size([tensor])
        if waiting and size + mine > REGION:
            ready, waiting, size = _moved(waiting), [], 0
            yield from ready
        waiting.append(tensor)
        size += mine
    ready, waiting = _moved(waiting), []
    yield from ready


def _moves(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    plain = tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_shared()
    return plain and tensor.numel() > 0


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors if _moves(t))


def _moved(tensors: list[Tensor]) -> list[Tensor]:
    """In one region, which is kept by those that lie in it; less than a page stays where it is."""
    size = _size(tensors)
    if size < PAGE:
        return tensors
    try:
        memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that was built without such pages, or no room to copy to: they are where they were
        return tensors
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    found = []
    for old in tensors:
        new = old
        if _moves(old):
            new = torch.frombuffer(memory, dtype=old.dtype, count=old.numel(), offset=offset).view(old.shape)
            new.copy_(old)
            offset += _size([old])
        found.append(new)
    return found
