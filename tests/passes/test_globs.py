"""Names as users give them: what a glob matches, and what is said of one that matches nothing."""

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.passes.globs import matches, unmatched


@pytest.mark.parametrize(
    ("glob", "those"),
    [
        ("blocks.1.up.weight", ["blocks.1.up.weight"]),
        ("blocks.1.up", ["blocks.1.up.weight"]),
        ("blocks.1", ["blocks.1.up.weight"]),
        ("blocks", ["blocks.1.up.weight", "blocks.10.up.weight"]),
        ("*.up", ["blocks.1.up.weight", "blocks.10.up.weight"]),
        ("*", ["blocks.1.up.weight", "blocks.10.up.weight", "head.weight"]),
        ("block", []),
        ("up", []),
        ("blocks.1.", []),
    ],
)
def test_a_glob_means_a_weight_or_all_that_lies_in_a_module(glob, those):
    names = ["blocks.1.up.weight", "blocks.10.up.weight", "head.weight"]
    assert [name for name in names if matches(name, glob)] == those
    assert [name for name in names if matches(name, ["no such", glob])] == those


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32)), nn.Linear(32, 32), nn.Linear(32, 4))


def test_a_glob_that_names_nothing_is_told():
    assert unmatched(model(), include=["0.0", "1.weight", "0"], exclude="0.1") == []
    assert unmatched(model(), include=(), exclude=["2", "lm_haed"]) == [
        "exclude 'lm_haed' is the name of nothing in the model, and without effect"
    ]


def test_every_entrance_tells_it():
    data, found = [(torch.randn(4, 16),) for _ in range(2)], {}
    how = {"exclude": ["0.0", "lm_haed"]}
    found["one-shot"] = sf.sparsify(model(), data, method="wanda", **how).report["notes"]
    found["trained"] = sf.sparsify(model(), data, steps=1, compile=False, show_progress=False, **how).report["notes"]
    found["quantize"] = sf.quantize(model(), "int8", **how)["notes"]
    found["plan"] = sf.plan(model(), data, tokens=[1], bytes=0.9, formats=["dense", "int8"], **how).notes
    found["prepare"] = sf.prepare(model(), example_inputs=data[0], config=sf.annealed_preset(4), **how).reader.notes
    for entrance, notes in found.items():
        assert sum("'lm_haed'" in note for note in notes) == 1, (entrance, notes)
        assert not any("'0.0'" in note for note in notes), entrance


def test_a_module_that_is_excluded_stays_dense_with_all_that_is_in_it():
    report = sf.sparsify(model(), [(torch.randn(4, 16),)], method="wanda", exclude="0").report
    assert [site["name"] for site in report["sites"]] == ["1.weight"]
