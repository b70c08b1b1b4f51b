"""The tensors of a model as a packed checkpoint holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.deploy.checkpoints.packed_header import Header, Site, Stack
from sparseforge_fx.deploy.checkpoints.packed_stacks import Found, find_stacks, stack_tensors
from sparseforge_fx.deploy.lowering.modules import find_packable, weight_of
from sparseforge_fx.deploy.lowering.packed_embedding import packed_embeddings
from sparseforge_fx.deploy.lowering.report import PackingReport, stored_site
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear, packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import BITMASK, SCALES, VALUES, Packed, pack


def packed_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed linears of a model by name."""
    return {name: module for name, module in packed_weights(model).items() if isinstance(module, SparseLinear)}


@torch.no_grad()
def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], Header, PackingReport]:
    """The state dict with packed weights in place of dense ones, the header of it, the report."""
    linears, skipped = find_packable(model)
    tables = packed_embeddings(model)
    kept: dict[str, Any] = {**packed_linears(model), **{name: model.get_submodule(name) for name in tables}}
    found: dict[str, Packed] = {name: module.packed() for name, module in kept.items()}
    found |= {name: pack(weight_of(module)) for name, module in linears.items()}
    stacks, dense_stacks = find_stacks(model)
    if not found and not stacks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to pack: {reasons or 'the model has no linear layer'}; run sparsify first")
    if any(packed.values.is_meta for packed in found.values()):
        raise SparseForgeError("weights of the model are on the meta device: load it without offloading first")
    if damaged := [n for n, p in found.items() if p.scales is None and not p.values.isfinite().all()]:
        raise SparseForgeError(f"'{damaged[0]}' has NaN or inf in its weight: train or load it anew")
    gone = {f"{name}.{leaf}" for name in (*found, *stacks) for leaf in ("weight", VALUES, BITMASK, SCALES)}
    state = {key: value for key, value in model.state_dict().items() if key not in gone}
    dtypes = {name: module.dtype for name, module in kept.items()}
    modules = {}
    for name, packed in sorted(found.items()):
        dtype = dtypes.get(name, packed.values.dtype)
        out, width = packed.shape
        modules[name] = Site(out, width, str(dtype).removeprefix("torch."), packed.format)
        tensors = dict(zip((VALUES, BITMASK, SCALES), (packed.values, packed.bitmask, packed.scales), strict=True))
        state |= {f"{name}.{leaf}": tensors[leaf] for leaf in modules[name].tensors()}  # type: ignore[misc]
    dense = {n: s.out_features * s.in_features * getattr(torch, s.dtype).itemsize for n, s in modules.items()}
    report: PackingReport = {
        "sites": [stored_site(tables.get(name) or name, found[name]) for name in modules],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "dense_bytes": sum(dense.values()),
        "lowered_bytes": sum(p.nbytes for p in found.values()),
        "scratch_bytes": max(dense.values(), default=0),
    }
    for name, stack in stacks.items():
        if stack.packed.scales is None and not stack.packed.values.isfinite().all():
            raise SparseForgeError(f"'{name}' has NaN or inf in its weight: train or load it anew")
        state |= stack_tensors(name, stack)
    report["sites"] += [stored_site(name, stack.packed) for name, stack in stacks.items()]
    report["skipped"] += [{"name": name, "reason": reason} for name, reason in dense_stacks.items()]
    report["dense_bytes"] += sum(stack.packed.shape.numel() * stack.dtype.itemsize for stack in stacks.values())
    report["lowered_bytes"] += sum(stack.packed.nbytes for stack in stacks.values())
    of_stacks = {n: _entry(s) for n, s in sorted(stacks.items())}
    header = Header(modules, sum(1 for _ in model.modules()), None, of_stacks, dict(sorted(tables.items())))
    if header.sentinel is not None:
        state[header.sentinel] = torch.empty(0, dtype=torch.uint8)
    return state, header, report


def _entry(found: Found) -> Stack:
    experts, out, width = found.packed.shape
    site = Site(out, width, str(found.dtype).removeprefix("torch."), found.packed.format)
    return Stack(experts, site, found.transposed)
