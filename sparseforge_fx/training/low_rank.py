"""SLoRB's branches in training: where they may stand, where they start, what masks hand over to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.passes.find_linears import eligible

NARROWEST = 16  # block that a preset's may shrink to: the smallest that AST and SparseForge take


def check_sites(program: Program, sites: Sequence[LinearSite]) -> None:
    """Raise SparseForgeError, naming the weight, where a branch could not stay beside the linear after training."""
    assert program.source is not None
    modules = dict(program.source.named_modules())
    nodes = {node.name: node for node in program.graph.nodes}
    for site in eligible(sites):
        name, _, leaf = site.fqn.rpartition(".")
        owner = modules.get(name)
        stacks = [nodes[use.node].meta.get("nn_module_stack") or {"": ("", "")} for use in site.uses]
        reason = None
        if type(owner) not in (nn.Linear, Conv1D) or leaf != "weight":
            reason = f"it belongs to a {type(owner).__name__}, no plain nn.Linear or Conv1D"
        elif site.ties:
            reason = f"it is also {site.ties[0]}"
        elif any(modules.get(list(stack.values())[-1][0]) is not owner for stack in stacks):
            reason = "it is used without calling its module"
        if reason:
            raise SparseForgeError(f"slorb_block: {site.fqn} can have no low-rank branch, {reason}: exclude it")


def fitting_block(program: Program, sites: Sequence[LinearSite], block: int) -> tuple[int | None, list[str]]:
    """The largest divisor of ``block`` that divides every site's inputs, None where a branch cannot stand or would be
    narrower than ``NARROWEST``; and a sentence where it is not ``block``."""
    try:
        check_sites(program, sites)
    except SparseForgeError as error:
        return None, [f"the preset's slorb_block {block} is left out: {str(error).removeprefix('slorb_block: ')}"]
    found = math.gcd(block, *(site.in_features for site in eligible(sites)))
    if found == block:
        return block, []
    if found < NARROWEST:
        return None, [f"the preset's slorb_block {block} is left out: it does not divide the inputs of every linear"]
    return found, [f"slorb_block is {found} in the place of the preset's {block}, which does not divide all inputs"]


@dataclass
class Branch:
    """What training knows of a branch: the weight it stands beside, its S [out, in / block], written in place."""

    weight: MaskedWeight
    s: Tensor

    def means(self) -> Tensor:
        """Mean over each block of the masked weight, [out, in / block], float32."""
        w = self.weight
        masked = (w.weight.detach() * w.mask).movedim(w.dim, -1)
        return masked.unflatten(-1, (self.s.shape[1], -1)).mean(-1, dtype=torch.float32)


@contextmanager
def handed_over(branches: Sequence[Branch], wanted: Callable[[], bool]) -> Iterator[None]:
    """What the block takes from the masked weights goes to S, as the mean of every block of inputs.

    From a mask of ones to a hard one this is AST's eq. 6, S = mean of W (1 - m); masks that harden by and by hand over
    the same in parts. ``wanted()`` says after the block whether to.
    """
    before = [b.means() for b in branches]
    yield
    if branches and wanted():
        with torch.no_grad():
            for b, mean in zip(branches, before, strict=True):
                b.s += (mean - b.means()).to(b.s.dtype)
