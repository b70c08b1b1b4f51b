"""Whether what a model and its teacher compute on their way can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.training.distillation import Distillation

ROWS = 1024  # of a table, that are compared
FOREIGN = 0.1  # relative squared difference, from which on a table is another; training an embedding moves it by less


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
        one, other = (tensor[:ROWS].detach().to("cpu", torch.float32) for tensor in (one, other))
        error = float((one - other).square().sum() / other.square().sum().clamp(min=1e-30))
        if error > FOREIGN:
            without = " and ".join([*["reconstruct=0"] * bool(blocks), *["no features"] * bool(features)])
            raise SparseForgeError(
                f"{name} of the teacher is another than the model's (relative squared difference {error:.2g}), as that "
                "of a model that was not rotated is: what the two compute on their way cannot be compared; pass "
                f"{without}, or a teacher in the model's own basis"
            )
