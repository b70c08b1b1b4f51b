"""Experts in a graph: transformers' own switch for how they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

#: one product for each stack of experts, whatever the routing: it can be traced, and it copies no weight
GROUPED = "grouped_mm"
#: likewise, by our operator where a stack is packed (deploy/lowering/sparse_modules.py)
PACKED = "sparseforge"


@contextmanager
def grouped_experts(model: nn.Module) -> Iterator[None]:
    """Within the block, the experts of transformers' models are computed by one grouped product for each stack, as they
    are by default; afterwards as the model's owner chose.

    A loop over the experts cannot be traced, and ``batched_mm`` gathers a copy of the weights for every token. Models
    that know no other way than theirs, and ways that cannot be left at run time, stay as they are.
    """
    changed: list[tuple[Any, Any]] = []
    try:
        for part in model.modules():
            if not hasattr(part, "get_experts_implementation") or not hasattr(part, "config"):
                continue
            before = part.get_experts_implementation()  # type: ignore[operator]
            if all(how in (GROUPED, PACKED, None) for how in before.values()):
                continue
            with suppress(ImportError, RuntimeError, ValueError):
                changed.append((part, before))
                wanted = {name: how if how == PACKED else GROUPED for name, how in before.items()}
                part.set_experts_implementation(wanted)  # type: ignore[operator]
        yield
    finally:
        for part, before in reversed(changed):
            with suppress(ImportError, RuntimeError, ValueError):
                part.set_experts_implementation(before)
