"""Integer weights in place: the pattern stays, the values are near, data makes them nearer, and what fails undoes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import quantize as module
from sparseforge_fx.deploy.lowering.modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import unpack
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask


def linear(out, width, dtype=torch.float32, sparse=True, seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(width, out, dtype=dtype)
    if sparse:
        made.weight.data *= hard_mask(made.weight.data.abs(), TWO_FOUR)
    return made


@pytest.mark.parametrize("values", ["int8", "int4", "int4/128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pattern_and_values_stay(values, dtype):
    model = nn.Sequential(linear(8, 128, dtype), linear(128, 8, dtype), linear(8, 128, dtype, sparse=False))
    before = [m.weight.detach().float() for m in model]
    report = sf.quantize(model, values=values)
    sparse = f"2:4 {values}" if values != "int4" else "2:4 int4/32"
    wide = {"0": sparse, "2": sparse.replace("2:4", "dense")}
    assert report["quantized"] == (wide if values != "int8" else wide | {"1": sparse})
    assert values == "int8" or "8 inputs are no multiple of the group" in report["skipped"]["1"]
    for name in report["quantized"]:
        got = unpack(model[int(name)].packed())
        assert check_pattern(got, TWO_FOUR) == (name != "2") and not got[before[int(name)] == 0].any()
        off = (got - before[int(name)]).norm() / before[int(name)].norm()
        assert 0 < off < (0.01 if values == "int8" else 0.15)


def test_a_language_model_with_data_is_nearer_than_without(captured_once):
    found = captured_once("llama")
    sf.sparsify(found.model, method="magnitude")
    state = {k: v.clone() for k, v in found.model.state_dict().items()}
    batch = found.batch(99, rows=8, length=16)
    with torch.no_grad():
        want = found.model(**batch).logits
    off = {}
    for data in (None, [found.batch(seed, rows=8, length=16) for seed in range(8)]):
        model = type(found.model)(found.model.config).eval()
        model.load_state_dict(state)
        report = sf.quantize(model, data, values="int4", exclude=["lm_head"])
        assert (
            report["quantized"]
            and set(report["quantized"].values()) <= {"2:4 int4/32"}
            and all("padding" in n for n in report["notes"])
        )
        assert report["skipped"]["lm_head"] == "excluded by name"
        with torch.no_grad():
            off[data is None] = (model(**batch).logits - want).norm().item()
        with pytest.raises(SparseForgeError, match="packed already"):
            sf.quantize(model, values="int4", exclude=["lm_head"])
    assert off[False] < 0.9 * off[True]


def test_scales_of_a_run_give_its_weights_to_the_bit():
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.LayerNorm(32))
    result = sf.sparsify(model, [torch.randn(64, 32)], method="sparsegpt", values="int4", calibration=64)
    assert set(result.scales) == {"0.weight", "2.weight"}
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    sf.quantize(model, values="int4", scales=result.scales)
    assert all(torch.equal(unpack(model[i].packed()), w) for i, w in zip((0, 2), weights, strict=True))


def test_a_conv1d_keeps_its_orientation():
    model = nn.Sequential(Conv1D(4, 32))
    x = torch.randn(3, 32)
    want = model(x)
    sf.quantize(model)
    assert isinstance(model[0], SparseLinear) and (model(x) - want).norm() < 0.05 * want.norm()


def test_what_the_graph_does_not_read_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = linear(32, 32), linear(32, 32)

        def forward(self, x):
            return self.used(x).tanh()

    report = sf.quantize(Half(), [torch.randn(64, 32)], values="int4")
    assert set(report["quantized"]) == {"used", "spare"}
    assert report["notes"] == ["spare: the graph does not read it as a linear's weight: its own nearest values"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int3"}, "unknown values"),
        ({"values": "float"}, "choose int8"),
        ({"exclude": ["*"]}, "excluded by name"),
        ({"values": "int4/128"}, "no multiple of the group of 128"),
    ],
)
def test_what_is_refused(options, message):
    model = nn.Sequential(linear(8, 32))
    with pytest.raises(SparseForgeError, match=message):
        sf.quantize(model, **options)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("data", [None, [torch.randn(64, 32)]])
def test_what_fails_half_way_leaves_everything_as_it_was(monkeypatch, data):
    model = nn.Sequential(linear(32, 32), nn.Tanh(), linear(32, 32), nn.LayerNorm(32))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    real, count = module.pack_codes, []

    def second_fails(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "pack_codes", second_fails)
    with pytest.raises(KeyboardInterrupt):
        sf.quantize(model, data, values="int4")
    assert type(model[0]) is nn.Linear and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
