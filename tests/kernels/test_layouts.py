"""Every layout: there and back bit for bit, the product of the reference, and what it says it cannot take.

The products of cuSPARSELt and CUTLASS need a GPU. Here stand-ins for their operators compute what PyTorch documents, on
a blob that is as large as cuSPARSELt's; the same tests run the real ones where there is a device for them.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from code_cases import assert_codes_correct, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import assert_correct, random_linear

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import SPARSE, parse_format
from sparseforge_fx.kernels import sparse_linear
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu import cusparselt, cutlass
from sparseforge_fx.kernels.layouts import (
    CUSPARSELT,
    CUTLASS,
    LAYOUTS,
    NATIVE,
    PAIRS,
    PLANES,
    ROWS,
    find_target,
    layouts_of,
    native_layout,
)
from sparseforge_fx.kernels.packed import Packed, pack, unpack, unpack_codes
from sparseforge_fx.kernels.sparse_linear import DENSE_OP

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def _compress(dense):
    values, bitmask, *_ = pack(dense)
    return torch.cat([values.flatten(), bitmask.flatten().view(dense.dtype)])


def _decompress(blob, out):
    half = blob.numel() * 8 // 9 if blob.element_size() == 2 else blob.numel() * 4 // 5
    width = 2 * half // out
    values, bitmask = blob.flatten().split([half, blob.numel() - half])
    return unpack(Packed(values.view(out, -1), bitmask.contiguous().view(torch.uint8).view(out, -1), width))


class Calls(list):
    """What the stand-ins were called with."""


def test_a_cpu_has_neither():
    assert "not available on cpu" in CUSPARSELT.refuses(32, 64, torch.bfloat16, CPU, SPARSE)
    assert "no CUTLASS kernels" in CUTLASS.refuses(32, 64, torch.bfloat16, CPU, SPARSE)


@pytest.fixture(scope="module")
def calls():
    seen = Calls()

    def product(blob, dense, bias=None, alpha=None, out_dtype=None, alg_id=0, transpose_result=False):
        assert transpose_result and dense.shape[1] % (16 // blob.element_size()) == 0 and not dense.is_contiguous()
        seen.append(alg_id)
        weight = _decompress(blob, blob.shape[0])
        if blob.dtype != torch.int8:
            return F.linear(dense.t(), weight, bias)
        sums = F.linear(dense.t().double(), weight.double()) * (1 if alpha is None else alpha.double())
        return sums.to(out_dtype or torch.int8)

    def search(blob, dense, out_dtype, transpose_result):
        return dense.shape[1]  # the bucket itself, to see which one was asked for

    def addmm(bias, values, meta, dense):
        assert dense.shape[1] % 8 == 0
        return F.linear(dense.t(), cutlass.cutlass_dense(values, meta, 2 * values.shape[1]), bias).t()

    def mm(values, meta, dense):
        return addmm(None, values, meta, dense)

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            for name, function in (("_cslt_compress", _compress), ("_cslt_sparse_mm", product),
                                   ("_cslt_sparse_mm_search", search), ("_sparse_semi_structured_mm", mm),
                                   ("_sparse_semi_structured_addmm", addmm)):  # fmt: skip
                patch.setattr(torch, name, function)
            for module in (cusparselt, cutlass):
                patch.setattr(module, "available", lambda device: True)
            for layout in (CUSPARSELT, CUTLASS):
                patch.setitem(LAYOUTS, layout.name, layout._replace(elsewhere=layout.kernels["cuda"]))
            patch.setattr(cusparselt, "_algorithms", {})
        yield seen


SIDES = {"cpu": (64, 256), "cuda": (4096, 4096)}  # cuSPARSELt 0.8 takes no small ones on an H100


def usable(layout, device, dtype=torch.bfloat16, form=SPARSE, sides=(64, 128)):
    if device == "cuda" and (reason := layout.refuses(*sides, dtype, torch.device("cuda", 0), form)):
        pytest.skip(reason)
    return layout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_there_and_back(calls, name, device, rows, columns, dtype, empty, seed):
    """Groups with one survivor and with none, too."""
    layout = usable(LAYOUTS[name], device, dtype)
    if not layout.knows(SPARSE):
        return  # test_pairs.py
    dense = unpack(random_linear(32 * rows, 64 * columns, dtype, seed)[0])
    dense[torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed)) < empty] = 0
    dense = dense.to(device)
    values, meta = layout.convert(pack(dense))
    assert values.shape[0] == meta.shape[0] == dense.shape[0] and values.dtype == dtype
    assert values.nbytes + meta.nbytes <= 9 / 16 * dense.nbytes
    assert torch.equal(unpack(layout.restore(values, meta, dense.shape[1])), dense)
    assert torch.equal(DENSE_OP(values, meta, layout.name, dense.shape[1]), dense)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_products(calls, name, device, activation):
    out, width = SIDES[device]
    layout = usable(LAYOUTS[name], device, sides=SIDES[device])
    packed, bias = random_linear(out, width, torch.bfloat16)
    values, meta = layout.convert(Packed(*(t.to(device) for t in packed[:2]), width))
    for shape in ((3,), (16,), (2, 5), (0,), ()):
        x = torch.randn(*shape, width).bfloat16()
        for b in (bias, None):
            y = sparse_linear.sparse_linear(
                x.to(device), values, meta, name, width, None if b is None else b.to(device), activation
            )
            assert_correct(y.cpu(), x, packed, b, activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["planes", "cusparselt"])
@pytest.mark.parametrize("text", ["2:4 int8", "2:4 int4/32", "2:4 int4/128"])
def test_codes(calls, name, text, device):
    """There and back, and products: of planes with x as it is, of cuSPARSELt with rows of x in 8 bits."""
    layout = LAYOUTS[name]
    if not layout.knows(parse_format(text)):
        return
    (out, width), form = SIDES[device], parse_format(text)
    usable(layout, device, form=form, sides=SIDES[device])
    packed, codes = random_codes(out, width, text)
    here = packed._replace(**{name: getattr(packed, name).to(device) for name in ("values", "bitmask", "scales")})
    values, meta = layout.convert(here)
    back = layout.restore(values, meta, width, here.scales)
    assert torch.equal(unpack_codes(back), codes.to(device)) and back.format == form
    dense = DENSE_OP(values, meta, name, width, here.scales)
    assert torch.equal(dense, unpack(here))
    bias = torch.randn(out)
    for rows, dtype, activation in itertools.product((1, 4, 9, 140), (torch.bfloat16, torch.float16), ACTIVATIONS):
        x, b = torch.randn(rows, width).to(dtype).to(device), bias.to(dtype).to(device)
        y = sparse_linear.sparse_linear(x, values, meta, name, width, b, activation, here.scales)
        assert_codes_correct(y, x, here, b, activation, rounded_to=width if name == "cusparselt" else None)
    x = torch.full((3, width), float("nan"), dtype=torch.bfloat16, device=device)
    x[1] = 0
    y = sparse_linear.sparse_linear(x, values, meta, name, width, None, "none", here.scales)
    assert y[[0, 2]].isnan().all() and (y[1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_gradients_and_opcheck(calls, name, device):
    out, width = SIDES[device]
    layout = usable(LAYOUTS[name], device, sides=SIDES[device])
    packed, bias = random_linear(out, width, torch.bfloat16)
    values, meta = layout.convert(Packed(*(t.to(device) for t in packed[:2]), width))
    x = torch.randn(8, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = bias.to(device)
    (got,) = torch.autograd.grad(sparse_linear.OP(x, values, meta, name, width, bias, "none").float().sum(), x)
    want = unpack(packed).float().sum(0).to(device).expand(8, -1)
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0.1)
    torch.library.opcheck(sparse_linear.OP, (x.detach(), values, meta, name, width, bias, "none"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the stand-ins")
def test_the_searched_algorithm_is_kept_per_bucket(calls):
    packed, _ = random_linear(48, 96, torch.bfloat16)
    values, meta = CUSPARSELT.convert(packed)
    calls.clear()
    for rows in (1, 8, 9, 16, 200):
        sparse_linear.OP(torch.randn(rows, 96).bfloat16(), values, meta, "cusparselt", 96, None, "none")
    assert calls == [8, 8, 16, 16, 256]
    CUSPARSELT.tune(torch.randn(1024, 96), values, meta, 96, None)
    assert {key[-1] for key in cusparselt._algorithms if key[2:4] == (48, 96)} == {8, 16, 256, 1024}


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the stand-ins")
def test_what_is_refused(calls, monkeypatch):
    assert "multiples of 16, not 24 x 16" in CUSPARSELT.refuses(24, 16, torch.bfloat16, CPU, SPARSE)
    assert "not torch.float32" in CUSPARSELT.refuses(16, 16, torch.float32, CPU, SPARSE)
    assert "multiples of 32 x 64, not 32 x 32" in CUTLASS.refuses(32, 32, torch.float16, CPU, SPARSE)
    assert "not torch.float32" in CUTLASS.refuses(32, 64, torch.float32, CPU, SPARSE)
    assert all(o.refuses(32, 64, torch.float16, CPU, SPARSE) is None for o in LAYOUTS.values() if o is not PAIRS)
    assert ROWS.refuses(3, 5, torch.float32, CPU, SPARSE) is PLANES.refuses(3, 5, torch.float32, CPU, SPARSE) is None
    int8, int4 = parse_format("2:4 int8"), parse_format("2:4 int4")
    monkeypatch.setattr(cusparselt, "_stack", lambda device: (800, (9, 0)))
    assert "stops GPUs" in CUSPARSELT.refuses(8192, 2048, torch.bfloat16, CPU, SPARSE)
    assert CUSPARSELT.refuses(8192, 4096, torch.bfloat16, CPU, SPARSE) is None
    monkeypatch.undo()
    assert "multiples of 32, not 48 x 64" in CUSPARSELT.refuses(48, 64, torch.bfloat16, CPU, int8)
    fine = parse_format("2:4 int4/16")
    for layout, form in ((CUSPARSELT, int4), (CUTLASS, int8), (PLANES, parse_format("dense int8")), (PLANES, fine)):
        assert "no kernels for" in layout.refuses(64, 64, torch.bfloat16, CPU, form)
    for layout in (CUSPARSELT, CUTLASS):
        with pytest.raises(SparseForgeError, match="keep this weight dense"):
            layout.convert(random_linear(24, 40, torch.bfloat16)[0])


def test_what_may_be_stacked_and_saved():
    """Rows of two weights one after the other are the rows of the stacked weight, where a layout says so."""
    first, second = (random_linear(32, 64, torch.bfloat16, seed)[0] for seed in (0, 1))
    both = pack(torch.cat([unpack(first), unpack(second)]))
    for layout in LAYOUTS.values():
        if layout.by_rows and layout.knows(SPARSE):
            parts = zip(layout.convert(first), layout.convert(second), layout.convert(both), strict=True)
            assert all(torch.equal(torch.cat([a, b]), c) for a, b, c in parts)
    assert [name for name, layout in LAYOUTS.items() if not layout.durable] == ["cusparselt", "cutlass"]


def test_targets():
    assert find_target("auto", CPU) == find_target("cpu", CPU) == layouts_of(CPU) == (ROWS, PAIRS)
    with pytest.raises(SparseForgeError, match="unknown target"):
        find_target("tpu", CPU)
    with pytest.raises(SparseForgeError, match="no sparse kernels for meta"):
        find_target("auto", torch.device("meta"))
    with pytest.raises(SparseForgeError, match="move the model"):
        find_target("cpu", torch.device("cuda"))


def test_what_a_device_has_and_in_which_order():
    assert [layout.name for layout in layouts_of(torch.device("cuda"))] == ["planes", "cusparselt", "cutlass"]
    native = lambda kind, text: native_layout(torch.device(kind), parse_format(text), 64, 128, torch.bfloat16)  # noqa: E731
    assert [native(kind, "2:4") for kind in ("cpu", "cuda", "meta")] == [ROWS, PLANES, ROWS]
    assert [native("cuda", text) for text in ("2:4 int8", "2:4 int4", "dense int8", "2:4 int4/16")] == [PLANES, PLANES, ROWS, ROWS]
    assert sorted(NATIVE) == sorted(LAYOUTS)
