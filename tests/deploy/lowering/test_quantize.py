"""Quantisation after sparsity: the zeros stay, the values are near, and what is not sparse is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import Pattern, hard_mask

pytest.importorskip("torchao")
TWO_FOUR = Pattern(2, 4)


def sparse_linear(out, width, dtype=torch.float32, seed=0, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, out, dtype=dtype)
    weight = torch.randn(out, width, generator=generator) * torch.exp(spread * torch.randn(out, 1, generator=generator))
    linear.weight.data = (weight * hard_mask(weight.abs(), TWO_FOUR)).to(dtype)
    return linear


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from([4, 8]),
    st.sampled_from([None, 4, 32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 4.0]),
    st.integers(0, 99),
)
def test_zeros_stay_zeros_and_values_are_near(out, groups, bits, group, dtype, spread, seed):
    model = nn.Sequential(sparse_linear(out, 4 * groups, dtype, seed, spread))
    before = model[0].weight.detach().float()
    report = sf.quantize(model, bits, group)
    after = model[0].weight.dequantize().float()
    assert (after[before == 0] == 0).all()
    width = report["quantized"]["0"] or 4 * groups
    peak = before.abs().unflatten(1, (-1, width)).amax(-1, keepdim=True)
    step = (peak / (2 ** (bits - 1) - 1)).expand(-1, -1, width).flatten(1)
    assert ((after - before).abs() <= 0.51 * step + before.abs() * torch.finfo(dtype).eps).all()


def test_a_language_model_still_computes(captured_once):
    found = captured_once("llama")
    model = type(found.model)(found.model.config).eval()
    sf.sparsify(model, method="magnitude")
    batch = found.batch()
    want = model(**batch).logits
    report = sf.quantize(model, 8)
    assert len(report["quantized"]) == 14 and set(report["skipped"]) == {"lm_head"}
    got = model(**batch).logits
    assert (got - want).norm() < 0.02 * want.norm() and not torch.equal(got, want)
    with pytest.raises(SparseForgeError, match="is 2:4 sparse"):
        sf.quantize(model, 8)  # once is enough


def test_what_is_dense_or_no_linear_is_left_alone():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(sparse_linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.LayerNorm(6), Conv1D(4, 6))
    dense = model[1].weight.detach().clone()
    report = sf.quantize(model)
    assert report["quantized"] == {"0": None}
    assert report["skipped"] == {
        "1": "it is not 2:4 sparse",
        "2": "it is not 2:4 sparse",
        "4": "torchao quantises nn.Linear, not Conv1D",
    }
    assert torch.equal(model[1].weight, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "choose 8 or 4"),
        ({"group": 0}, "at least 1"),
        ({"pattern": "4:2"}, "not N:M"),
        ({}, "is 2:4 sparse"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(SparseForgeError, match=message):
        sf.quantize(nn.Sequential(nn.Linear(8, 8)), **options)


def test_a_zero_that_moves_is_noticed(monkeypatch):
    """One of them is enough."""
    from torchao import quantization

    def shifted(module, *args, **kwargs):
        grid = nn.Parameter(module.weight.detach().clone())
        grid.data[tuple((grid == 0).nonzero()[0])] = 0.01
        grid.dequantize = lambda: grid.detach()
        module.weight = grid

    monkeypatch.setattr(quantization, "quantize_", shifted)
    with pytest.raises(AssertionError, match="moved a zero"):
        sf.quantize(nn.Sequential(sparse_linear(8, 8)))
