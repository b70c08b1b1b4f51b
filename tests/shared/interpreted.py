"""Run by test_triton_interpreted.py in a process that had TRITON_INTERPRET=1 before Triton was imported."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from code_cases import assert_codes_correct, random_codes

from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.eight_bits import finish_rows, round_rows
from sparseforge_fx.kernels.gpu.planes import to_planes
from sparseforge_fx.kernels.gpu.planes_linear import expand_planes, launch, planes_linear
from sparseforge_fx.kernels.gpu.tiles import Tile
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

np.seterr(over="ignore")  # the interpreter's sigmoid overflows in exp, to the right limit
HALF = [torch.bfloat16, torch.float16]
GEMV = Tile(16, 8, 1)
DOT = Tile(16, 8, 1, lines=16)


def case(out, width, m, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width + -width % 4, generator=generator)
    weight = (weight * hard_mask(weight.abs(), TWO_FOUR))[:, :width].to(dtype)
    x = torch.randn(m, width, generator=generator).to(dtype)
    return weight, x, torch.randn(out, generator=generator).to(dtype), *to_planes(pack(weight))


def assert_close(y, weight, x, bias, activation="none"):
    """Rounding of the result, and of K float32 sums; a product of two rounded halves may lose twice."""
    double = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = ACTIVATIONS[activation].forward(double)
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    if activation == "silu_mul":
        half = size.shape[-1] // 2
        size = size[..., :half] * size[..., half:]
    sums = 2 * x.shape[-1] * torch.finfo(torch.float32).eps * size
    assert ((y.double() - expected).abs() <= torch.finfo(y.dtype).eps * expected.abs() + sums + 1e-6).all()


@pytest.mark.parametrize("m", [*range(1, 18), 33, 64])
def test_every_number_of_rows(m):
    dtype = HALF[m % 2]
    weight, x, bias, values, meta = case(15, 344, m, dtype, m)  # 11 words a plane, the last group beyond the inputs
    assert_close(planes_linear(x, values, meta, 344, bias), weight, x, bias)


@pytest.mark.parametrize("tile", [GEMV, DOT, DOT._replace(pairs=True)])
@pytest.mark.parametrize(("out", "width"), [(16, 256), (1, 4), (3, 30), (17, 260)])
def test_every_width_and_tail(out, width, tile):
    m = 3 if not tile.lines else 5
    weight, x, _, values, meta = case(out, width, m, torch.bfloat16, width)
    assert_close(launch(x, values, meta, None, "none", tile), weight, x, None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tile", [Tile(16, 4, 1), Tile(32, 4, 1, lines=16)])
def test_every_activation(tile, activation):
    m = 2 if not tile.lines else 6
    weight, x, bias, values, meta = case(26, 100, m, torch.bfloat16)
    assert_close(launch(x, values, meta, bias, activation, tile), weight, x, bias, activation)


@pytest.mark.parametrize("activation", ["gelu", "silu_mul"])
@pytest.mark.parametrize("tile", [Tile(32, 4, 1, split=3), Tile(32, 4, 1, lines=16, split=3)])
def test_split_sums_give_the_same_bits_again(tile, activation):
    m = 2 if not tile.lines else 6
    weight, x, bias, values, meta = case(26, 200, m, torch.bfloat16)  # 7 words: the third split has none
    y = launch(x, values, meta, bias, activation, tile)
    assert_close(y, weight, x, bias, activation)
    assert torch.equal(y, launch(x, values, meta, bias, activation, tile))


@pytest.mark.parametrize("text", ["2:4 int8", "2:4 int4/32", "2:4 int4/128"])
@pytest.mark.parametrize("m", [1, 4, 5, 130])
def test_codes(text, m):
    """In one word stand the pairs of several planes; numpy's bfloat16 is cut, not rounded."""
    packed, _ = random_codes(14, 384, text)
    values, meta = to_planes(packed)
    bias, dtype = torch.randn(14), HALF[m % 2]
    x = torch.randn(m, 384).to(dtype)
    for activation in ("none", "silu_mul"):
        y = planes_linear(x, values, meta, 384, bias.to(dtype), activation, packed.scales)
        assert_codes_correct(y, x, packed, bias.to(dtype), activation)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu_mul"])
def test_rows_in_8_bits(activation):
    x = torch.randn(5, 5000).bfloat16()
    x[3, 7] = float("nan")
    codes, scales = round_rows(x)
    want = (x.float() / scales[:, None]).round()
    fine = [0, 1, 2, 4]
    assert scales[3].isnan() and torch.equal(scales[fine], x[fine].float().abs().amax(1) / 127)
    assert (codes[fine].float() - want[fine]).abs().max() <= 1 and codes[fine].abs().amax(1).eq(127).all()
    sums, bias = torch.randn(5, 2050).bfloat16(), torch.randn(2050).bfloat16()
    got = finish_rows(sums, scales, bias, activation)
    want = ACTIVATIONS[activation].forward(sums.float() * scales[:, None] + bias.float())
    torch.testing.assert_close(got[fine].float(), want[fine], rtol=2**-7, atol=1e-6)
    assert got[3].isnan().all()


def test_padding_reads_no_input():
    """What lies beyond a row of x is the next row, or nobody's memory: a NaN there must not come in."""
    weight, x, _, values, meta = case(16, 40, 4, torch.bfloat16)
    wide = torch.full((9, 40), float("nan"), dtype=torch.bfloat16)
    wide[:4] = x
    assert_close(launch(wide[:4], values, meta, None, "none", GEMV), weight, x, None)
    assert_close(launch(wide[:4], values, meta, None, "none", DOT), weight, x, None)


@pytest.mark.parametrize("dtype", HALF)
def test_the_expanded_weight_is_exact(dtype):
    weight, _, _, values, meta = case(19, 1100, 1, dtype)
    assert torch.equal(expand_planes(values, meta, 1100, dtype), weight)


def test_nan_and_leading_dimensions():
    _, x, bias, values, meta = case(8, 64, 6, torch.bfloat16)
    x[5, 3] = float("nan")
    y = planes_linear(x.view(2, 3, 64), values, meta, 64, bias, "relu")
    assert y.shape == (2, 3, 8) and torch.isnan(y[1, 2]).any() and not torch.isnan(y[0]).any()
    assert planes_linear(x[:0], values, meta, 64).shape == (0, 8)


@pytest.mark.parametrize(("m", "most"), [(1, 1), (2, 16), (16, 16), (3, 128), (40, 128), (1, 129), (5, 129)])
def test_a_kernel_chosen_beforehand_serves_every_number_up_to_its_own(m, most):
    weight, x, bias, values, meta = case(15, 344, m, torch.bfloat16, m)
    y = torch.ops.sparseforge.planes_linear(x, values, meta, 344, bias, "none", most)
    assert_close(y, weight, x, bias)
