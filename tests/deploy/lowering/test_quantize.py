"""Models over int8 and int4 codes: zeros stay, values are near, the rest is left alone, scales that are known are kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import byte_tokenizer, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints.packed_state import packed_linears
from sparseforge_fx.deploy.lowering import quantize
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format
from sparseforge_fx.pattern import TWO_FOUR, hard_mask


def linear(out, width, dtype=torch.float32, seed=0, spread=0.0, sparse=True):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(width, out, dtype=dtype)
    weight = torch.randn(out, width, generator=generator) * torch.exp(spread * torch.randn(out, 1, generator=generator))
    module.weight.data = (weight * hard_mask(weight.abs(), TWO_FOUR) if sparse else weight).to(dtype)
    return module


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(["int8", "int4", "int4/128", "int4/16"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 2.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_zeros_stay_zeros_and_values_are_near(out, groups, values, dtype, spread, sparse, seed):
    form = parse_format(values)
    width = groups * (form.group or 8)
    model = nn.Sequential(linear(out, width, dtype, seed, spread, sparse))
    before = model[0].weight.detach().float()
    report = sf.quantize(model, values)
    assert report["sites"][0]["format"] == f"{'2:4' if sparse else 'dense'} {str(form).removeprefix('dense ')}"
    after = model[0].weight.float()
    assert model[0].weight.dtype == dtype and (after[before == 0] == 0).all()
    groups_of = before.unflatten(1, (-1, form.group or width))
    if form.levels is not None:  # half the way between the two that are farthest apart, of the largest
        far = (after - before).unflatten(1, (-1, form.group)).abs() / groups_of.abs().amax(-1, keepdim=True)
        assert (far <= 0.5 * 14 / 53 + torch.finfo(dtype).eps).all()
        return
    # the search may cut the largest off to half of itself, never by more than it gains in the sum of squares
    nearest = groups_of.abs().amax(-1, keepdim=True) / (127 if values == "int8" else 7)
    plain = ((groups_of / nearest).round() * nearest - groups_of).square().sum(-1)
    error = (after.unflatten(1, (-1, form.group or width)) - groups_of).square().sum(-1)
    slack = groups_of.square().sum(-1) * (torch.finfo(dtype).eps ** 2 + 1e-5)
    assert (error.sqrt() <= 1.02 * plain.sqrt() + slack.sqrt()).all()


def test_rows_in_which_some_groups_dwarf_the_others_are_told_of():
    """One scale of 8 bits knows no difference between a group of a five-hundredth and one of a hundredth."""
    model = nn.Sequential(linear(8, 64, sparse=False), linear(8, 64, sparse=False))
    with torch.no_grad():
        model[1].weight[:, 0] = 100 * model[1].weight.abs().max()
    wide = copy.deepcopy(model)
    (note,) = sf.quantize(model, "int4/16")["notes"]
    assert note.startswith("1: 75% of its groups have a scale of less than a fiftieth")
    assert not sf.quantize(wide, "int4")["notes"]
    zeros = nn.Sequential(linear(8, 64, sparse=False))
    with torch.no_grad():
        zeros[0].weight[:4] = 0  # rows that are dead, and groups in others
        zeros[0].weight[4:, 16:48] = 0
    assert not sf.quantize(zeros, "int4/16")["notes"]


def test_a_language_model_still_computes(captured_once):
    found = captured_once("llama")
    model = type(found.model)(found.model.config).eval()
    sf.sparsify(model, method="magnitude")
    batch = found.batch()
    want = model(**batch).logits
    report = sf.quantize(model, "int8", dense=False)
    assert len(report["sites"]) == 14 and [s["name"] for s in report["skipped"]] == ["lm_head"]
    assert report["lowered_bytes"] < 0.35 * report["dense_bytes"]
    got = model(**batch).logits
    assert (got - want).norm() < 0.03 * want.norm() and not torch.equal(got, want)


def test_what_is_no_linear_or_too_narrow_is_left_alone():
    model = nn.Sequential(linear(8, 32), nn.Linear(8, 32), nn.LayerNorm(32), Conv1D(4, 32), nn.Embedding(4, 4))
    narrow = model[1].weight.detach().clone()
    report = sf.quantize(model, "int4")
    assert [(s["name"], s["format"]) for s in report["sites"]] == [("0", "2:4 int4/32"), ("3", "dense int4/32")]
    assert report["skipped"] == [{"name": "1", "reason": "8 inputs are no multiple of the group of 32"}]
    assert torch.equal(model[1].weight, narrow) and isinstance(model[3], SparseLinear) and model[3].transposed


def test_scales_that_are_known_are_kept_to_the_bit():
    model = nn.Sequential(linear(16, 64))
    scales = torch.rand(16, 2).half() + 0.5
    codes = (model[0].weight.detach() * 3).round().clamp(-7, 7)
    model[0].weight.data = codes * scales.float().repeat_interleave(32, 1)
    want = model[0].weight.detach().clone()
    report = sf.quantize(model, "int4", [torch.randn(4, 64)], scales={"0.weight": scales})
    assert report["notes"] == ["data is given and not used: the scales of all weights are known"]
    assert torch.equal(model[0].weight, want) and torch.equal(model[0].packed().scales, scales)


def test_a_run_in_few_bits_is_packed_by_its_own_scales(captured_once, tmp_path):
    found = captured_once("llama")
    model = type(found.model)(found.model.config).eval()
    data = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    result = sf.sparsify(model, data, method="sparsegpt", values="int8", calibration=4, length=16)
    weights = {n: model.get_parameter(n).detach().clone() for n in result.scales}
    assert len(weights) == 14
    sf.quantize(model, "int8", scales=result.scales, dense=False)
    for name, weight in weights.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert str(module.format) == "2:4 int8" and torch.equal(module.weight, weight)


# -- on data ---------------------------------------------------------------------------------------------------------
def test_data_makes_the_model_answer_nearer(captured_once):
    found = captured_once("llama")
    model = type(found.model)(found.model.config).eval()
    sf.sparsify(model, method="magnitude")
    batch = found.batch(99, rows=8, length=16)
    want = model(**batch).logits
    off = {}
    for data in (None, [found.batch(seed, rows=8, length=16) for seed in range(8)]):
        rounded = copy.deepcopy(model)
        report = sf.quantize(rounded, "int4", data, dense=False)
        assert {s["format"] for s in report["sites"]} == {"2:4 int4/32"}
        assert all("padding" in note for note in report["notes"])
        off[data is None] = (rounded(**batch).logits - want).norm().item()
    assert off[False] < 0.9 * off[True]


def test_padded_batches_are_read_with_their_mask(captured_once):
    found = captured_once("llama")
    ids, mask = found.batch()["input_ids"], torch.ones(2, 12, dtype=torch.long)
    mask[:, :3] = 0
    made = []
    for padding in (0, 5):  # of no account
        model = type(found.model)(found.model.config).eval()
        model.load_state_dict(found.first)
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        assert len(sf.quantize(model, "int4", [batch])["sites"]) == 15
        made.append([m.packed().values for m in packed_linears(model).values()])
    assert all(map(torch.equal, *made))


def test_a_weight_that_data_does_not_reach_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = linear(32, 32), linear(32, 32)

        def forward(self, x):
            return self.used(x).tanh()

    report = sf.quantize(Half(), "int4", [torch.randn(64, 32)])
    assert {s["name"] for s in report["sites"]} == {"used", "spare"}
    assert report["notes"] == ["spare: the graph does not read it as a linear's weight: its own nearest values"]
    assert sf.quantize(Half(), tokenizer=str)["notes"] == ["tokenizer is given and not used: there is no data"]


def test_what_has_no_part_in_how_the_data_are_read_is_named():
    batches = {"batch_size": 2, "length": 8, "separator": "-", "calibration": 3}
    notes = sf.quantize(nn.Sequential(linear(32, 32)), "int4", [torch.randn(4, 32)], tokenizer=str, **batches)["notes"]
    named = {note.split()[0] for note in notes if "is given and not used: the data" in note}
    assert named == {"batch_size", "length", "separator", "tokenizer"}
    assert not [
        n for n in sf.quantize(nn.Sequential(linear(32, 32)), "int4", [torch.randn(64, 32)])["notes"] if "given" in n
    ]


def test_what_of_the_data_is_not_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words and more", "title": "b"}\n')
    (tmp_path / "b.tsv").write_text("no text")
    reading = {"calibration": 1, "length": 8, "cache_dir": tmp_path / ".cache"}
    notes = sf.quantize(tiny_llama(), "int4", str(tmp_path), tokenizer=byte_tokenizer(), **reading)["notes"]
    assert f"1 files of {tmp_path} are not read, as they are no text: b.tsv" in notes
    assert "text is read from the column text, not from title" in notes


def test_rounding_on_data_that_fails_half_way_puts_weights_back(monkeypatch):
    model = nn.Sequential(linear(32, 32), nn.Tanh(), Conv1D(32, 32), nn.LayerNorm(32))
    before = copy.deepcopy(model.state_dict())
    real, count = quantize.pack_codes, []

    def second_fails(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(quantize, "pack_codes", second_fails)
    with pytest.raises(KeyboardInterrupt):
        sf.quantize(model, "int4", [torch.randn(64, 32)])
    assert type(model[0]) is nn.Linear and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ("int3", {}, "is no format"),
        ("2:4", {}, "choose int8, int4, int4/128 or int4/16"),
        ("2:4 int8", {}, "choose int8, int4, int4/128 or int4/16"),
        ("int8", {"dense": False}, "nothing to quantise: 0: not 2:4"),
        ("int8", {"scales": {"1.weight": torch.ones(8, 1)}}, "no linear that can be packed"),
        ("int8", {"scales": {"0.weight": torch.ones(8, 2)}}, "'0': scales of shape"),
    ],
)
def test_what_is_refused(values, options, message):
    model = nn.Sequential(nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparseForgeError, match=message):
        sf.quantize(model, values, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(linear(8, 8), linear(8, 8))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(SparseForgeError, match=r"'1': .*not finite"):
        sf.quantize(model)
    assert type(model[0]) is nn.Linear


@pytest.fixture
def slow_halves(monkeypatch):
    """A processor that takes ten times as long in bfloat16."""
    seconds = {"bfloat16": 1.0, "float32": 0.1}
    monkeypatch.setattr("sparseforge_fx.models.compute_dtype.time_steps", lambda dtypes: seconds)


@pytest.mark.parametrize("values", ["int8", "int4", "int4/16"])
def test_where_half_precision_is_slow_the_data_is_walked_in_float32(slow_halves, captured_once, values):
    found = captured_once("llama")
    torch.manual_seed(0)
    half = type(found.model)(found.model.config).eval().bfloat16()
    half.model.norm.float()  # which stays
    full = copy.deepcopy(half).float()
    report = sf.quantize(half, values, [found.batch()])
    expected = sf.quantize(full, values, [found.batch()])
    told = "computed in float32, which is 10.0 times as fast on this processor; the checkpoint's own dtype is bfloat16"
    assert told in report["notes"] and told not in expected["notes"]
    assert {n: p.dtype for n, p in half.named_parameters()} == {
        n: torch.float32 if n == "model.norm.weight" else torch.bfloat16 for n, _ in half.named_parameters()
    }
    ours, theirs = (packed_linears(model) for model in (half, full))
    assert ours and all(m.weight.dtype == torch.bfloat16 for m in ours.values())
    for name, module in ours.items():
        assert torch.equal(module.packed().values, theirs[name].packed().values), name
        assert torch.equal(module.packed().scales, theirs[name].packed().scales), name


@pytest.mark.parametrize("example", [False, True])
def test_floats_of_the_data_follow_the_model_into_float32(slow_halves, example):
    half = nn.Sequential(linear(32, 32), nn.Tanh(), linear(8, 32, seed=1)).bfloat16()
    x = torch.randn(64, 32).bfloat16()
    full, given = copy.deepcopy(half).float(), {"example_inputs": x} if example else {}
    notes = sf.quantize(half, "int8", [x], **given)["notes"]
    sf.quantize(full, "int8", [x.float()])
    assert len(notes) == 1 and "computed in float32" in notes[0] and x.dtype == torch.bfloat16
    for i in (0, 2):
        assert torch.equal(half[i].packed().values, full[i].packed().values)


def test_an_error_in_that_walk_leaves_the_halves_as_they_were(slow_halves, captured_once, monkeypatch):
    found = captured_once("llama")
    model = copy.deepcopy(found.model).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(model, weights, *_):
        for weight in weights.values():
            weight.data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "round_on_data", fails)
    with pytest.raises(KeyboardInterrupt):
        sf.quantize(model, "int8", [found.batch()])
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
