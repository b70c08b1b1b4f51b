"""``--set name=value`` of the command line."""

from __future__ import annotations

import typing
from typing import Any

from sparseforge_fx.errors import SparseForgeError


def read_assignments(assignments: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """``--set name=value`` as values of the types that the method declares."""
    out: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or name not in options:
            raise SparseForgeError(f"--set {text}: write NAME=VALUE with one of {', '.join(options) or 'no option'}")
        kinds = [k for k in typing.get_args(options[name]) or (options[name],) if k is not type(None)]
        try:
            if kinds == [bool]:
                out[name] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif kinds in ([int], [float], [str]):
                out[name] = kinds[0](value)
            elif value not in kinds:
                raise ValueError(value)
            else:
                out[name] = value
        except (ValueError, KeyError) as error:
            single = kinds[0] if len(kinds) == 1 else None
            expected = (
                f"of type {single.__name__}" if isinstance(single, type) else f"one of {', '.join(map(str, kinds))}"
            )
            raise SparseForgeError(f"--set {text}: the value must be {expected}") from error
    return out
