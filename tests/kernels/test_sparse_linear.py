"""The operator as users meet it: shapes, dtypes, gradients, compilation, autocast, errors."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import assert_correct, random_linear

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.packed import pack, unpack
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP, reference, sparse_linear

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


def apply(x, packed, bias=None, activation="none"):
    return sparse_linear(x, packed.values, packed.bitmask, "rows", packed.in_features, bias, activation)


@settings(max_examples=80)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from(list(ACTIVATIONS)),
    st.integers(0, 100),
)
def test_any_shape_and_dtype(out, groups, leading, dtype, activation, seed):
    packed, bias = random_linear(2 * out, 4 * groups, dtype, seed)
    x = torch.randn(*leading, 4 * groups).to(dtype)
    y = apply(x, packed, bias, activation)
    assert y.dtype == dtype and y.is_contiguous()
    assert_correct(y, x, packed, bias, activation)


def test_strides():
    packed, bias = random_linear(12, 20, torch.bfloat16)
    for x in (
        torch.randn(20, 6).bfloat16().t(),
        torch.randn(6, 40).bfloat16()[:, ::2],
        torch.randn(6, 24).bfloat16()[:, 3:23],
        torch.randn(1, 20).bfloat16().expand(6, 20),
        torch.randn(3, 20, 2).bfloat16().transpose(1, 2),
    ):
        assert_correct(apply(x, packed, bias), x, packed, bias)
        assert torch.equal(apply(x, packed, bias), apply(x.contiguous(), packed, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (2, 100, 20)])
def test_outputs_can_be_written_into(dtype, shape):
    packed, bias = random_linear(12, 20, dtype)
    for needs in (False, True):
        x = torch.randn(shape).to(dtype).requires_grad_(needs)
        y = apply(x, packed, bias)
        before = y.detach().clone()
        y += 1
        assert torch.equal(y, before + 1)
        if needs:
            y.sum().backward()


def test_more_rows_than_the_kernel_takes_go_through_the_dense_weight():
    for dtype in (torch.bfloat16, torch.float32):
        packed, bias = random_linear(10, 36, dtype)
        x = torch.randn(cpu.max_rows(dtype, 36) + 1, 36).to(dtype)
        assert torch.equal(apply(x, packed, bias, "silu_mul"), reference(x, packed, bias, "silu_mul"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (0,)])
def test_gradients_in_float64(activation, leading):
    packed, bias = random_linear(6, 12, torch.float64)
    x = torch.randn(*leading, 12, dtype=torch.float64).requires_grad_()
    function = lambda x, b: apply(x, packed, b, activation)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dense_linear(dtype, activation):
    packed, bias = random_linear(16, 36, dtype)
    x = torch.randn(4, 36).to(dtype).requires_grad_()
    bias.requires_grad_()
    y = apply(x, packed, bias, activation)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), g)
    expected = torch.autograd.grad(reference(x, packed, bias, activation), (x, bias), g)
    rounding = 4 * torch.finfo(dtype).eps  # forward, derivative, product, sum: each rounded once
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * b.abs().max().item())


def test_gradients_without_a_bias():
    packed, _ = random_linear(16, 36, torch.float32)
    x = torch.randn(4, 36).requires_grad_()
    for arguments in ((), (None,), (None, "silu")):
        y = OP(x, *packed[:2], "rows", 36, *arguments)
        expected = reference(x, packed, *arguments)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_lora_beside_a_packed_weight_learns():
    packed, bias = random_linear(16, 32, torch.float32)
    a, b = torch.randn(4, 32).requires_grad_(), torch.zeros(16, 4, requires_grad=True)
    x, target = torch.randn(64, 32), torch.randn(64, 16)
    optimizer, losses = torch.optim.Adam([a, b], 1e-2), []
    hidden = torch.nn.Parameter(torch.eye(32))
    for _ in range(20):
        inner = x @ hidden
        loss = F.mse_loss(apply(inner, packed, bias, "silu") + inner @ a.t() @ b.t(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and hidden.grad.abs().sum() > 0


def test_what_needs_no_gradient_gets_none():
    packed, bias = random_linear(8, 16, torch.float32)
    assert not apply(torch.randn(2, 16), packed, bias).requires_grad
    bias.requires_grad_()
    apply(torch.randn(2, 3, 16), packed, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 6.0)) and packed.values.grad is None


@pytest.mark.parametrize(
    ("dtype", "activation", "leading"), [(torch.bfloat16, "silu_mul", (2, 3)), (torch.float32, "gelu", ())]
)
def test_registration(dtype, activation, leading):
    packed, bias = random_linear(8, 36, dtype)
    x = torch.randn(*leading, 36).to(dtype).requires_grad_()
    torch.library.opcheck(OP, (x, *packed[:2], "rows", 36, bias.requires_grad_(), activation))
    torch.library.opcheck(OP, (x.detach(), *packed[:2], "rows", 36))
    torch.library.opcheck(DENSE_OP, (*packed[:2], "rows", 36))
    assert torch.Tag.pt2_compliant_tag in OP.tags and torch.equal(DENSE_OP(*packed[:2], "rows", 36), unpack(packed))
    with torch.device("meta"):
        assert OP(torch.empty(2, 3, 8), torch.empty(6, 4), torch.empty(6, 1, dtype=torch.uint8), "rows", 8,
                  None, "silu_mul").shape == (2, 3, 3)  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_for_any_number_of_rows(backend):
    packed, bias = random_linear(16, 36, torch.bfloat16)
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def step(x):
        return apply(x * 2, packed, bias, "silu_mul") + 1

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for rows in (7, 2, 16, 37, 200):
        x = torch.randn(rows, 36).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), step(x), rtol=2**-7, atol=2**-7)
    assert graphs.frame_count == 1


def test_compiled_gradients():
    packed, bias = random_linear(16, 36, torch.float32)
    x = torch.randn(5, 36).requires_grad_()

    def loss(x, bias):
        return apply(x, packed, bias, "gelu_tanh").square().sum()

    leaves = x, bias.requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, expected)


def test_export_keeps_the_operator_whole():
    packed, bias = random_linear(16, 36, torch.float32)

    class Sparse(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("values", packed.values)
            self.register_buffer("bitmask", packed.bitmask)
            self.register_buffer("bias", bias)

        def forward(self, x):
            return OP(x, self.values, self.bitmask, "rows", 36, self.bias, "relu")

    x = torch.randn(4, 36)
    program = torch.export.export(Sparse(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [OP]
    more = torch.randn(9, 36)
    assert torch.equal(program.module()(more), apply(more, packed, bias, "relu"))


def test_autocast_is_that_of_a_linear():
    packed, bias = random_linear(16, 36, torch.float32)
    x, bias = torch.randn(4, 36).requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = apply(x, packed, bias), F.linear(x, unpack(packed), bias)
    assert y.dtype == torch.bfloat16
    narrow = packed._replace(values=packed.values.bfloat16())
    assert_correct(y, x.bfloat16(), narrow, bias.bfloat16())
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(plain, (x, bias), g), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * b.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12)}, r"x of shape \[2, 12\] does not end in the packed weight's 16 inputs"),
        ({"x": torch.tensor(1.0)}, "does not end in"),
        ({"x": torch.zeros(2, 16, dtype=torch.bfloat16)}, "x is torch.bfloat16 but the packed weight is torch.float32"),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(2, 16, device="meta")}, "x is on meta"),
        ({"bias": torch.zeros(16)}, r"the bias must be \[7\] torch.float32 on cpu"),
        ({"bias": torch.zeros(7, dtype=torch.bfloat16)}, r"the bias must be \[7\]"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of none, relu"),
        ({"activation": "silu_mul"}, "silu_mul halves the outputs, but this weight has 7"),
        ({"layout": "columns"}, "no kernel for a packed weight of layout 'columns' on cpu"),
        ({"values": torch.zeros(7, 4)}, "do not belong to 16"),
        ({"meta": torch.zeros(7, 3, dtype=torch.uint8)}, "does not belong to values"),
        ({"meta": torch.zeros(7, 2, dtype=torch.int32)}, "uint8"),
    ],
)
def test_wrong_input_gets_one_sentence(change, message):
    packed = pack(torch.zeros(7, 16))
    arguments = {"x": torch.zeros(2, 16), "values": packed.values, "meta": packed.bitmask, "layout": "rows",
                 "in_features": 16, **change}  # fmt: skip
    with pytest.raises(SparseForgeError, match=message):
        sparse_linear(**arguments)
