"""What a process needs to know of the part of a weight that it has, so that masks are decided by the whole weight.

Groups of M never straddle two parts: top-N, flips and pulls are each part's own matter. Quantiles, means and counts are
not, and come from here: exact, with a sample of bounded size or a number on the way, never a weight or a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Part:
    """Rows ``start`` and following, along ``dim``, of a tensor of ``shape`` that the processes of ``mesh`` have
    together."""

    shape: torch.Size
    dim: int
    start: int
    mesh: DeviceMesh

    @classmethod
    def of(cls, whole: DTensor) -> Part:
        """The part of ``whole`` that is here."""
        (placement,) = whole.placements
        assert isinstance(placement, Shard)
        _, start = placement.local_shard_size_and_offset(
            whole.shape[placement.dim], whole.device_mesh.size(), whole.device_mesh.get_local_rank()
        )
        return cls(whole.shape, placement.dim, start, whole.device_mesh)

    def whole(self, local: Tensor) -> DTensor:
        """The tensor of which this process has ``local``, over the same memory."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local.detach(), self.mesh, [Shard(self.dim)], run_check=False, shape=self.shape, stride=stride
        )

    @property
    def length(self) -> int:
        """Rows that are here."""
        size = self.shape[self.dim]
        each = -(-size // self.mesh.size())
        return max(0, min(each, size - self.start))

    def sums(self, *values: float) -> list[float]:
        """Of each number the sum over the processes."""
        found = torch.tensor(values, dtype=torch.float64)
        found = found.to(self.mesh.device_type)
        dist.all_reduce(found, group=self.mesh.get_group())
        return found.tolist()

    def every(self, local: Tensor, step: int) -> Tensor:
        """Every ``step``-th entry of the whole matrix, in any order; ``local`` is the part of it that is here."""
        rows, columns = self.shape
        places = torch.arange(0, rows * columns, step, device=local.device)
        at = [places // columns, places % columns]
        along = at[self.dim]
        here = (along >= self.start) & (along < self.start + self.length)
        at[self.dim] = along - self.start
        return self.gathered(local[at[0][here], at[1][here]])

    def gathered(self, values: Tensor) -> Tensor:
        """What all processes have, [n] each, of lengths that may differ."""
        group, count = self.mesh.get_group(), self.mesh.size()
        lengths = torch.zeros(count, dtype=torch.int64, device=values.device)
        lengths[self.mesh.get_local_rank()] = len(values)
        dist.all_reduce(lengths, group=group)
        longest = int(lengths.max())
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in range(count)]
        dist.all_gather(found, padded, group=group)
        return torch.cat([some[:length] for some, length in zip(found, lengths.tolist(), strict=True)])


@torch.no_grad()
def local(value: Tensor) -> Tensor:
    """What this process has of a tensor: the very memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def mean(values: Tensor, part: Part | None) -> Tensor:
    """Of all entries of the whole tensor, summed in float64: it does not depend on how the tensor is cut."""
    found = [values.sum(dtype=torch.float64).item(), float(values.numel())]
    total, count = found if part is None else part.sums(*found)
    return values.new_tensor(total / max(1.0, count))


def kth_smallest(values: Tensor, k: int, part: Part | None) -> Tensor:
    """The k-th smallest (from 1) of float32 values, [n] on each process: exact.

    Over several processes by counts: of the upper half of the bits of all values, then of the lower half of those that
    share the upper one; two all-reduces of 65,536 numbers.
    """
    if part is None:
        return values.kthvalue(k).values
    bits = values.float().contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, -bits - (1 << 31) - 1, bits) + (1 << 31)  # as the values are ordered, from zero on
    found = 0
    for shift in (16, 0):
        inside = order[(order >> 16) == found] & 0xFFFF if shift == 0 else order >> 16
        counts = torch.bincount(inside, minlength=1 << 16)
        dist.all_reduce(counts, group=part.mesh.get_group())
        reached = counts.cumsum(0)
        place = int((reached < k).sum())
        k -= int(reached[place - 1]) if place else 0
        found = (found << 16) | place
    bits = torch.tensor(found - (1 << 31), device=values.device)
    return torch.where(bits < 0, -bits - (1 << 31) - 1, bits).to(torch.int32).view(torch.float32)
