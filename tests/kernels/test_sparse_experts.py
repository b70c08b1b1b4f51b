"""Packed experts against dense ones; what no token chose is not read."""

import pytest
import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.layouts import PAIRS, ROWS
from sparseforge_fx.kernels.packed import pack, pack_codes, unpack
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP, sparse_experts
from sparseforge_fx.methods.rounding import round_weight, stacked
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

OUT, WIDTH = 12, 16


def make(counts, beyond=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(counts), OUT, WIDTH, generator=generator)
    weight = (weight * hard_mask(weight.abs(), TWO_FOUR)).to(dtype)
    each = [ROWS.convert(pack(w)) for w in weight]
    values, meta = (torch.stack(t) for t in zip(*each, strict=True))
    x = torch.randn(sum(counts) + beyond, WIDTH, generator=generator).to(dtype)
    return x, weight, values, meta, torch.tensor(counts, dtype=torch.int32).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[3, 0, 1], [0, 0, 0], [5], [1, 1, 1, 1]], ids=str)
def test_rows_go_to_their_experts(counts, dtype):
    x, weight, values, meta, ends = make(counts, 2, dtype)
    x.requires_grad_()
    y = PACKED_EXPERTS_OP(x, values, meta, "rows", WIDTH, ends)
    of_row = [e for e, n in enumerate(counts) for _ in range(n)]
    expected = torch.zeros(len(x), OUT)
    wanted = torch.zeros(len(x), WIDTH)
    for row, e in enumerate(of_row):
        expected[row] = weight[e].float() @ x[row].detach().float()
        wanted[row] = weight[e].float().sum(0)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(grad.float(), wanted, rtol=tolerance, atol=tolerance)


def test_as_many_rows_for_each_and_a_bias():
    x, weight, values, meta, _ = make([2, 2, 2])
    bias = torch.randn(3, 1, OUT)
    got = PACKED_EXPERTS_OP(x.view(3, 2, WIDTH), values, meta, "rows", WIDTH, None, bias)
    torch.testing.assert_close(got, torch.baddbmm(bias, x.view(3, 2, WIDTH), weight.mT))


def test_an_expert_without_rows_is_not_read():
    x, _, values, meta, ends = make([2, 0, 1])
    expected = PACKED_EXPERTS_OP(x, values, meta, "rows", WIDTH, ends)
    values[1] = float("nan")
    assert torch.equal(PACKED_EXPERTS_OP(x, values, meta, "rows", WIDTH, ends), expected)


def test_opcheck():
    x, _, values, meta, ends = make([2, 0, 1])
    torch.library.opcheck(PACKED_EXPERTS_OP, (x.requires_grad_(), values, meta, "rows", WIDTH, ends))
    torch.library.opcheck(PACKED_EXPERTS_OP, (x.detach().view(3, 1, WIDTH), values, meta, "rows", WIDTH, None))


@pytest.mark.parametrize("form", ["2:4 int8", "dense int8", "2:4 int4/32", "dense int4/32", "2:4 int4/16", "dense int4/16"])
@pytest.mark.parametrize("layout", [ROWS, PAIRS], ids=lambda layout: layout.name)
def test_codes_in_every_layout(form, layout):
    """x is rounded to 8 bits: an error of 1/254 of its largest in a block, for each of the products of a row."""
    generator = torch.Generator().manual_seed(1)
    format, out, width = parse_format(form), 24, 64
    if not layout.knows(format):
        pytest.skip("not kept in this layout")
    weight = torch.randn(3, out, width, generator=generator)
    if format.is_sparse:
        weight *= hard_mask(weight.abs(), TWO_FOUR)
    rounded = stacked([round_weight(w, format) for w in weight])
    packed = pack_codes(rounded.codes, rounded.scales, format)
    values, meta = layout.convert_each(packed)
    again = layout.restore_each(values, meta, width, packed.scales)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], packed[:2], strict=True))
    x = torch.randn(5, width, generator=generator)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    y = PACKED_EXPERTS_OP(x, values, meta, layout.name, width, ends, None, packed.scales)
    dense = unpack(packed)
    want = torch.cat([x[:2] @ dense[0].T, x[2:] @ dense[2].T])
    bound = x.abs().max() / 254 * dense.abs().sum(-1).max()
    assert float((y - want).abs().max()) <= float(bound)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        PACKED_EXPERTS_OP(x, values, meta, layout.name, width, ends, None, packed.scales).sum(), [x]
    )
    torch.testing.assert_close(grad, torch.cat([dense[0].sum(0).expand(2, -1), dense[2].sum(0).expand(3, -1)]))
    torch.library.opcheck(PACKED_EXPERTS_OP, (x, values, meta, layout.name, width, ends, None, packed.scales))


# -- the C++ loop over experts beside the Python one -------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counts", [[3, 0, 1, 7], [3, 1, 1, 6], [1] * 12], ids=str)  # one by one, and shared out
def test_both_loops_give_the_same_bits(dtype, index, counts):
    x, _, values, meta, ends = make(counts, 12 - sum(counts) + 2, dtype)
    cpu.available() and cpu.instruction_set()
    given = (x, values, meta, "rows", WIDTH)
    spread = torch.stack([ends, ends], 1).to(index)[:, 0]  # strides of a view
    with torch.no_grad():
        assert torch.equal(PACKED_EXPERTS_OP(*given, spread), sparse_experts._init_fn(*given, ends))
        stacked_x = x[:12].view(len(counts), -1, WIDTH)
        got = PACKED_EXPERTS_OP(stacked_x, *given[1:], None)
        assert torch.equal(got, sparse_experts._init_fn(stacked_x, *given[1:], None))
        mixed = PACKED_EXPERTS_OP(x.t().contiguous().t(), *given[1:], ends)
        assert torch.equal(mixed, sparse_experts._init_fn(*given, ends))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_experts_that_are_shared_out_over_threads_know_the_callers_modes(mode):
    """Threads of the pool have none of their own: inference mode ended there, autocast rounded some experts only."""
    x, weight, values, meta, ends = make([700] * 8)  # more rows than the kernels serve: torch's product is in it, too
    x.requires_grad_(not mode().__class__.__name__.startswith("autocast"))
    if not cpu.available():
        pytest.skip("only the C++ loop shares experts out")
    cpu.instruction_set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with mode():
            y = PACKED_EXPERTS_OP(x, values, meta, "rows", WIDTH, ends)
    finally:
        torch.set_num_threads(before)
    assert not y.requires_grad
    wanted = torch.bmm(x.detach().view(8, 700, WIDTH), weight.mT).view(-1, OUT)
    torch.testing.assert_close(y.clone(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ends", [[3, 2, 5], [1, 2, 99], [-1, 0, 4], [2, 4], [2, 4, 5, 6], [[2, 4, 6]], [1.0, 2.0, 3.0]], ids=str
)
def test_ends_that_are_out_of_order_or_beyond_the_rows_are_refused(ends):
    x, _, values, meta, _ = make([2, 2, 2])
    given = (x, values, meta, "rows", WIDTH, torch.tensor(ends))
    for multiply in (PACKED_EXPERTS_OP, sparse_experts._init_fn):
        with torch.no_grad(), pytest.raises(SparseForgeError, match="offsets"):
            multiply(*given)


@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (4, 2, WIDTH), (6, WIDTH)], ids=str)
def test_rows_of_other_experts_are_refused(shape):
    _, _, values, meta, _ = make([2, 2, 2])
    with torch.no_grad(), pytest.raises(SparseForgeError, match="without offsets"):
        PACKED_EXPERTS_OP(torch.zeros(shape), values, meta, "rows", WIDTH, None)


def test_what_does_not_fit_is_refused_in_words():
    x, _, values, meta, ends = make([2, 2, 2])
    with torch.no_grad(), pytest.raises(SparseForgeError, match="does not end in the packed weight's 16 inputs"):
        PACKED_EXPERTS_OP(x[:, :8], values, meta, "rows", WIDTH, ends)
    with torch.no_grad(), pytest.raises(SparseForgeError, match="cast one of them"):
        PACKED_EXPERTS_OP(x.bfloat16(), values, meta, "rows", WIDTH, ends)
    with torch.no_grad(), pytest.raises(SparseForgeError, match="layout"):
        PACKED_EXPERTS_OP(x, values, meta, "nothing", WIDTH, ends)
