"""Graph edits, and nothing else. Each pass is one file with one function ``(program, ...) -> PassResult``.

The two orders, with the reason for each pass's place, are the lists below: into the trainable program, and into the
deployed one. ``merge_parallel_linears`` comes before the second: the cost gate has to see the shapes that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sparseforge_fx.kernels.layouts import ROWS, Layout
from sparseforge_fx.passes.base import Pass, PassRecord, PassResult, run_passes
from sparseforge_fx.passes.expand_sparse_linears import expand_sparse_linears
from sparseforge_fx.passes.find_linears import LinearSite, find_linears
from sparseforge_fx.passes.fuse_epilogues import fuse_epilogues
from sparseforge_fx.passes.harden_masks import harden_masks
from sparseforge_fx.passes.inline_kernels import inline_kernels
from sparseforge_fx.passes.insert_hessian_hooks import insert_hessian_hooks
from sparseforge_fx.passes.insert_low_rank import insert_low_rank
from sparseforge_fx.passes.insert_soft_masks import insert_soft_masks
from sparseforge_fx.passes.lower_sparse_linears import lower_sparse_linears
from sparseforge_fx.passes.merge_parallel_linears import merge_parallel_linears
from sparseforge_fx.pattern import AnyPattern


def train_passes(
    sites: Sequence[LinearSite], *, slorb_block: int | None = None, estimator: str | None = None
) -> list[Pass]:
    """The passes from a captured program to a trainable one."""
    passes: list[Pass] = [partial(insert_soft_masks, sites=sites)]  # first: the others look for its operator
    if slorb_block is not None:
        passes.append(partial(insert_low_rank, block=slorb_block))  # looks for its operator, too
    if estimator is not None:
        passes.append(partial(insert_hessian_hooks, estimator=estimator))  # type: ignore[arg-type]
    return passes


def harden_passes(pattern: AnyPattern) -> list[Pass]:
    """The passes from a trained program to exact weights."""
    return [partial(harden_masks, pattern=pattern)]


def deploy_passes(
    sites: Sequence[LinearSite], layout_of: Callable[[LinearSite], Layout] = lambda _: ROWS, *, fuse: bool = True
) -> list[Pass]:
    """The passes from a program with exactly 2:4 weights to packed operators; ``sites`` are chosen after merging."""
    passes: list[Pass] = [partial(lower_sparse_linears, sites=sites, layout_of=layout_of)]
    if fuse:
        passes.append(fuse_epilogues)  # looks for the operator that the pass before puts in
    return passes  # for a graph without our operators: no fusing, expand_sparse_linears instead


__all__ = [
    "LinearSite",
    "Pass",
    "PassRecord",
    "PassResult",
    "deploy_passes",
    "expand_sparse_linears",
    "find_linears",
    "fuse_epilogues",
    "harden_masks",
    "harden_passes",
    "inline_kernels",
    "insert_hessian_hooks",
    "insert_low_rank",
    "insert_soft_masks",
    "lower_sparse_linears",
    "merge_parallel_linears",
    "run_passes",
    "train_passes",
]
