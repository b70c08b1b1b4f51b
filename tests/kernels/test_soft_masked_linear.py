"""The operator against plain autograd where the two must agree, and against per-token loops where they must not."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from rounding import same_products

from sparseforge_fx.kernels.soft_masked_linear import OP, soft_masked_linear
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}  # (rtol, atol)
LEADING = [(), (3,), (2, 3), (2, 1, 3)]
IN, OUT = 12, 5


def make(dtype, leading, transposed, bias):
    x = torch.randn(*leading, IN).to(dtype).requires_grad_()
    weight = torch.randn(*((IN, OUT) if transposed else (OUT, IN))).to(dtype).requires_grad_()
    b = torch.randn(OUT).to(dtype).requires_grad_() if bias else None
    return x, weight, b


def dense(x, weight, bias, transposed):
    return F.linear(x, weight.t() if transposed else weight, bias)


def gradients(y, *inputs):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, [t for t in inputs if t is not None], upstream), upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_ones_is_the_dense_linear(dtype):
    for leading, transposed, bias in itertools.product(LEADING, (False, True), (False, True)):
        x, weight, b = make(dtype, leading, transposed, bias)
        plain = dense(x, weight, b, transposed)
        masked = OP(x, weight, torch.ones_like(weight), b, None, transposed)
        assert same_products(masked, plain)
        expected, got = gradients(plain, x, weight, b)[0], gradients(masked, x, weight, b)[0]
        assert all(map(same_products, got, expected)), (leading, transposed, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients_are_those_of_the_docstring(dtype):
    for leading, transposed, bias in itertools.product(LEADING, (False, True), (False, True)):
        x, weight, b = make(dtype, leading, transposed, bias)
        mask = torch.rand_like(weight).detach().requires_grad_()
        y = soft_masked_linear(x, weight, mask, b, None, transposed)
        assert same_products(y, dense(x, weight * mask, b, transposed)), "the value is that of the masked weight"
        (gx, gw, *gb), g = gradients(y, x, weight, b)
        close = dict(zip(("rtol", "atol"), TOLERANCE[dtype], strict=True))
        w_out_in, m_out_in = (weight.t(), mask.t()) if transposed else (weight, mask)
        torch.testing.assert_close(gx, (g.double() @ (w_out_in * m_out_in).double()).to(dtype), **close)
        straight_through = torch.einsum("to,ti->oi", g.double().reshape(-1, OUT), x.double().reshape(-1, IN))
        torch.testing.assert_close(gw.t() if transposed else gw, straight_through.to(dtype), **close)
        if bias:
            torch.testing.assert_close(gb[0], g.double().reshape(-1, OUT).sum(0).to(dtype), **close)
        assert torch.autograd.grad(soft_masked_linear(x, weight, mask, b, None, transposed).sum(), mask,
                                   allow_unused=True) == (None,)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_is_a_loop_over_tokens(dtype):
    for leading, transposed in itertools.product(LEADING, (False, True)):
        x, weight, b = make(dtype, leading, transposed, True)
        mask = torch.rand_like(weight).detach()
        matrix = torch.zeros(
            weight.shape, dtype=torch.bfloat16 if dtype == torch.float16 else dtype, requires_grad=True
        )
        vector = torch.zeros(IN, requires_grad=True)
        y = OP(x, weight, mask, b, matrix, transposed)
        assert same_products(y, OP(x, weight, mask, b, None, transposed)), "a probe changes no value"
        (got,), g = gradients(y, matrix)
        (inputs,), _ = gradients(OP(x, weight, mask, b, vector, transposed), vector)
        expected = torch.zeros(OUT, IN, dtype=torch.float64)
        second_moment = torch.zeros(IN, dtype=torch.float64)
        for g_token, x_token in zip(g.double().reshape(-1, OUT), x.detach().double().reshape(-1, IN), strict=True):
            expected += torch.outer(g_token, x_token).square()
            second_moment += x_token.square()
        assert got.dtype == matrix.dtype and inputs.dtype == torch.float32
        tolerance = 2e-2 if matrix.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close((got.t() if transposed else got).double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(inputs.double(), second_moment, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(2, 3), (6,)])
def test_rows_of_padding_are_not_in_the_probe_of_inputs(lead):
    x, weight, _ = make(torch.float32, lead, False, False)
    real = torch.tensor([[1, 1, 0], [1, 0, 0]])
    vector = torch.zeros(IN, requires_grad=True)
    y = OP(x, weight, torch.ones_like(weight), None, vector, False, real)
    assert torch.equal(y, OP(x, weight, torch.ones_like(weight)))
    y.sum().backward()
    rows = x.detach().reshape(-1, IN)[real.flatten().bool()]
    torch.testing.assert_close(vector.grad, rows.square().sum(0))


def test_small_float16_gradients_do_not_underflow_in_the_probe():
    x, weight, _ = make(torch.float16, (4,), False, False)
    probe = torch.zeros(weight.shape, dtype=torch.bfloat16, requires_grad=True)
    OP(x, weight, torch.ones_like(weight), None, probe).backward(torch.full((4, OUT), 1e-6, dtype=torch.float16))
    assert (probe.grad > 0).all()


def test_gradients_and_probes_accumulate_over_micro_batches():
    x, weight, _ = make(torch.float32, (6,), False, False)
    mask, probe = torch.rand_like(weight).detach(), torch.zeros(()).expand(OUT, IN).requires_grad_()
    g = torch.randn(6, OUT)
    OP(x, weight, mask, None, probe).backward(g)
    whole = weight.grad.clone(), probe.grad.clone()
    weight.grad = probe.grad = None
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        OP(x[part], weight, mask, None, probe).backward(g[part])
    torch.testing.assert_close((weight.grad, probe.grad), whole)


def test_what_needs_no_gradient_gets_none():
    x, weight, b = make(torch.float32, (3,), False, True)
    y = OP(x.detach(), weight.detach(), torch.ones_like(weight), b)
    y.sum().backward()
    assert torch.equal(b.grad, torch.full((OUT,), 3.0)) and x.grad is None and weight.grad is None
    assert not OP(x.detach(), weight.detach(), torch.ones_like(weight)).requires_grad
    assert OP(torch.zeros(0, IN), weight, torch.ones_like(weight)).shape == (0, OUT)


def test_autograd_differentiates_it_twice():
    """At a mask of ones: Hutchinson's Hv needs a second derivative."""
    x, weight, b = make(torch.float64, (4,), False, True)
    v = torch.randn_like(weight)
    products = []
    for y in (dense(x, weight, b, False), OP(x, weight, torch.ones_like(weight), b)):
        (grad,) = torch.autograd.grad(y.tanh().square().sum(), weight, create_graph=True)
        products += torch.autograd.grad(grad, weight, v)
    torch.testing.assert_close(products[0], products[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_is_that_of_a_linear(transposed):
    x, weight, b = make(torch.float32, (2, 3), transposed, True)
    probe = torch.zeros_like(weight).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = dense(x, weight, b, transposed)
        masked = OP(x, weight, torch.ones_like(weight), b, probe, transposed)
    assert masked.dtype == torch.bfloat16 and same_products(masked, plain)
    expected, got = gradients(plain, x, weight, b)[0], gradients(masked, x, weight, b, probe)[0]
    assert all(map(same_products, got[:3], expected)) and all(t.dtype == torch.float32 for t in got)
    assert (got[3] > 0).all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    def step(x, weight, mask, bias, probe):
        return torch.relu(soft_masked_linear(x, weight, mask, bias, probe)).square().sum()

    x, weight, b = make(torch.float32, (2, 3), False, True)
    mask, probe = hard_mask(torch.rand_like(weight), TWO_FOUR).float(), torch.zeros_like(weight).requires_grad_()
    inputs = x, weight, mask, b, probe
    leaves = x, weight, b, probe
    expected = torch.autograd.grad(step(*inputs), leaves)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), leaves), expected)


def test_registration():
    x, weight, b = make(torch.float32, (3,), False, True)
    args = (x, weight, torch.ones_like(weight), b, None, False)
    torch.library.opcheck(OP, args, test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.pt2_compliant_tag in OP.tags
    with torch.device("meta"):
        assert OP(torch.empty(2, 3, IN), torch.empty(OUT, IN), torch.empty(OUT, IN)).shape == (2, 3, OUT)
