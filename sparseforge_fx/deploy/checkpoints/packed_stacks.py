"""Stacks of experts in a packed checkpoint: each matrix packed in the file, dense parameters again in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import Packed, check_packed, pack, packed_names, unpack, why_dense

if TYPE_CHECKING:
    from sparseforge_fx.deploy.checkpoints.packed_header import Stack


class Found(NamedTuple):
    """A stack of a model that can be packed.

    Attributes:
        packed: [experts, out, in].
        transposed: the model stores it [experts, in, out].
    """

    packed: Packed
    transposed: bool


def find_stacks(model: nn.Module) -> tuple[dict[str, Found], dict[str, str]]:
    """3-D parameters whose matrices are all exactly 2:4, along either of their dimensions, by name; the others with a
    reason. Packing one that is no stack of experts loses nothing."""
    found: dict[str, Found] = {}
    skipped: dict[str, str] = {}
    convolutions = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 3 or id(parameter) in convolutions or type(parameter) is not nn.Parameter:
            continue
        weight = parameter.detach()
        reason = why_dense(weight)
        if reason is None:
            found[name] = Found(pack(weight), False)
        elif why_dense(weight.mT) is None:
            found[name] = Found(pack(weight.mT), True)
        else:
            skipped[name] = f"a stack of experts: {reason}"
    return found, skipped


def stack_tensors(name: str, found: Found) -> dict[str, Tensor]:
    """What the file holds of a stack: its packed tensors, and an empty one where the dense weight would stand, at which
    a loader that does not know them stops."""
    values, bitmask, _ = packed_names(name)
    packed = found.packed
    return {values: packed.values, bitmask: packed.bitmask, name: packed.values.new_empty(0)}


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
        values, bitmask, _ = packed_names(leaf)
        with torch.device("meta"):
            tensors = stack.empty(weight.dtype)
            owner._parameters[leaf] = nn.Parameter(torch.empty(0, dtype=weight.dtype), weight.requires_grad)
        owner.register_buffer(values, tensors[0])
        owner.register_buffer(bitmask, tensors[1])


@torch.no_grad()
def unpack_stacks(model: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Dense parameters of the packed tensors that have been loaded."""
    for name, stack in stacks.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        values, bitmask, _ = packed_names(leaf)
        packed = Packed(owner._buffers.pop(values), owner._buffers.pop(bitmask), stack.in_features)  # type: ignore[arg-type]
        if packed.values.is_meta:
            raise SparseForgeError(f"'{name}' was put on the disk, where packed weights cannot be read: free memory")
        try:
            check_packed(packed)
        except SparseForgeError as error:
            raise SparseForgeError(f"'{name}': {error}; copy the checkpoint anew") from error
        if not packed.values.isfinite().all():
            raise SparseForgeError(f"packed stack '{name}' has NaN or inf as {packed.values.dtype}: pack it anew")
        dense = unpack(packed)
        dense = dense.mT.contiguous() if stack.transposed else dense
        grad = owner._parameters[leaf].requires_grad  # type: ignore[union-attr]
        owner._parameters[leaf] = nn.Parameter(dense, grad)


def named_in(stacks: Mapping[str, Stack], places: Any) -> dict[str, Stack]:
    """The stacks by the names of a model, without those that it lacks; ``places``: a module's name in the file -> that
    in the model, or None."""
    found = {name: places(name.rpartition(".")[0]) for name in stacks}
    return {f"{found[n]}.{n.rpartition('.')[2]}": s for n, s in stacks.items() if found[n] is not None}
