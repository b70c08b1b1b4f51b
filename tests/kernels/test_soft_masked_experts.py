"""The operator against plain autograd, expert by expert: values, straight-through gradients, curvature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.kernels.soft_masked_linear import soft_masked_linear

shapes = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2)
)


def make(counts, width, out, beyond=0, transposed=False, dtype=torch.float32):
    """x, weight, a soft mask, and where the rows of each expert end; ``beyond`` rows belong to none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + beyond, width, generator=generator).to(dtype)
    weight = torch.randn(len(counts), *((width, out) if transposed else (out, width)), generator=generator).to(dtype)
    mask = torch.rand(weight.shape, generator=generator).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), mask, torch.tensor(counts, dtype=torch.int32).cumsum(0)


def one_by_one(x, weight, mask, counts, transposed, probe=None):
    """The same by the operator for one linear."""
    parts, rest = x.split([*counts, len(x) - sum(counts)])[:-1], x[sum(counts) :]
    probes = [None if probe is None else p for p in (weight if probe is None else probe)]
    each = zip(parts, weight, mask, probes, strict=True)
    outputs = [soft_masked_linear(part, w, m, None, p, transposed) for part, w, m, p in each]
    return torch.cat([*outputs, rest.new_zeros(len(rest), outputs[0].shape[1])])


@given(shapes, st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_expert_is_a_soft_masked_linear(shape, transposed):
    counts, width, out, beyond = shape
    x, weight, mask, ends = make(counts, width, out, beyond, transposed)
    for size in (weight.shape, (len(counts), width)):
        probe = torch.zeros(size, requires_grad=True)
        counter = torch.zeros(len(counts), requires_grad=True)
        got = EXPERTS_OP(x, weight, mask, ends, None, probe, transposed, "", counter)
        expected = one_by_one(x, weight, mask, counts, transposed, probe)
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        leaves = [x, weight, probe]
        *grads, seen = torch.autograd.grad(got, [*leaves, counter], upstream)
        assert seen.tolist() == counts
        wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
        for g, e in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e)


@pytest.mark.parametrize("transposed", [False, True])
def test_without_offsets_every_expert_has_as_many_rows(transposed):
    x, weight, mask, _ = make([3, 3], 4, 5, 0, transposed)
    stacked, bias = x.view(2, 3, 4), torch.randn(2, 1, 5, requires_grad=True)
    got = EXPERTS_OP(stacked, weight, mask, None, bias, None, transposed)
    w = weight * mask
    torch.testing.assert_close(got, torch.baddbmm(bias, stacked, w if transposed else w.mT))
    (grad,) = torch.autograd.grad(got.sum(), [bias])
    assert torch.equal(grad, torch.full_like(bias, 3))
    counter = torch.zeros(2, requires_grad=True)
    given = stacked * torch.tensor([[1.0, 0, 1], [0, 0, 1]])[..., None]  # the others went to other experts
    got = EXPERTS_OP(given, weight, mask, None, None, None, transposed, "", counter)
    (seen,) = torch.autograd.grad(got.sum(), [counter])
    assert seen.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    x, weight, mask, ends = make([2, 0, 3], 8, 4, dtype=dtype)
    probe = torch.zeros(weight.shape, dtype=torch.bfloat16, requires_grad=True)
    got = EXPERTS_OP(x.float(), weight, mask, ends, None, probe)
    assert got.dtype == dtype
    torch.testing.assert_close(got, one_by_one(x, weight, mask, [2, 0, 3], False), rtol=1e-2, atol=1e-2)
    (h,) = torch.autograd.grad(got.float().sum(), [probe])
    assert h.dtype == torch.bfloat16 and h[1].count_nonzero() == 0 and (h[0] >= 0).all() and h[0].any()


def test_an_expert_without_rows_is_not_read():
    x, weight, mask, ends = make([2, 0], 4, 3)
    with torch.no_grad():
        weight[1] = float("nan")
    y = EXPERTS_OP(x, weight, mask, ends)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, weight]))


def test_opcheck():
    x, weight, mask, ends = make([2, 0, 3], 4, 4)
    torch.library.opcheck(EXPERTS_OP, (x, weight, mask, ends), {"probe": torch.zeros(weight.shape, requires_grad=True)})
    torch.library.opcheck(EXPERTS_OP, (x, weight, mask, ends), {"counter": torch.zeros(3, requires_grad=True)})
    torch.library.opcheck(EXPERTS_OP, (x[:4].view(2, 2, 4).detach(), weight[:2].detach(), mask[:2], None))
