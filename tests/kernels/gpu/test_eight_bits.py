"""Rows of x in 8 bits in plain torch; the kernels are compared with it in Triton's interpreter."""

import pytest
import torch

from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.eight_bits import finish_rows, round_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_off_by_half_a_step_at_most(dtype):
    x = torch.randn(6, 300).to(dtype)
    x[2] = 0
    x[3, 5] = 100  # an outlier takes the others' bits
    codes, scales = round_rows(x)
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    error = (codes.float() * scales[:, None] - x.float()).abs()
    assert (error <= x.float().abs().amax(1, keepdim=True) / 254 * 1.0001).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(bad):
    x = torch.randn(3, 64)
    x[1, 7] = bad
    codes, scales = round_rows(x)
    y = finish_rows(codes.float() @ torch.randn(64, 8), scales, None, "none")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scales_bias_and_activation(activation):
    sums, scales, bias = torch.randn(3, 10), torch.rand(3), torch.randn(10)
    want = ACTIVATIONS[activation].forward(sums * scales[:, None] + bias)
    torch.testing.assert_close(finish_rows(sums, scales, bias, activation), want)
