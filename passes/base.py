"""What a pass is, and the runner that keeps passes honest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar, cast

from sparseforge_fx.graph.program import Program

P = TypeVar("P", bound=Program)
log = logging.getLogger(__name__)


class PassResult(NamedTuple):
    """The program after a pass, and how many nodes or tensors it changed (0: untouched)."""

    program: Program
    modified: int


Pass = Callable[[Program], PassResult]


class PassRecord(NamedTuple):
    """One line of the log: the pass, its count, and the operators whose number changed (negative: removed)."""

    name: str
    modified: int
    op_changes: dict[str, int]


def run_passes(program: P, passes: Iterable[Pass]) -> tuple[P, list[PassRecord]]:
    """Run ``passes`` in order on a copy of ``program``; the graph given is left as it was, tensors are shared.

    After each pass the program is linted, recompiled and checked against its signature. A pass is one function
    ``(program) -> PassResult``; its options are bound (functools.partial) when the list is built.
    """
    program = program.copy()
    records = []
    for one in passes:
        before = program.op_counts()
        result, modified = one(program)
        program = cast(P, result)  # a pass edits what it is given
        program.validate()
        changes = _difference(before, program.op_counts())
        name = getattr(one, "func", one).__name__  # type: ignore[attr-defined]
        records.append(PassRecord(name, modified, changes))
        log.info("%s: %d changed, %s", name, modified, changes)
    return program, records


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    return {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
