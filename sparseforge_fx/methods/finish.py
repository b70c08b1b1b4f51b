"""What follows a layer-wise solution: blocks that learn, values in few bits, and blocks that learn with these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.layerwise import round_layer_by_layer
from sparseforge_fx.methods.on_grid import OnGrid
from sparseforge_fx.methods.reconstruct import reconstructed
from sparseforge_fx.methods.weights import MaskedWeight


def finish(
    program: Program,
    weights: Sequence[MaskedWeight],
    batches: Sequence[Reading],
    grid: OnGrid | None,
    dense: GraphModule | None,
    *,
    epochs: int,
    lr: float,
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Write a solution's weights anew, masks as they are.

    Args:
        program: the soft-masked one over ``weights``.
        grid: what weights are to be put on; it then has their scales. None: they stay floats.
        dense: flat module of the dense model over tensors of its own, that blocks are to come near to; None: they do
            not learn.
        epochs, lr: of :func:`reconstruct_blocks`.

    Returns what the report says of the blocks, notes by weight, and notes.
    """
    report: dict[str, Any] = {}
    notes: list[str] = []
    told: dict[str, str] = {}
    if dense is not None:
        how: dict[str, Any] = {"epochs": epochs, "lr": lr}
        report["reconstruction"], notes = reconstructed(program, dense, batches, weights, **how)
    if grid is not None:
        _, told = round_layer_by_layer(program, weights, batches, grid.formats, seen=grid.start)
        if dense is not None and report["reconstruction"]:
            found, more = reconstructed(program, dense, batches, weights, **how, grid=grid)
            report["rounded_reconstruction"] = found
            notes += [f"rounded: {note}" for note in more]
    return report, told, notes
