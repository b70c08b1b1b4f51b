"""How a measured number is written, on a page and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_error(value: float, error: float | None, shown: str) -> str:
    """With its standard error, if there is one that is a number."""
    return shown.format(value) + (f" ± {shown.format(error)}" if error is not None and error == error else "")


def paired_text(test: Mapping[str, Any] | None) -> str:
    """Of the answers to a task: percent, and how likely that is by chance."""
    return "" if not test else f"{100 * test['difference']:+.1f} (p = {test['p']:.2g})"
