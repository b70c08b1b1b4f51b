"""The dense model beside the one that trains: what it answers, and what it computes on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.taps import Taps, tap
from sparseforge_fx.training.distillation import FEATURES


def dense_copies(program: Program, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The model's tensors that training writes (parameters that require grad, and ``weights``), each with a copy."""
    sites = {id(weight) for weight in weights}
    written = {id(v): v for v in program.state.values() if isinstance(v, nn.Parameter)}
    return [
        (value, nn.Parameter(value.detach().clone(), requires_grad=False))
        for value in written.values()
        if value.requires_grad or id(value) in sites
    ]


def weights_of(teacher: nn.Module, program: Program) -> dict[str, Tensor]:
    """The parameters of ``teacher`` by the names that the captured model has for them; buffers stay the model's own.

    Raises SparseForgeError unless it is the same model in other weights.
    """
    theirs = check_same(teacher, program)
    for fqn, value in theirs.items():
        if value.is_meta or not bool(torch.isfinite(value).all()):
            raise SparseForgeError(f"{fqn} of the teacher is not there, or holds NaN or infinite values")
    return {fqn: value.detach() for fqn, value in theirs.items()}


def check_same(teacher: nn.Module, program: Program) -> dict[str, Tensor]:
    """The parameters of ``teacher`` that stand where the captured model has one. Raises SparseForgeError unless they
    are all there, in its shapes."""
    if not isinstance(teacher, nn.Module):
        raise SparseForgeError(f"teacher is {teacher!r}: give a model, or the folder, hub id or file of one")
    theirs = dict(unwrapped(teacher).named_parameters(remove_duplicate=False))
    wanted = {fqn: value for fqn, value in program.state.items() if isinstance(value, nn.Parameter)}
    for fqn, value in wanted.items():
        if fqn not in theirs or theirs[fqn].shape != value.shape:
            have = "no such weight" if fqn not in theirs else f"it as {list(theirs[fqn].shape)}"
            raise SparseForgeError(
                f"the teacher has {have} where the model has {fqn} {list(value.shape)}: a teacher is the same model, "
                "in the weights that it had before it was pruned"
            )
    return {fqn: theirs[fqn] for fqn in wanted}


def counterparts(program: Program, weights: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a program, each with what stands in its place in a teacher of these weights."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for fqn, value in program.state.items():
        if fqn in weights and id(value) not in found:
            other = weights[fqn].to(value.device, value.dtype)
            if other.data_ptr() == value.data_ptr():  # a teacher does not learn
                other = other.clone()
            found[id(value)] = value, nn.Parameter(other, requires_grad=False)
    return list(found.values())


class Teacher:
    """The dense program over ``copies`` of what changes; the rest of its tensors is shared with the model.

    Args:
        copies: of :func:`dense_copies`, or the :func:`counterparts` in another model.
        features: a name of :data:`FEATURES`: the values that it compares are kept in ``seen``.
        cut: what makes of the module one that processes share.
    """

    def __init__(
        self,
        program: Program,
        copies: Sequence[tuple[Tensor, Tensor]],
        features: str | None = None,
        cut: Callable[[GraphModule], GraphModule] | None = None,
    ):
        frozen = program.copy()
        clones = {id(value): clone for value, clone in copies}
        for fqn, value in list(frozen.state.items()):
            frozen.state[fqn] = clones.get(id(value), value)  # ties stay ties
        self.module = frozen.module() if cut is None else cut(frozen.module())
        self.seen = Taps()
        if features is not None:
            self.module = tap(self.module, self.seen, attention=FEATURES[features])
        self.run: Callable[..., Any] = self.module

    @torch.no_grad()
    def __call__(self, batch: Reading) -> Any:
        """The dense model's output."""
        self.seen.clear()
        return self.run(*batch.args, **batch.kwargs)
