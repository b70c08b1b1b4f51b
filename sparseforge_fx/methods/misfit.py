"""Does a value that was read from a file fit?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
