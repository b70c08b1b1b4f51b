"""What in a model shares memory with its weights and is not one of their names: the graph shows none of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: what nn.Module itself keeps; its parameters are the names of weights, modules are visited anyway
INTERNAL = {"_parameters", "_modules"}


class Aliases:
    """The tensors of ``model`` by storage: buffers, and attributes that hold tensors or lists, tuples and dicts of
    them. A Parameter that several modules register is no alias of itself but a tie: the program lists its names."""

    def __init__(self, model: nn.Module | None):
        self.by_storage: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for path, module in () if model is None else model.named_modules():
            owner = f"module {path}" if path else "the model"
            for name, value in vars(module).items():
                if name not in INTERNAL:
                    for where, tensor in _tensors(value, name):
                        where = where.removeprefix("_buffers.")
                        self.by_storage[_storage(tensor)].append((f"attribute {where} of {owner}", tensor))
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.by_storage[_storage(parameter)].append((f"parameter {name} of {owner}", parameter))

    def of(self, weight: Tensor, read: Container[int]) -> str | None:
        """What else sees a change of ``weight``: "attribute w_copy of module head", or None.

        ``read``: identities of tensors that the graph reads; parameters among them are ties.
        """
        start, end = _span(weight)
        for where, tensor in self.by_storage.get(_storage(weight), ()):
            if where.startswith("parameter") and (tensor is weight or id(tensor) in read):
                continue
            first, last = _span(tensor)
            if first < end and start < last:
                return where
        return None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield name, value
    elif isinstance(value, list | tuple | set | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # meta tensors have one, too


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one behind the last."""
    length = (
        sum((int(n) - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if tensor.numel()
        else 0
    )
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + length * tensor.itemsize
