"""Graph edits, and nothing else. Each pass is one file with one function ``(program, ...) -> PassResult``.

Every ordered list of passes that the product runs is one of the six functions below, each pass with the reason for its
place. ``run_passes`` runs a list; SPARSEFORGE_DUMP=folder in the environment writes what each pass did to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sparseforge_fx.passes.base import Choose, Find, Pass, PassRecord, PassResult, run_passes
from sparseforge_fx.passes.differentiate_attention import differentiate_attention
from sparseforge_fx.passes.expand_sparse_linears import expand_sparse_linears
from sparseforge_fx.passes.find_linears import LinearSite, find_linears
from sparseforge_fx.passes.fuse_epilogues import fuse_epilogues
from sparseforge_fx.passes.harden_masks import harden_masks
from sparseforge_fx.passes.inline_kernels import inline_kernels
from sparseforge_fx.passes.insert_expert_counters import insert_expert_counters
from sparseforge_fx.passes.insert_hessian_hooks import insert_hessian_hooks
from sparseforge_fx.passes.insert_low_rank import insert_low_rank
from sparseforge_fx.passes.insert_soft_masks import insert_soft_masks
from sparseforge_fx.passes.lower_attention import lower_attention
from sparseforge_fx.passes.lower_sparse_linears import lower_sparse_linears
from sparseforge_fx.passes.merge_parallel_linears import merge_parallel_linears
from sparseforge_fx.pattern import AnyPattern


def train_passes(
    sites: Sequence[LinearSite],
    *,
    slorb_block: int | None = None,
    estimator: str | None = None,
    counted: bool = False,
    mask: Callable[[Tensor], Tensor] = torch.ones_like,
) -> list[Pass]:
    """From a captured program to a trainable one.

    Each pass leaves alone what is there already: with an ``estimator``, on a program that came out of this list without
    one, it gives the twin of the probe steps over the same weights, masks and branches; ``counted``: with counters of
    the experts' tokens. ``mask`` makes the masks.
    """
    passes: list[Pass] = [partial(insert_soft_masks, sites=sites, make=mask)]  # first: the others look for its operator
    if slorb_block is not None:
        passes.append(partial(insert_low_rank, block=slorb_block))  # beside a masked linear; its own are not masked
    if estimator is not None:
        passes.append(partial(insert_hessian_hooks, estimator=estimator))  # late: an argument of the masked linears
    if counted:
        passes.append(insert_expert_counters)  # last: the argument behind all others
    return passes


def step_passes() -> list[Pass]:
    """From a trainable program to what a training step runs; what is deployed is made of the trainable one."""
    return [differentiate_attention]


def harden_passes(pattern: AnyPattern) -> list[Pass]:
    """From a trained program to exact weights and plain linears."""
    return [partial(harden_masks, pattern=pattern)]  # takes masks and probes out; branches stay


def deploy_passes(find: Find, choose: Choose, *, fuse: bool = True) -> list[Pass]:
    """From a program with 2:4 weights to packed operators.

    Both functions are asked when a pass runs: ``find`` for the linears of the graph as it is then, ``choose`` for the
    layouts of those that are to be packed.
    """
    passes: list[Pass] = [
        partial(merge_parallel_linears, find=find),  # first: it is the merged shapes that are timed and packed
        partial(lower_sparse_linears, find=find, choose=choose),
    ]
    if fuse:
        passes.append(fuse_epilogues)  # last: looks for the operator that the pass before puts in
    return passes


def export_passes() -> list[Pass]:
    """From packed operators to a file that runs without ours; after :func:`deploy_passes` with ``fuse=False``."""
    return [expand_sparse_linears]  # leaves operators with an activation in them alone


def package_passes(device: str) -> list[Pass]:
    """From packed operators to a compiled package that runs without Python on that kind of device."""
    if device == "cpu":  # our kernels are linked in
        return [lower_attention]
    return [inline_kernels]  # after fusing: the kernels take bias and activation


__all__ = [
    "Choose",
    "Find",
    "LinearSite",
    "Pass",
    "PassRecord",
    "PassResult",
    "deploy_passes",
    "differentiate_attention",
    "expand_sparse_linears",
    "export_passes",
    "find_linears",
    "fuse_epilogues",
    "harden_masks",
    "harden_passes",
    "inline_kernels",
    "insert_hessian_hooks",
    "insert_low_rank",
    "insert_soft_masks",
    "lower_attention",
    "lower_sparse_linears",
    "merge_parallel_linears",
    "package_passes",
    "run_passes",
    "step_passes",
    "train_passes",
]
