"""Random 2:4 linears, and what a correct kernel may differ by."""

import torch

from sparseforge_fx.kernels.packed import Packed, pack
from sparseforge_fx.kernels.sparse_linear import reference
from sparseforge_fx.pattern import TWO_FOUR, hard_mask


def random_linear(out, in_features, dtype, seed=0, drop=0.1):
    """(packed weight, bias); some groups have fewer than two survivors."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out, in_features, generator=generator)
    dense = dense * hard_mask(dense.abs(), TWO_FOUR) * (torch.rand(dense.shape, generator=generator) >= drop)
    return pack(dense.to(dtype)), torch.randn(out, generator=generator).to(dtype)


def assert_correct(y, x, packed: Packed, bias=None, activation="none"):
    """``y`` against the reference in float64 on the same inputs.

    Allowed: a float32 sum of n terms in any order is wrong by at most n * 2^-24 times the sum of the magnitudes
    (Higham, Accuracy and Stability, 4.2); n = in + 1 with the bias. Then one rounding of the sum to y's dtype (plain
    torch does, the kernels do not) and two of the result (silu_mul in plain torch rounds its factor too), each by u,
    half of the dtype's epsilon. An activation passes errors on with its largest slope, 1.13 (gelu and silu), and
    costs 4e-7 of its argument: 1.5e-7 of the erf that the kernels use, and some units in the last place of exp.
    """
    double = Packed(packed.values.double(), packed.bitmask, packed.in_features)
    wide = None if bias is None else bias.double()
    sums = reference(x.double(), double, wide)
    expected = reference(x.double(), double, wide, activation)
    magnitude = reference(
        x.double().abs(), double._replace(values=double.values.abs()), None if wide is None else wide.abs()
    )
    u = torch.finfo(y.dtype).eps / 2
    error = (packed.in_features + 1) * 2.0**-24 * magnitude + u * sums.abs()
    if activation == "silu_mul":
        (gate, up), (gate_error, up_error) = sums.chunk(2, -1), error.chunk(2, -1)
        slope_error = 1.13 * gate_error + 4e-7 * gate.abs()
        error = slope_error * (up.abs() + up_error) + torch.nn.functional.silu(gate).abs() * up_error
    elif activation != "none":
        error = 1.13 * error + 4e-7 * sums.abs()
    error = error + 2 * u * expected.abs() + 1e-37
    assert y.shape == expected.shape, (y.shape, expected.shape)
    worst = ((y.double() - expected).abs() / error).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the allowed error"


def random_weight(shape, dtype, seed, drop=0.0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator) * 20
    dense = dense * hard_mask(dense.abs(), TWO_FOUR)
    dense[torch.rand(shape, generator=generator) < drop] = 0
    return dense.to(dtype)


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
