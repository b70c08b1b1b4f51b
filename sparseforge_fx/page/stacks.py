"""The experts of a mixture as tables: a line for every stack, and behind it one for every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sparseforge_fx.page.facts import Json, Table

MOST = 5_000  # lines about single experts; more would be megabytes, which report.json has anyway


def of_stacks(report: Json) -> list[Table]:
    """What the experts of each stack were judged by; no table where there are none."""
    stacks = report.get("experts") or {}
    with_errors = any(map(_errors, stacks.values()))
    rows = [_line(name, of_one, with_errors) for name, of_one in stacks.items()]
    errors = ["median error", "largest"] if with_errors else []
    head = ("stack", "experts", "fewest tokens", "median", "most", *errors, "by magnitude")
    caption = "Experts of each stack, and the tokens that they were judged by"
    return [Table(caption, head, rows, range(1, len(head) - 1))] if rows else []


def of_experts(report: Json) -> list[Table]:
    """The same of every single expert, by stack; nothing where they are more than :data:`MOST`."""
    stacks = report.get("experts") or {}
    count = sum(len(of_one["tokens"]) for of_one in stacks.values())
    return [_each(name, of_one) for name, of_one in stacks.items()] if count <= MOST else []


def _errors(of_one: Mapping[str, Any]) -> list[float]:
    return [e for e in of_one.get("error") or () if e is not None]


def _line(name: str, of_one: Mapping[str, Any], with_errors: bool) -> Sequence[str]:
    tokens, errors = of_one["tokens"], _errors(of_one)
    counts = [f"{n:,.0f}" for n in (len(tokens), min(tokens), median(tokens), max(tokens))]
    shares = [f"{median(errors):.1%}", f"{max(errors):.1%}"] if errors else ["", ""]
    few = of_one.get("by_magnitude", [])
    return (name, *counts, *(shares if with_errors else []), ", ".join(map(str, few)) or "none")


def _each(name: str, of_one: Mapping[str, Any]) -> Table:
    few = set(of_one.get("by_magnitude", []))
    errors = of_one.get("error") or [None] * len(of_one["tokens"])
    rows = [
        (str(e), f"{seen:,}", "" if error is None else f"{error:.1%}", "yes" if e in few else "")
        for e, (seen, error) in enumerate(zip(of_one["tokens"], errors, strict=True))
    ]
    return Table(name, ("expert", "tokens", "error", "by magnitude"), rows, (1, 2))
