"""Rows of x in 8 bits, and what turns sums of such products into a linear's answer; Triton on a GPU, plain torch
elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes_linear import kernels_run


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in], floating -> int8 codes [rows, in] and float32 scales [rows]: x is about codes times scales, off by
    1/254 of the row's largest at most. A row with an inf or NaN has a scale of NaN."""
    m, width = x.shape
    if not kernels_run(x):
        scales = x.float().abs().amax(1) / 127 + (x.float() * 0).sum(1)
        factors = torch.where(scales > 0, 1 / scales, 0)
        return (x.float() * factors[:, None]).round().to(torch.int8), scales
    from sparseforge_fx.kernels.gpu import triton_rows

    x = x.contiguous()
    codes, scales = x.new_empty(m, width, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    block = min(4096, max(16, 1 << (width - 1).bit_length()))
    triton_rows.round_rows[(m,)](x, codes, scales, width, BLOCK=block, num_warps=8)
    return codes, scales


def finish_rows(sums: Tensor, scales: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(sums * scales + bias) in the dtype of ``sums``: sums [rows, out], scales [rows], bias [out]."""
    m, rows = sums.shape
    if not kernels_run(sums):
        y = sums.float() * scales[:, None]
        return ACTIVATIONS[activation].forward(y if bias is None else y + bias.float()).to(sums.dtype)
    from sparseforge_fx.kernels.gpu import triton_rows

    outputs = rows // 2 if activation == "silu_mul" else rows
    sums, y = sums.contiguous(), sums.new_empty(m, outputs)
    triton_rows.finish_rows[(-(-outputs // 1024), m)](
        sums, scales, sums if bias is None else bias, y, outputs,
        BLOCK=1024, HAS_BIAS=bias is not None, ACTIVATION=activation,
    )  # fmt: skip
    return y
