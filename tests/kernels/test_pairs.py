"""The layout of pairs: there and back, its kernel, what it refuses, and how lowering comes to it."""

import copy

import pytest
import torch
from code_cases import (
    MANY,
    assert_codes_correct,
    assert_rows_alike,
    assert_tiles_correct,
    in_tiles,
    random_codes,
    rounded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import SPARSE, Format, parse_format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.layouts import PAIRS, ROWS, layouts_of
from sparseforge_fx.kernels.packed import Packed, unpack
from sparseforge_fx.kernels.pairs import most_rows, pairs_product
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP, reference

CPU = torch.device("cpu")
TEXTS = ["2:4 int8", "2:4 int4/32", "2:4 int4/128"]
ISAS = [isa for isa in cpu.instruction_sets() if cpu.pairs_rows(isa)]
needs_kernel = pytest.mark.skipif(not ISAS, reason="needs a CPU with AVX2 and a C++ compiler")


def call(x, packed, bias=None, activation="none"):
    values, places = PAIRS.convert(packed)
    return OP(x, values, places, "pairs", packed.in_features, bias, activation, packed.scales)


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(a == b if isinstance(a, int) else torch.equal(a, b) for a, b in pairs)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(TEXTS), st.integers(0, 99))
def test_there_and_back(fours, steps, text, seed):
    """Bit for bit, by the C++ kernel where there is one and in plain torch, in no more bytes."""
    form = parse_format(text)
    width = steps * max(64, form.group or 0)
    packed, _ = random_codes(4 * fours, width, text, seed)
    values, places = PAIRS.convert(packed)
    assert values.shape == (4 * fours, width // (2 if form.values == "int8" else 4)) and places.shape == (
        2 * fours,
        width // 4,
    )
    assert same(PAIRS.restore(values, places, width, packed.scales), packed)
    assert torch.equal(DENSE_OP(values, places, "pairs", width, packed.scales), unpack(packed))
    assert torch.equal(PAIRS.elsewhere.dense(values, places, width, packed.scales), unpack(packed))
    assert Packed(values, places, width, packed.scales).format == form


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 40, 130])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa, text, rows):
    """Of whole runs, and of one, two and three steps more; of float32 and of bfloat16."""
    for out, steps in [(16, 4), (36, 2), (4, 6), (100, 12), *([] if text.endswith("128") else [(20, 1), (52, 7)])]:
        packed, _ = random_codes(out, 64 * steps, text, seed=out)
        dtype = torch.float32 if out % 3 else torch.bfloat16
        x = torch.randn(rows, 64 * steps, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = cpu.pairs_linear(x, *PAIRS.convert(packed), 64 * steps, packed.scales, isa=isa)
        if in_tiles(isa, dtype, text, pairs=True) and rows >= MANY:
            assert_tiles_correct(got, x, packed)
            continue
        near, scales = rounded(x, sums_of=(8, 8))
        weight = unpack(packed).double()
        # ties of x's rounding may fall to either side, one step of one place each; float32 sums; y's own rounding
        ties = scales.amax() * weight.abs().amax() * 2
        sums = (near.abs() @ weight.abs().t()).amax() * 64 * steps * torch.finfo(torch.float32).eps
        want = near @ weight.t()
        assert (got.double() - want).abs().amax() <= ties + sums + want.abs().amax() * torch.finfo(dtype).eps


def test_without_the_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "pairs_rows", lambda: 0)
    packed, _ = random_codes(36, 192, "2:4 int4")
    x, (values, places) = torch.randn(3, 192), PAIRS.convert(packed)
    assert pairs_product(x, values, places, 192, None, "none", packed.scales) is None
    weight = PAIRS.elsewhere.dense(values, places, 192, packed.scales)
    assert_codes_correct(x @ weight.t(), x, packed, None, "none")


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_row_has_the_same_bits_beside_any_number_of_others_and_on_any_number_of_threads(text, isa):
    packed, _ = random_codes(84, 1152, text)
    x = torch.randn(71, 1152, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = lambda x: cpu.pairs_linear(x, *PAIRS.convert(packed), 1152, packed.scales, isa=isa)  # noqa: E731
    _, every = assert_rows_alike(product, x, in_tiles(isa, x.dtype, text, pairs=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(product(x), every)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "silu_mul"])
def test_bias_and_activation(activation):
    packed, _ = random_codes(40, 256, "2:4 int4")
    x, bias = torch.randn(5, 256), torch.randn(40)
    seen = rounded(x, sums_of=(8, 8))[0].float() if cpu.pairs_rows() else x
    assert torch.allclose(
        call(x, packed, bias, activation), reference(seen, packed, bias, activation), rtol=0.02, atol=0.02
    )


def test_a_row_of_nan_spoils_itself_alone():
    packed, _ = random_codes(8, 320, "2:4 int4")
    x = torch.randn(3, 320)
    y = call(x, packed)
    x[1, 300] = float("nan")
    spoiled = call(x, packed)
    assert spoiled[1].isnan().all() and torch.equal(spoiled[[0, 2]], y[[0, 2]])


def test_rows_beyond_the_kernel_other_floats_and_none_at_all():
    packed, _ = random_codes(16, 64, "2:4 int4")
    x = torch.randn(cpu.pairs_rows() + 1, 64)
    assert torch.allclose(call(x, packed), reference(x, packed), atol=1e-4)
    assert torch.allclose(call(x[:5].double(), packed), reference(x[:5].double(), packed), atol=1e-9)
    assert call(x[:0], packed).shape == (0, 16)


@pytest.mark.parametrize(("rows", "width"), [(16, 64), (36, 192), (4, 128)])
@pytest.mark.parametrize("text", ["2:4 int4", "2:4 int8"])
def test_many_rows_of_bfloat16_meet_the_weight_rounded_to_it(text, rows, width):
    packed, _ = random_codes(rows, width, text)
    x = torch.randn(most_rows(torch.bfloat16, width) + 1, width).bfloat16()
    assert torch.equal(call(x, packed), reference(x, packed))


def test_gradients_reach_x_and_opcheck():
    packed, _ = random_codes(16, 128, "2:4 int4")
    x = torch.randn(2, 128, requires_grad=True)
    call(x, packed).sum().backward()
    assert torch.allclose(x.grad, unpack(packed).sum(0).expand(2, -1), atol=1e-4)
    values, places = PAIRS.convert(packed)
    torch.library.opcheck(OP, (x, values, places, "pairs", 128, None, "none", packed.scales))


def test_damaged_places_reach_no_foreign_memory():
    packed, _ = random_codes(16, 64, "2:4 int4")
    values, places = PAIRS.convert(packed)
    damaged = values, torch.full_like(places, 255), "pairs", 64
    assert OP(torch.randn(2, 64), *damaged, None, "none", packed.scales).shape == (2, 16)
    assert DENSE_OP(*damaged, packed.scales).shape == (16, 64)


@pytest.mark.parametrize(
    "text, sides, told",
    [("dense int8", (8, 64), "not of dense int8"), ("dense int4", (8, 64), "not of dense int4"),
     ("2:4 int4", (6, 64), "multiples of 4 x 64"), ("2:4 int4", (8, 96), "multiples of 4 x 64")],
)  # fmt: skip
def test_what_is_no_weight_of_pairs_is_refused(text, sides, told):
    packed, _ = random_codes(*sides, text)
    with pytest.raises(SparseForgeError, match=f"{told}.*as rows"):
        PAIRS.convert(packed)
    assert PAIRS.refuses(*sides, torch.float32, CPU, parse_format(text)) is not None


def test_whom_it_serves(monkeypatch):
    form = Format("2:4", "int4", 32)
    assert layouts_of(CPU) == (ROWS, PAIRS) and not PAIRS.knows(SPARSE)
    monkeypatch.setattr(cpu, "pairs_rows", lambda: 2048)
    assert PAIRS.refuses(8, 64, torch.bfloat16, CPU, form) is None
    int8 = Format("2:4", "int8")
    for vnni in (True, False):
        monkeypatch.setattr(cpu, "vnni", lambda vnni=vnni: vnni)
        assert (PAIRS.refuses(8, 64, torch.bfloat16, CPU, int8) is None) != vnni
    assert "not torch.float16" in PAIRS.refuses(8, 64, torch.float16, CPU, form)
    monkeypatch.setattr(cpu, "pairs_rows", lambda: 0)
    assert "AVX2" in PAIRS.refuses(8, 64, torch.bfloat16, CPU, form)


@pytest.mark.parametrize("there", [pytest.param(True, marks=needs_kernel), False])
def test_a_quantised_model_is_kept_in_it_where_it_is_fast_and_files_hold_rows(there, monkeypatch, tmp_path):
    """Weights whose sides it takes, and no others; merged ones, too, and the same model again out of a file."""
    if not there:
        monkeypatch.setattr(cpu, "pairs_rows", lambda: 0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    sf.sparsify(model)
    report = sf.quantize(model, "int4")
    layouts = {site["name"]: site["layout"] for site in report["sites"]}
    dense, no_steps = "lm_head", "down_proj"  # of 96 inputs
    fitting = {n: "pairs" if there and dense not in n and no_steps not in n else "rows" for n in layouts}
    assert layouts == fitting and len(layouts) == 15
    if there:  # a state of pairs is none of rows
        other = copy.deepcopy(model)
        for module in other.modules():
            if hasattr(module, "layout"):
                module.change_layout(ROWS)
        with pytest.raises(RuntimeError, match=r"size mismatch for .*bitmask"):
            other.load_state_dict(model.state_dict())
    ids = torch.arange(6)[None]
    want = model(ids).logits
    rows = {name: module.packed() for name, module in model.named_modules() if hasattr(module, "layout")}
    sf.save_packed(model, None, tmp_path / "packed")
    loaded, _ = sf.load(tmp_path / "packed", dtype="float32")
    assert all(loaded.get_submodule(name).layout == layout for name, layout in fitting.items())
    assert all(same(loaded.get_submodule(name).packed(), packed) for name, packed in rows.items())
    assert torch.equal(loaded(ids).logits, want)
    lowered = sf.lower(loaded, (ids,), tokens=[1])  # merges what has one input
    assert torch.allclose(lowered(ids).logits, want, rtol=1e-3, atol=2e-3)
    assert {site["layout"] for site in lowered.report["sites"]} == {"rows", *({"pairs"} if there else ())}
    assert len(lowered.report["sites"]) < 15
