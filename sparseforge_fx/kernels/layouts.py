"""The ways in which a packed weight is kept for its kernels, each with the way back to the format on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.kernels.gpu import cusparselt, cutlass
from sparseforge_fx.kernels.gpu.planes import from_planes
from sparseforge_fx.kernels.gpu.planes_linear import as_planes, as_words, tune_planes
from sparseforge_fx.kernels.packed import Packed


class Layout(NamedTuple):
    """One layout: a weight is two tensors, ``values`` and ``meta``.

    Attributes:
        convert: the packed weight -> (values, meta).
        restore: (values, meta, in_features) -> the packed weight, which unpacks to the same bits.
        refuses: (out, in, dtype, device): why its kernels cannot take such a weight; None where they can.
        by_rows: the rows of both tensors are the outputs', so that weights of one width can be stacked.
        durable: the same for all GPUs and versions of libraries: it may be written to a file.
        tune: (values, meta, in_features, rows of x): search the kernel's configuration before it is timed.
    """

    name: str
    convert: Callable[[Packed], tuple[Tensor, Tensor]]
    restore: Callable[[Tensor, Tensor, int], Packed]
    refuses: Callable[[int, int, torch.dtype, torch.device], str | None] = lambda *_: None
    by_rows: bool = True
    durable: bool = True
    tune: Callable[[Tensor, Tensor, int, int], object] = lambda *_: None


def _from_planes(values: Tensor, meta: Tensor, in_features: int) -> Packed:
    return from_planes(as_words(values), meta, in_features, values.dtype)


#: what is on disk: the CPU's kernels read it as it is
ROWS = Layout("rows", lambda packed: (packed.values, packed.bitmask), Packed)
#: decoding on a GPU, by Triton
PLANES = Layout("planes", as_planes, _from_planes, tune=tune_planes)
#: prefill on sparse tensor cores, sm_80 and later
CUSPARSELT = Layout(
    "cusparselt",
    cusparselt.as_blob,
    cusparselt.from_blob,
    cusparselt.why_not,
    by_rows=False,
    durable=False,
    tune=cusparselt.tune,
)
#: the same, sm_80 to sm_89
CUTLASS = Layout("cutlass", cutlass.as_cutlass, cutlass.from_cutlass, cutlass.why_not, by_rows=False, durable=False)
LAYOUTS = {layout.name: layout for layout in (ROWS, PLANES, CUSPARSELT, CUTLASS)}
