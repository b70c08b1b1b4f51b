"""Products with a weight in the format on disk: by the C++ kernels on a CPU, in plain torch anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.formats import Format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.packed import Packed, check_shapes, int4_codes, unpack
from sparseforge_fx.scales import group_of, scale_values


def rows_dense(values: Tensor, bitmask: Tensor, in_features: int, scales: Tensor | None) -> Tensor:
    """The dense weight [out, in], in plain torch."""
    return unpack(check_shapes(Packed(values, bitmask, in_features, scales)))


def rows_dense_on_cpu(values: Tensor, bitmask: Tensor, in_features: int, scales: Tensor | None) -> Tensor:
    """The same by the C++ kernel, where it is there and takes the dtype."""
    fast = (scales is not None or values.element_size() in (2, 4)) and cpu.available()
    if not fast:
        return rows_dense(values, bitmask, in_features, scales)
    return cpu.rows_dense(*check_shapes(Packed(values, bitmask, in_features, scales)))


def rows_product_on_cpu(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None,
) -> Tensor | None:
    """act(x W^T + b), x [rows, in] -> [rows, out] by the C++ kernel; None where it does not serve so many rows."""
    if x.shape[0] > cpu.max_rows(x.dtype, in_features, quantized=scales is not None):
        return None
    check_shapes(Packed(values, bitmask, in_features, scales))
    return cpu.rows_linear(x, values, bitmask, in_features, scales, bias, activation)


def rows_taken(places: Tensor, values: Tensor, in_features: int, scales: Tensor) -> Tensor:
    """Some rows of a dense weight in few bits, float32 [..., in]: of ``rows_dense``, bit for bit; no other is read.

    Plain operators, so that it goes into every kind of graph, and Inductor makes one loop of it.

    Args:
        places: integers [...], from 0 to out - 1.
        values, scales: those of ``Packed``.
    """
    codes = F.embedding(places, values)
    if values.dtype != torch.int8:
        codes = int4_codes(codes, Format(values="int4", group=group_of(scales, in_features)))
    groups = scale_values(F.embedding(places, scales))
    codes = codes[..., :in_features].float().unflatten(-1, (groups.shape[-1], -1))
    return (codes * groups[..., None]).flatten(-2)
