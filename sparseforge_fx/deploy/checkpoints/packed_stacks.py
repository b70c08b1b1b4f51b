"""Stacks of experts in a packed checkpoint: packed in the model, too, where transformers' experts interface has them;
dense parameters again elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseforge_fx.deploy.lowering.modules import replace
from sparseforge_fx.deploy.lowering.sparse_modules import SparseExperts, packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import Packed, check_packed, pack, packed_names, unpack, why_dense
from sparseforge_fx.models.expert_stacks import find_expert_stacks, has_experts, stacks_of

if TYPE_CHECKING:
    from sparseforge_fx.deploy.checkpoints.packed_header import Stack


class Found(NamedTuple):
    """A stack of a model that is packed or can be.

    Attributes:
        packed: [experts, out, in].
        transposed: the model stores it [experts, in, out].
        dtype: that it computes in.
    """

    packed: Packed
    transposed: bool
    dtype: torch.dtype


def find_stacks(model: nn.Module) -> tuple[dict[str, Found], dict[str, str]]:
    """Stacks that are packed, and 3-D parameters whose matrices are all exactly 2:4, by name; the others with a reason.
    Where it is not known which dimension their inputs are, either may be it: packing one that is no stack of experts
    loses nothing."""
    found: dict[str, Found] = {}
    skipped: dict[str, str] = {}
    for name, module in packed_weights(model).items():
        if isinstance(module, SparseExperts):
            found[name] = Found(module.packed(), module.transposed, module.dtype)
    known, _ = find_expert_stacks(model)
    for name, parameter in stacks_of(model):
        weight = parameter.detach()
        ways = (False, True) if name not in known else (known[name].transposed,)
        reasons = {way: why_dense(weight.mT if way else weight) for way in ways}
        way = next((way for way, reason in reasons.items() if reason is None), None)
        if way is None:
            skipped[name] = f"a stack of experts: {reasons[ways[0]]}"
        else:
            found[name] = Found(pack(weight.mT if way else weight), way, weight.dtype)
    return found, skipped


def stack_tensors(name: str, found: Found) -> dict[str, Tensor]:
    """What the file holds of a stack: its packed tensors, and an empty one where the dense weight would stand, at which
    a loader that does not know them stops."""
    packed = found.packed
    tensors = zip(packed_names(name), (packed.values, packed.bitmask, packed.scales), strict=True)
    held = {leaf: tensor for leaf, tensor in tensors if tensor is not None}
    return {**held, name: torch.empty(0, dtype=found.dtype)}


def expect_stacks(model: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Give ``model``, on the meta device, the tensors that the file has in the place of its dense stacks, named as the
    model names them."""
    for name, stack in stacks.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        weight = owner._parameters[leaf]
        assert weight is not None
        if tuple(weight.shape) != stack.stored_shape:
            raise SparseForgeError(
                f"the packed stack '{name}' is {list(stack.stored_shape)} in the header and {list(weight.shape)} in "
                "the model: config.json is damaged"
            )
        with torch.device("meta"):
            tensors = stack.empty(weight.dtype)
            owner._parameters[leaf] = nn.Parameter(torch.empty(0, dtype=weight.dtype), weight.requires_grad)
        for buffer, tensor in zip(packed_names(leaf), tensors, strict=False):
            owner.register_buffer(buffer, tensor)


@torch.no_grad()
def take_stacks(model: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Packed modules of the tensors that have been loaded; dense parameters where a module multiplies in a way of its
    own."""
    for name, stack in stacks.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = owner._parameters[leaf]
        assert empty is not None
        values, bitmask, scales = (owner._buffers.pop(buffer, None) for buffer in packed_names(leaf))
        packed = Packed(values, bitmask, stack.in_features, scales)  # type: ignore[arg-type]
        if packed.values.is_meta:
            raise SparseForgeError(f"'{name}' was put on the disk, where packed weights cannot be read: free memory")
        try:
            check_packed(packed)
        except SparseForgeError as error:
            raise SparseForgeError(f"'{name}': {error}; copy the checkpoint anew") from error
        if scales is None and not packed.values.isfinite().all():
            raise SparseForgeError(f"packed stack '{name}' has NaN or inf as {packed.values.dtype}: pack it anew")
        if has_experts(owner):
            if bool(owner.is_transposed) != stack.transposed:
                raise SparseForgeError(
                    f"the packed stack '{name}' is stored the other way round: the header is damaged"
                )
            sparse = SparseExperts(packed, transposed=stack.transposed, dtype=empty.dtype)
            replace(model, name, sparse.train(owner.training))
        else:
            dense = unpack(packed).to(empty.dtype)
            dense = dense.mT.contiguous() if stack.transposed else dense
            owner._parameters[leaf] = nn.Parameter(dense, empty.requires_grad)


def named_in(stacks: Mapping[str, Stack], places: Any) -> dict[str, Stack]:
    """The stacks by the names of a model, without those that it lacks; ``places``: a module's name in the file -> that
    in the model, or None."""
    found = {name: places(name.rpartition(".")[0]) for name in stacks}
    return {f"{found[n]}.{n.rpartition('.')[2]}": s for n, s in stacks.items() if found[n] is not None}
