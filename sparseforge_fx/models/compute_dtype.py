"""In which dtype to compute: a processor without instructions for half precision takes many times as long for it as for
float32, so both are timed before a long run. The checkpoint keeps its own dtype."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.dense import DTYPES

HALVES = (torch.bfloat16, torch.float16)
SMALLEST_GAIN = 1.2  # float32 takes twice the memory, and two measurements differ by chance
ROWS, WIDTH = 128, 512  # of the linear that is timed: a few milliseconds where the dtype has instructions of its own
ROUNDS = 4


class ComputeDtype(NamedTuple):
    """The dtype of the computation, that of the checkpoint, and what decided.

    Attributes:
        seconds: of one step of the timed linear, by the name of the dtype; empty where nothing was timed.
    """

    dtype: torch.dtype
    checkpoint: torch.dtype
    seconds: dict[str, float] = {}  # noqa: RUF012  (never written to)

    def describe(self) -> dict[str, Any]:
        """For report.json, and for :meth:`read` when the run is resumed."""
        return {"dtype": _name(self.dtype), "checkpoint": _name(self.checkpoint), "seconds_per_step": self.seconds}

    @classmethod
    def read(cls, described: Any) -> ComputeDtype:
        """What :meth:`describe` gave. Raises SparseForgeError for anything else."""
        try:
            return cls(DTYPES[described["dtype"]], DTYPES[described["checkpoint"]], described["seconds_per_step"])
        except (KeyError, TypeError) as error:
            raise SparseForgeError(
                "the run to resume does not say in which dtype it computes: start anew with --overwrite"
            ) from error

    def notes(self) -> list[str]:
        """A sentence where the computation is not in the checkpoint's dtype."""
        if self.dtype == self.checkpoint:
            return []
        own = _name(self.checkpoint)
        why = ""
        if self.seconds:
            ratio = self.seconds[own] / self.seconds[_name(self.dtype)]
            why = f", which is {ratio:.1f} times as fast on this processor"
        return [f"computed in {_name(self.dtype)}{why}; the checkpoint's own dtype is {own}"]


def choose_dtype(checkpoint: torch.dtype, device: torch.device, wanted: torch.dtype | None = None) -> ComputeDtype:
    """``wanted``, if something is; else the checkpoint's dtype or, on a CPU where that is slower, float32.

    Takes a fraction of a second for a half-precision checkpoint on a CPU, no time otherwise. All processes of a run
    follow the first one's measurement.
    """
    if wanted is not None or device.type != "cpu" or checkpoint not in HALVES:
        return ComputeDtype(wanted or checkpoint, checkpoint)
    seconds = _agreed(time_steps((checkpoint, torch.float32)))
    faster = seconds[_name(checkpoint)] > SMALLEST_GAIN * seconds["float32"]
    return ComputeDtype(torch.float32 if faster else checkpoint, checkpoint, seconds)


@torch.no_grad()
def time_steps(dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Seconds of one linear, forward and both products of its backward pass, on this CPU: the best of some rounds."""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay what they are
    shapes = ((ROWS, WIDTH), (WIDTH, WIDTH), (ROWS, WIDTH))
    full = [torch.randn(shape, generator=generator) for shape in shapes]
    operands = {_name(dtype): [t.to(dtype) for t in full] for dtype in dtypes}
    best = dict.fromkeys(operands, float("inf"))
    for _ in range(ROUNDS):  # in turns: both meet the same load
        for name, tensors in operands.items():
            best[name] = min(best[name], _step(*tensors))
    return best


def _step(x: Tensor, weight: Tensor, grad: Tensor) -> float:
    clock = time.perf_counter()
    F.linear(x, weight), grad @ weight, grad.t() @ x
    return time.perf_counter() - clock


def _agreed(seconds: dict[str, float]) -> dict[str, float]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return seconds
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    return broadcast_object_list([seconds])[0]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating dtype of most of the model's weights."""
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def cast(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Turn the weights that are of :func:`dtype_of` the model into ``dtype``, in place; others (norms that the model
    keeps in float32, say) stay.

    Returns a function that gives every weight its dtype back. Zeros stay zeros. Weights that came in between follow
    the others.
    """
    own = dtype_of(model)
    before = {name: t.dtype for name, t in _tensors(model).items()}
    for t in _tensors(model).values():
        if t.dtype == own:
            t.data = t.data.to(dtype)

    def back() -> None:
        for name, t in _tensors(model).items():
            if t.dtype == dtype:
                t.data = t.data.to(before.get(name, own))

    return back


def cast_inputs(given: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    """Batches, however they are nested, for a model of the dtype ``own`` that :func:`cast` has turned into ``dtype``:
    their tensors of ``own`` are turned, too."""

    def turned(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):  # of a class that pytree does not know
            return pytree.tree_map(turned, dict(leaf))
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype == own else leaf

    return pytree.tree_map(turned, given)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if t.is_floating_point()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
