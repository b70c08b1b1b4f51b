"""What a model holds beside the graph, which shows none of it: what shares memory with its weights and is not one of
their names, and what the graph does not read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes.globs import Globs, matches

#: what nn.Module itself keeps; its parameters are the names of weights, modules are visited anyway
INTERNAL = {"_parameters", "_modules"}


class Holder(NamedTuple):
    """A place that a tensor is held at."""

    owner: nn.Module
    path: str  # of the owner
    name: str
    tensor: Tensor
    parameter: bool

    @property
    def fqn(self) -> str:
        return f"{self.path}.{self.name}".strip(".")

    def __str__(self) -> str:
        owner = f"module {self.path}" if self.path else "the model"
        return f"{'parameter' if self.parameter else 'attribute'} {self.name} of {owner}"


class Aliases:
    """The tensors of ``model`` by storage: parameters, buffers, and attributes that hold tensors or lists, tuples, sets
    and dicts of them, or modules that are registered nowhere.

    ``read``: names of tensors that the graph reads. A Parameter that is read is no alias, and neither is the same one
    in another module of the same class: a tie, used alike, whose names the program lists. In a module of another class
    that the graph does not call (a table, a head of ``generate``) it is something else.
    """

    def __init__(self, model: nn.Module | None, read: Collection[str] = ()):
        self.by_storage: dict[int, list[Holder]] = defaultdict(list)
        for holder in () if model is None else _walk(model, "", set()):
            if holder.tensor.layout == torch.strided:
                self.by_storage[_storage(holder.tensor)].append(holder)
        modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
        self.read = {(id(modules.get(parent)), leaf) for parent, _, leaf in (name.rpartition(".") for name in read)}

    def of(self, weight: Tensor, fqn: str) -> str | None:
        """What else sees a change of the weight of that name: "attribute w_copy of module head", or None."""
        start, end = _span(weight)
        held = [h for h in self.by_storage.get(_storage(weight), ()) if _meets(h.tensor, start, end)]
        read = [h for h in held if h.parameter and (id(h.owner), h.name) in self.read]
        alike = {(type(h.owner), h.name, id(h.tensor)) for h in read}
        aliases = [h for h in held if not h.parameter or (type(h.owner), h.name, id(h.tensor)) not in alike]
        if not aliases:
            return None
        # the trace reads a tie under one of its names, whichever module it called
        return next(str(h) for h in (*aliases, *held) if h.fqn != fqn)


class Elsewhere:
    """Other ways through the model of ``program`` than the one that was captured: a head that training alone calls, an
    adapter that is not active, the tower of inputs that the example lacks. They need the values where they were.

    Args:
        exclude: globs over the names of what may be left without them.
    """

    def __init__(self, program: Program, exclude: Globs = ()):
        lifted = {f: v for node, f, v in program.lifted() if node.users and v.layout == torch.strided}
        self.aliases = Aliases(program.source, lifted)
        storages = {_storage(value) for value in lifted.values()}
        unread = [
            holders[0]
            for storage, holders in self.aliases.by_storage.items()
            if storage not in storages and not any(h.fqn in lifted for h in holders)  # a shard has another storage
        ]
        self.unread = {
            h.fqn: tuple(h.tensor.shape) for h in unread if h.tensor.is_floating_point() and not matches(h.fqn, exclude)
        }

    def shares(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Of the first of these, by name, that is held at another place, too: where; None if none is."""
        held = ((fqn, self.aliases.of(value, fqn)) for fqn, value in tensors.items())
        return next((f"{fqn} shares memory with {alias}" for fqn, alias in held if alias is not None), None)

    def may_see(self, width: int) -> str | None:
        """What may read or write vectors of this width there: it has their size, or a multiple (of several at once);
        None if nothing does."""
        names = [n for n, shape in self.unread.items() if any(size and size % width == 0 for size in shape)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told = f"{', '.join(names[:3])}{more}, which the captured forward does not read, may meet these vectors"
        return f"{told} ({width} wide)" if names else None


def _meets(tensor: Tensor, start: int, end: int) -> bool:
    first, last = _span(tensor)
    return first < end and start < last


def _walk(root: nn.Module, prefix: str, seen: set[int]) -> Iterator[Holder]:
    """Registered modules first, by their own paths: attributes may lead to the same ones."""
    tree = [(f"{prefix}.{path}".strip("."), m) for path, m in root.named_modules() if id(m) not in seen]
    seen.update(id(module) for _, module in tree)
    for path, module in tree:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Holder(module, path, name, parameter, True)
        for name, value in vars(module).items():
            if name in INTERNAL:
                continue
            for where, item in _items(value, name, seen):
                where = where.removeprefix("_buffers.")
                if isinstance(item, Tensor):
                    yield Holder(module, path, where, item, False)
                else:
                    yield from _walk(item, f"{path}.{where}", seen)


def _items(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor | nn.Module]]:
    if isinstance(value, Tensor | nn.Module):
        yield name, value
    elif isinstance(value, list | tuple | set | dict) and id(value) not in seen:  # a dict may hold itself
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _items(item, f"{name}.{key}", seen)


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
