"""What a model's own code keeps of a call, and must not keep of a trace: tensors without data."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree


@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, what modules put into their attributes, or into dicts and lists there, is taken out again where
    it holds a FakeTensor: a table that is made at the first call, say. What stood there before comes back.

    Gives a list of the buffers that were new; of a trace that makes them torch.export (2.13) makes a wrong graph.
    """
    buffers: list[str] = []
    before = [(table, dict(table)) for table in _tables(model)]
    inside = [(held, held.copy()) for table, _ in before for held in table.values() if type(held) in (dict, list)]
    try:
        yield buffers
    finally:
        for table, values in before:
            for name, value in list(table.items()):
                if value is values.get(name) or not _is_fake(value):
                    continue
                if name in values:
                    table[name] = values[name]
                else:
                    del table[name]
                    buffers += [name] if "_buffers" not in table else []
        for held, copy in inside:
            if len(held) != len(copy) and _is_fake(held) and not _is_fake(copy):
                held.clear()
                held.update(copy) if isinstance(held, dict) else held.extend(copy)


def _tables(model: nn.Module) -> Iterator[MutableMapping[str, Any]]:
    for module in model.modules():
        yield module.__dict__
        yield module._buffers


def _is_fake(value: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(value))
