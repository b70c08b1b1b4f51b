"""Layer-wise pruning by OBS: every weight is solved on inputs that the already pruned prefix produced (SparseGPT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparseforge_fx.calibrate import layer_by_layer
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.methods.base import MaskedWeight
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.pattern import AnyPattern, hard_mask
from sparseforge_fx.program import Program


@contextmanager
def undone_on_error(weights: Sequence[MaskedWeight]) -> Iterator[dict[str, Tensor]]:
    """Gives copies of the weights, and puts them back (with masks of one) if what follows fails half-way."""
    dense = {w.fqn: w.weight.detach().clone() for w in weights}
    try:
        yield dense
    except BaseException:
        with torch.no_grad():
            for w in weights:
                w.weight.copy_(dense[w.fqn])
                w.mask.fill_(1)
        raise


@torch.no_grad()
def compensate(
    program: Program,
    weights: Sequence[MaskedWeight],
    batches: Sequence[Any],
    pattern: AnyPattern,
    *,
    choose_masks: bool = True,
    damping: float = 0.01,
) -> dict[str, float]:
    """Prune every weight of ``program`` in graph order and let its survivors compensate; weights and masks are written.

    Args:
        batches: calibration inputs, in any form that the captured model takes.
        choose_masks: False keeps the N largest entries of each group of the present masks.

    Returns the dampings that had to be raised, by weight. Memory: what is alive at one point of the graph, for all
    batches, and one
    [in, in] matrix.
    """
    by_name = {w.fqn: w for w in weights}
    raised: dict[str, float] = {}

    def visit(name: str, moments: Tensor) -> None:
        w = by_name[name]
        value, mask = (w.weight.t(), w.mask.t()) if w.dim == 0 else (w.weight, w.mask)
        fixed = None if choose_masks else hard_mask(mask, pattern)
        result = prune_obs(value, moments, pattern, mask=fixed, damping=damping)
        value.copy_(result.weight)
        mask.copy_(result.mask)
        if result.damping > damping:
            raised[name] = result.damping

    module = program.module()
    nodes = {n: (str(n.args[1].target), 0) for n in module.graph.find_nodes(op="call_function", target=OP)}
    layer_by_layer(module, {n: w for n, w in nodes.items() if w[0] in by_name}, batches, visit)
    return raised
