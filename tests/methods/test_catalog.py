"""Every method has a name, constants that can be built, and an error that tells the others."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.catalog import METHODS, TRAINED, find_method, find_options
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern


@pytest.mark.parametrize(("method", "preset"), [(m, p) for m, presets in TRAINED.items() for p in presets])
def test_presets_build_and_describe_themselves(method, preset):
    config = TRAINED[method][preset](50, Pattern(1, 4))
    assert config.steps == 50 and config.describe()["pattern"] == "1:4"
    weight = nn.Parameter(torch.randn(4, 8))
    built = config.build([MaskedWeight("w", weight, torch.ones(4, 8), 1)])
    assert built.config is config and set(built.metrics()) >= {"flip_rate", "density"}
    assert set(config.describe()) == {f.name for f in fields(config)}


def test_the_first_preset_is_the_default():
    assert find_method("sparseforge")[0] == "tuned"
    assert find_method("sparseforge", "paper")[0] == "paper"
    assert find_method("magnitude") == (None, None)


@pytest.mark.parametrize(("name", "preset"), [("sparsforge", None), ("", None), ("ast", "tuned"), ("wanda", "paper")])
def test_what_does_not_exist_is_refused_with_what_does(name, preset):
    with pytest.raises(SparseForgeError, match="choose one of"):
        find_method(name, preset)


def test_options_are_what_sparsify_takes():
    assert find_options("sparsegpt")["bits"] == int | None and find_options("gmp")["end"] is float
    assert "score" in find_options("sparseforge") and "steps" not in find_options("sparseforge", "paper")
    assert find_options("magnitude") == {}


def test_no_method_has_two_names():
    assert len(set(METHODS)) == len(METHODS)
