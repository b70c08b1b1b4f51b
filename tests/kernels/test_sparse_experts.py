"""Packed experts against dense ones; what no token chose is not read."""

import pytest
import torch

from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
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
