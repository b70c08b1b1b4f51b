"""int8 and int4 weights, 2:4 and dense: the packed form and the operator on it, every instruction set."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from code_cases import (
    FORMATS,
    MANY,
    assert_codes_correct,
    assert_rows_alike,
    assert_tiles_correct,
    in_tiles,
    lanes,
    random_codes,
    rounded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.packed import Packed, check_packed, pack_codes, unpack, unpack_codes
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP, reference, sparse_linear
from sparseforge_fx.scales import scale_values

ISAS = cpu.instruction_sets() if cpu.available() else ()
needs_kernel = pytest.mark.skipif(not ISAS, reason="no C++ compiler")


def call(x, packed, bias=None, activation="none"):
    return sparse_linear(x, packed.values, packed.bitmask, "rows", packed.in_features, bias, activation, packed.scales)


# -- the packed form -------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000))
def test_packing_is_exact(text, out, groups, seed):
    format = parse_format(text)
    width = groups * (format.group or 4)
    packed, codes = random_codes(out, width, text, seed)
    assert check_packed(packed).format == format and packed.shape == codes.shape
    assert torch.equal(unpack_codes(packed), codes)
    scales = scale_values(packed.scales)
    scales = scales.repeat_interleave(width // scales.shape[1], 1)
    assert torch.equal(unpack(packed), codes.float() * scales)
    bits = 8 * packed.nbytes / (out * width)
    assert bits == pytest.approx(format.bits(width, 16), rel=0 if width % 8 == 0 else 0.5)


def test_nibbles_stand_in_order():
    packed = pack_codes(torch.tensor([[1, -1, 7, -8] * 8]), torch.ones(1, 1), Format("dense", "int4", 32))
    assert packed.values.tolist() == [[0xF1, 0x87] * 8] and packed.bitmask.shape == (1, 0)


@pytest.mark.parametrize(
    ("codes", "scales", "text"),
    [
        (torch.tensor([[8] * 32]), torch.ones(1, 1), "dense int4"),
        (torch.tensor([[-9] * 32]), torch.ones(1, 1), "dense int4"),
        (torch.tensor([[1] * 8]), -torch.ones(1, 1), "dense int8"),
        (torch.tensor([[1] * 32]), torch.full((1, 1), -torch.inf), "dense int4"),
        (torch.tensor([[-128] * 8]), torch.ones(1, 1), "dense int8"),
        (torch.tensor([[1] * 8]), torch.ones(1, 1), "2:4 int8"),
        (torch.tensor([[1] * 8]), torch.zeros(1, 1), "dense int8"),
        (torch.tensor([[1] * 32]), torch.full((1, 1), 1e-9), "dense int4"),  # zero in float16
        (torch.tensor([[1] * 8]), torch.ones(1, 2), "dense int8"),
        (torch.tensor([[1] * 8]), torch.ones(1, 1), "dense int4"),
        (torch.tensor([[1] * 6]), torch.ones(1, 1), "2:4 int8"),
    ],
)
def test_codes_that_are_none_are_refused(codes, scales, text):
    with pytest.raises(SparseForgeError):
        pack_codes(codes, scales, parse_format(text))


LIES = {
    "values of another dtype": lambda p: p._replace(values=p.values.to(torch.int16)),
    "values too narrow": lambda p: p._replace(values=p.values[:, :-4]),
    "no scales": lambda p: p._replace(scales=None),
    "scales of another dtype": lambda p: p._replace(scales=p.scales.bfloat16()),
    "scales of other rows": lambda p: p._replace(scales=p.scales[1:]),
    "scales of another width": lambda p: p._replace(scales=torch.cat([p.scales] * 3, 1)),
    "a scale of zero": lambda p: p._replace(scales=p.scales * 0),
    "a scale of NaN": lambda p: p._replace(scales=p.scales * float("nan")),
    "other inputs": lambda p: p._replace(in_features=p.in_features - 8),
}


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_packed_weight_is_refused(lie, text):
    packed, _ = random_codes(4, 512, text)
    if lie == "no scales" and text == "2:4 int8":
        return  # integers in a 2:4 pattern are packed, too: without kernels
    with pytest.raises(SparseForgeError):
        check_packed(LIES[lie](packed))


@pytest.mark.parametrize("text", [text for text in FORMATS if "int8" in text])
def test_int8_is_symmetric_and_its_scales_are_positive(text):
    packed, _ = random_codes(4, 512, text)
    for lie in (packed._replace(scales=-packed.scales), packed._replace(values=torch.full_like(packed.values, -128))):
        with pytest.raises(SparseForgeError, match=r"below zero|on no grid"):
            check_packed(lie)


def test_a_bitmask_that_lies_is_refused():
    packed, _ = random_codes(4, 64, "2:4 int4")
    with pytest.raises(SparseForgeError, match="exactly two bits"):
        check_packed(packed._replace(bitmask=packed.bitmask ^ 1))


# -- the kernels -----------------------------------------------------------------------------------------------------
@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(text, isa, dtype):
    format = parse_format(text)
    for out, groups, rows in [(16, 2, 1), (33, 4, 2), (5, 3, 3), (40, 16, 5), (40, 16, 11), (17, 5, 35)]:
        width = groups * (format.group or 20)
        packed, _ = random_codes(out, width, text, seed=out)
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = cpu.rows_linear(x, *packed, isa=isa)
        if in_tiles(isa, dtype, text) and rows >= MANY:
            assert_tiles_correct(got, x, packed)
            continue
        near, scales = rounded(x, isa)
        weight = unpack(packed).double()
        # ties of x's rounding may fall to either side, one step of one place each; float32 sums; y's own rounding
        ties = scales.amax() * weight.abs().amax() * 2
        sums = (near.abs() @ weight.abs().t()).amax() * width * torch.finfo(torch.float32).eps
        want = near @ weight.t()
        assert (got.double() - want).abs().amax() <= ties + sums + want.abs().amax() * torch.finfo(dtype).eps


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("text", FORMATS)
def test_a_row_has_the_same_bits_beside_any_number_of_others(text, isa):
    """Groups of rows of every size, and a width of whole runs, a part of one, and more than is kept at a time."""
    width = 2432 if text.endswith("128") else 1376
    packed, _ = random_codes(19, width, text)
    x = torch.randn(71, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone, _ = assert_rows_alike(lambda x: cpu.rows_linear(x, *packed, isa=isa), x, in_tiles(isa, x.dtype, text))
    near = rounded(x, isa)[0] @ unpack(packed).double().t()
    assert (alone.double() - near).abs().max() <= 0.02 * near.abs().max()


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(1, 70), st.integers(1, 24), st.integers(MANY, 140), st.integers(0, 99))
def test_many_rows(text, out, groups, rows, seed):
    """Of any width, incomplete steps of tile registers too, and any number of them, of either dtype."""
    packed, _ = random_codes(out, groups * (parse_format(text).group or 4), text, seed)
    generator, dtype = torch.Generator().manual_seed(seed), (torch.float32, torch.bfloat16)[seed % 4 // 2]
    x = torch.randn(rows, packed.in_features, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype) if seed % 2 else None
    for activation in ("none", "silu_mul") if out % 2 == 0 else ("none",):
        y = call(x, packed, bias, activation)
        if in_tiles(cpu.instruction_set(), dtype, text):
            assert_tiles_correct(y, x, packed, bias, activation)
        else:
            assert_codes_correct(y, x, packed, bias, activation, packed.in_features)  # or fewer


@needs_kernel
@pytest.mark.parametrize("text", ["2:4 int8", "dense int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_extremes(text, dtype):
    """Zeros, the largest and the least numbers, and what is none, each alone in its row."""
    packed, _ = random_codes(20, 200, text)
    x = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = call(x, packed)
    x[1], x[3], x[5, 7], x[7, 199] = 0, x[3] * 1e30, float("nan"), float("-inf")
    x[9] = x[9] * 1e-30
    y = call(x, packed)
    assert (y[1] == 0).all() and y[5].isnan().all() and y[7].isnan().all()
    torch.testing.assert_close(y[3] / 1e30, clean[3], rtol=0.02, atol=0.3)  # steps of x, rounded anew
    torch.testing.assert_close(y[9] * 1e30, clean[9], rtol=0.02, atol=0.3)
    others = [r for r in range(24) if r not in (1, 3, 5, 7, 9)]
    assert torch.equal(y[others], clean[others])


@needs_kernel
@pytest.mark.parametrize("text", FORMATS)
def test_the_rounding_of_x_is_all_that_differs_from_the_reference(text):
    packed, _ = random_codes(24, 640, text)
    x = torch.randn(3, 640, generator=torch.Generator().manual_seed(1))
    first = torch.arange(640) % 256 < prod(lanes(cpu.instruction_set()))
    x = torch.where(first, 127.0, x.round())  # integers: nothing is rounded
    assert torch.allclose(call(x, packed), reference(x, packed), rtol=1e-5, atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "silu_mul"])
def test_bias_and_activation(activation):
    packed, _ = random_codes(48, 256, "2:4 int4")
    x, bias = torch.randn(5, 256), torch.randn(48)
    near = reference(rounded(x)[0].float(), packed, bias, activation)
    assert torch.allclose(call(x, packed, bias, activation), near, rtol=0.02, atol=0.02)


@needs_kernel
@pytest.mark.parametrize("text", FORMATS)
def test_the_dense_weight(text):
    packed, _ = random_codes(19, 384, text)
    args = packed.values, packed.bitmask, "rows", 384, packed.scales
    assert torch.equal(DENSE_OP(*args), unpack(packed))
    assert torch.equal(cpu.rows_dense(*packed), unpack(packed))


@needs_kernel
def test_a_row_of_nan_spoils_itself_alone():
    packed, _ = random_codes(8, 256, "2:4 int8")
    x = torch.randn(3, 256)
    y = call(x, packed)
    x[1, 7] = float("nan")
    spoiled = call(x, packed)
    assert spoiled[1].isnan().all() and torch.equal(spoiled[[0, 2]], y[[0, 2]])
    x[1, 7] = float("inf")
    assert not call(x, packed)[1].isfinite().any()


@needs_kernel
def test_the_same_bits_for_any_number_of_threads():
    packed, _ = random_codes(300, 512, "2:4 int4")
    x, threads = torch.randn(9, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(x, packed)
        torch.set_num_threads(2)
        assert torch.equal(call(x, packed), one)
    finally:
        torch.set_num_threads(threads)


def test_rows_beyond_the_kernel_and_none_at_all():
    packed, _ = random_codes(16, 64, "dense int8")
    x = torch.randn(max(0, cpu.max_rows(torch.float32, 64, quantized=True)) + 1, 64)
    assert torch.allclose(call(x, packed), F.linear(x, unpack(packed)), atol=1e-4)
    assert call(x[:0], packed).shape == (0, 16)


@pytest.mark.parametrize(("rows", "width"), [(16, 64), (37, 72), (130, 320), (5, 8)])
@pytest.mark.parametrize("text", ["2:4 int8", "dense int8", "2:4 int4/32", "dense int4/32", "dense int4/128", "2:4 int4/128"])
def test_many_rows_of_bfloat16_meet_the_weight_rounded_to_it(text, rows, width):
    if "int4" in text:
        width = 128 * max(1, width // 128)
    packed, _ = random_codes(rows, width, text)
    x = torch.randn(max(0, cpu.max_rows(torch.bfloat16, width, quantized=True)) + 1, width).bfloat16()
    assert torch.equal(call(x, packed), F.linear(x, unpack(packed).bfloat16()))


@pytest.mark.parametrize("text", ["2:4 int8", "dense int4/32"])
def test_opcheck(text):
    packed, _ = random_codes(16, 128, text)
    x = torch.randn(2, 128, requires_grad=True)
    args = x, packed.values, packed.bitmask, "rows", 128, None, "none", packed.scales
    torch.library.opcheck(OP, args)


def test_gradients_reach_x():
    packed, _ = random_codes(16, 128, "2:4 int8")
    x = torch.randn(2, 128, requires_grad=True)
    call(x, packed).sum().backward()
    assert torch.allclose(x.grad, unpack(packed).sum(0).expand(2, -1), atol=1e-5)


def test_damaged_bits_reach_no_foreign_memory():
    packed, _ = random_codes(16, 72, "2:4 int8")
    damaged = Packed(packed.values, torch.full_like(packed.bitmask, 255), 72, packed.scales)
    assert call(torch.randn(2, 72), damaged).shape == (2, 16)
