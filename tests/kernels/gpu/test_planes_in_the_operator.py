"""Layout ``planes`` behind sparse_linear: the products of ``rows``, on a CPU in plain torch, on a GPU by Triton."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import assert_correct, random_linear

from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes_linear import as_planes
from sparseforge_fx.kernels.packed import unpack
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP, sparse_linear

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@cache
def on_the_gpu(shape, dtype):
    packed, bias = random_linear(*shape, dtype)
    return packed._replace(values=packed.values.cuda(), bitmask=packed.bitmask.cuda()), bias.cuda()


def apply(x, packed, bias=None, activation="none"):
    values, meta = (t.to(x.device) for t in as_planes(packed))
    bias = None if bias is None else bias.to(x.device)
    return sparse_linear(x, values, meta, "planes", packed.in_features, bias, activation)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from(list(ACTIVATIONS)),
    st.integers(0, 100),
)
def test_any_shape_and_dtype(out, groups, leading, dtype, activation, seed):
    packed, bias = random_linear(2 * out, 4 * groups, dtype, seed)
    x = torch.randn(*leading, 4 * groups).to(dtype)
    assert_correct(apply(x, packed, bias, activation), x, packed, bias, activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dense_weight(device, dtype):
    packed, _ = random_linear(24, 100, dtype)
    values, meta = (t.to(device) for t in as_planes(packed))
    assert torch.equal(DENSE_OP(values, meta, "planes", 100).cpu(), unpack(packed))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device):
    packed, bias = random_linear(24, 64, torch.float32)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(apply(x, packed, bias, "silu").square().sum(), x)
    dense = unpack(packed).to(device)
    want = torch.nn.functional.silu(torch.nn.functional.linear(x, dense, bias.to(device)))
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("shape", [(4096, 4096), (960, 576), (576, 1536), (11008, 4096), (200, 100)])
    @pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 128, 129, 300])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_and_their_bits(self, shape, m, dtype):
        packed, bias = on_the_gpu(shape, dtype)
        x = torch.randn(m, shape[1], device="cuda").to(dtype)
        first = apply(x, packed, bias, "silu")
        assert torch.equal(first, apply(x, packed, bias, "silu")), "the same bits on every run"
        assert_correct(first, x, packed, bias, "silu")

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("m", [1, 4, 16, 200])
    def test_activations(self, activation, m):
        packed, bias = random_linear(256, 512, torch.bfloat16)
        x = torch.randn(m, 512).bfloat16()
        assert_correct(apply(x.cuda(), packed, bias, activation).cpu(), x, packed, bias, activation)

    def test_compiled_in_one_graph(self):
        packed, bias = random_linear(256, 512, torch.bfloat16)
        values, meta = (t.cuda() for t in as_planes(packed))
        run = torch.compile(
            lambda x: OP(x * 2, values, meta, "planes", 512, bias.cuda(), "relu") + 1, fullgraph=True, dynamic=True
        )
        for m in (1, 16, 300):
            x = torch.randn(m, 512, device="cuda").bfloat16()
            torch.testing.assert_close(run(x), OP(x * 2, values, meta, "planes", 512, bias.cuda(), "relu") + 1)

    def test_a_whole_model(self, tiny):
        import copy

        import sparseforge_fx as sf

        model = copy.deepcopy(tiny("llama").model).cuda().bfloat16()
        sf.sparsify(model)
        ids = torch.randint(3, 90, (2, 9), device="cuda")
        want = model(ids).logits
        graph = sf.lower(model, gate=False)
        modules = copy.deepcopy(model)
        sf.lower_modules(modules, gate=False)
        for got in (graph(input_ids=ids).logits, modules(ids).logits):
            assert (got - want).norm() < 0.02 * want.norm()
        assert sf.lower(model, tokens=[1, 16]).report["table"]
