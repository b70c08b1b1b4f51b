"""Which packed layout a device's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import Packed
from sparseforge_fx.kernels.planes_linear import as_planes, tune_planes
from sparseforge_fx.passes.lower_sparse_linears import as_rows


class Target(NamedTuple):
    """The packed layout of a device.

    Attributes:
        convert: a packed weight -> (values, meta) in this layout.
        tune: (values, meta, in_features, rows of x): search the kernel's configuration before it is timed.
    """

    layout: str
    convert: Callable[[Packed], tuple[Tensor, Tensor]]
    tune: Callable[[Tensor, Tensor, int, int], object] = lambda *_: None


TARGETS = {"cpu": Target("rows", as_rows), "cuda": Target("planes", as_planes, tune_planes)}


def find_target(name: str, device: torch.device) -> Target:
    """The target of that name; ``auto``: that of the device which the weights are on."""
    if name not in ("auto", *TARGETS):
        raise SparseForgeError(f"unknown target {name!r}; choose auto, {', '.join(TARGETS)}")
    kind = device.type if name == "auto" else name
    if kind not in TARGETS:
        raise SparseForgeError(f"there are no sparse kernels for {kind}; move the model to one of {', '.join(TARGETS)}")
    if kind != device.type:
        raise SparseForgeError(f"the model is on {device.type} and the target is {kind}: move the model first")
    return TARGETS[kind]
