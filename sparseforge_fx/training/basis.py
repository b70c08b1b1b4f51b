"""Whether what a model and its teacher compute on their way can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.training.distillation import Distillation, relative_error

ROWS = 1024  # of a table, that are compared
FEW = 64  # rows of a table that says nothing of angles
FOREIGN = 0.5  # relative squared difference, from which on a table is another's; training an embedding moves it by less
#: how much less than the rows their inner products differ where a table was turned; training changes both
TURNED = 0.01
SAME = 1e-4  # relative squared difference of what is rounded to bfloat16, and more


def check_basis(
    sites: Sequence[LinearSite],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor] | None,
    config: MethodConfig,
    objective: Distillation | None,
) -> None:
    """Raise SparseForgeError where values inside the model are to come near to those of a teacher that has others.

    A model of before ``sf.rotate`` answers as the rotated one does, and nothing on the way is the same: embeddings,
    which no linear reads, tell.

    Args:
        sites: all linears of the model.
        ours, theirs: by the same names, the model's tensors, and the parameters of a teacher that was given.
        objective: None where nothing trains.
    """
    blocks, features = getattr(config, "reconstruct", 0), objective is not None and objective.features
    if theirs is None or not (blocks or features):
        return
    # a table that something else reads is one of these, unless it is pruned
    linear = {name for s in sites if s.reason is None or not s.readers for name in (s.fqn, *s.ties)}
    for name in theirs:
        one, other = (None, None) if name in linear or name not in ours else (ours[name], theirs[name])
        if one is None or other is None or not one.is_floating_point() or one.dim() < 2 or one.is_meta:
            continue
        one, other = (tensor[:ROWS].detach().to("cpu", torch.float32).flatten(1) for tensor in (one, other))
        error = float(relative_error(one, other))
        if error > FOREIGN or (error > SAME and _turned(one, other) < TURNED * error):
            without = " and ".join([*["reconstruct=0"] * bool(blocks), *["no features"] * bool(features)])
            raise SparseForgeError(
                f"{name} of the teacher is another than the model's (relative squared difference {error:.2g}), as that "
                "of a model that was not rotated is: what the two compute on their way cannot be compared; pass "
                f"{without}, or a teacher in the model's own basis"
            )


def _turned(one: Tensor, other: Tensor) -> float:
    """Of the inner products of rows [rows, width], which a rotation leaves as they are: from those of the table, or of
    what a LayerNorm sees of it, which is what some rotations begin with. Without what all rows have in common."""
    if len(one) < FEW:
        return float("inf")
    products = [t @ t.t() for t in (t - t.mean(0) for t in (one, other, other - other.mean(1, keepdim=True)))]
    return min(float(relative_error(products[0], product)) for product in products[1:])
