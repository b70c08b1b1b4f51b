"""Which packed layouts a device has kernels for."""

from __future__ import annotations

import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import CUSPARSELT, CUTLASS, PLANES, ROWS, Layout

#: device type -> layouts; the first serves every batch, and is taken where nothing is measured
TARGETS = {"cpu": (ROWS,), "cuda": (PLANES, CUSPARSELT, CUTLASS)}


def find_target(name: str, device: torch.device) -> tuple[Layout, ...]:
    """The layouts of the target of that name; ``auto``: that of the device which the weights are on."""
    if name not in ("auto", *TARGETS):
        raise SparseForgeError(f"unknown target {name!r}; choose auto, {', '.join(TARGETS)}")
    kind = device.type if name == "auto" else name
    if kind not in TARGETS:
        raise SparseForgeError(f"there are no sparse kernels for {kind}; move the model to one of {', '.join(TARGETS)}")
    if kind != device.type:
        raise SparseForgeError(f"the model is on {device.type} and the target is {kind}: move the model first")
    return TARGETS[kind]
