"""What a pass is, and the runner that keeps passes honest."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import Layout
from sparseforge_fx.passes.dump import Dump
from sparseforge_fx.passes.find_linears import LinearSite

DUMP_VARIABLE = "SPARSEFORGE_DUMP"
P = TypeVar("P", bound=Program)
log = logging.getLogger(__name__)


class PassResult(NamedTuple):
    """The program after a pass, and how many nodes or tensors it changed (0: untouched)."""

    program: Program
    modified: int


Pass = Callable[[Program], PassResult]
#: a graph -> its linears, those that are not to be touched with their reason
Find = Callable[[Program], list[LinearSite]]
#: sites -> the layout of each that is to be packed, by the weight's name; the others get a reason
Choose = Callable[[Sequence[LinearSite]], Mapping[str, Layout]]


class PassRecord(NamedTuple):
    """One line of the log: the pass, its count, and the operators whose number changed (negative: removed)."""

    name: str
    modified: int
    op_changes: dict[str, int]


def run_passes(
    program: P, passes: Iterable[Pass], dump: str | Path | None = None
) -> tuple[P, list[PassRecord]]:
    """Run ``passes`` in order on a copy of ``program``; the graph given is left as it was, tensors are shared.

    After each pass the program is linted, recompiled and checked against its signature. A pass is one function
    ``(program) -> PassResult``; its options are bound (functools.partial) when the list is built.

    Args:
        dump: a folder for the graph before and after each pass, and a summary; None: the one that the environment
            variable SPARSEFORGE_DUMP names, if it is set. What is in it stays: numbers go on.
    """
    folder = dump or os.environ.get(DUMP_VARIABLE)
    written = Dump(Path(folder)) if folder else None
    program = program.copy()
    records = []
    for one in passes:
        name = getattr(one, "func", one).__name__  # type: ignore[attr-defined]
        if written is not None:
            written.before(name, program)
        before = program.op_counts()
        result, modified = one(program)
        program = cast(P, result)  # a pass edits what it is given
        program.validate()
        changes = _difference(before, program.op_counts())
        records.append(PassRecord(name, modified, changes))
        if written is not None:
            written.after(program, modified, changes)
        log.info("%s: %d changed, %s", name, modified, changes)
    return program, records


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    return {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
