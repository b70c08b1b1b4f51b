"""Graph edits, and nothing else. Each pass is one file with one function ``(program, ...) -> PassResult``.

The order of the training passes, with the reason for each one's place, is the list below; the lowering passes will
stand beside it in a list of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sparseforge_fx.passes.base import Pass, PassRecord, PassResult, run_passes
from sparseforge_fx.passes.find_linears import LinearSite, find_linears
from sparseforge_fx.passes.harden_masks import harden_masks
from sparseforge_fx.passes.insert_hessian_hooks import insert_hessian_hooks
from sparseforge_fx.passes.insert_low_rank import insert_low_rank
from sparseforge_fx.passes.insert_soft_masks import insert_soft_masks
from sparseforge_fx.passes.merge_parallel_linears import merge_parallel_linears


def train_passes(sites: Sequence[LinearSite], *, slorb_block: int | None = None) -> list[Pass]:
    """The passes from a captured program to a trainable one."""
    passes: list[Pass] = [partial(insert_soft_masks, sites=sites)]  # first: the others look for its operator
    if slorb_block:
        passes.append(partial(insert_low_rank, block=slorb_block))  # reads the masks to fill S
    return passes  # insert_hessian_hooks runs on a copy of this result: the graph of the probe steps


__all__ = [
    "LinearSite",
    "Pass",
    "PassRecord",
    "PassResult",
    "find_linears",
    "harden_masks",
    "insert_hessian_hooks",
    "insert_low_rank",
    "insert_soft_masks",
    "merge_parallel_linears",
    "run_passes",
    "train_passes",
]
