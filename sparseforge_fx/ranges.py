"""What numbers may be, written at the fields and arguments that take them: ``damping: Positive = 0.01``."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from functools import wraps
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from sparseforge_fx.errors import SparseForgeError

F = TypeVar("F", bound=Callable[..., Any])


class Range(NamedTuple):
    """From ``least`` (or only above it) up to ``most``; never NaN nor infinite."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        """Is the value finite and inside?"""
        enough = value > self.least if self.above else value >= self.least
        return (isinstance(value, int) or math.isfinite(value)) and enough and value <= self.most

    def __str__(self) -> str:
        low = "" if self.least == -math.inf else f" {'above' if self.above else 'from'} {self.least:g}"
        return low + ("" if self.most == math.inf else f"{' and' if self.above else ''} up to {self.most:g}")


Count = Annotated[int, Range(1)]
CountFromZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
AtLeastZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
Seed = Annotated[int, Range(-(2**63), 2**64 - 1)]  # torch's


def check_numbers(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise a SparseForgeError for the first value that is not what its type says: a finite number in its range, or a
    truth value.

    Args:
        hints: name -> type with its extras (``get_type_hints(..., include_extras=True)``); others than these are
            passed over, and None is taken where the type allows it.
        values: name -> value; names that have no hint are passed over.
    """
    for name, hint in hints.items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
        if name not in values or (values[name] is None and type(None) in kinds):
            continue
        if isinstance(values[name], str) and str in kinds:
            continue
        for kind in kinds:
            base, limits = (get_args(kind)[0], get_args(kind)[1]) if get_origin(kind) is Annotated else (kind, Range())
            if base in (int, float):
                _check(name, values[name], base, limits)
            elif base is bool and set(kinds) <= {bool, type(None)} and not isinstance(values[name], bool | np.bool_):
                raise SparseForgeError(f"{name} is {values[name]!r}: give True or False")  # any text counts as true


def _check(name: str, value: Any, base: type, limits: Range) -> None:
    kind = numbers.Integral if base is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not limits.holds(value):  # type: ignore[arg-type]
        wanted = "a whole number" if base is int else "a finite number"
        raise SparseForgeError(f"{name} is {value!r}: give {wanted}{limits}")


def checked(function: F) -> F:
    """``function``, refusing numbers and truth values that its annotations do not allow before it does anything."""
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        check_numbers(hints, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return guarded  # type: ignore[return-value]
