"""Every method has a name, constants that can be built, and an error that tells the others."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.catalog import METHODS, ONE_SHOT, TRAINED, configure, find_name, find_options, find_preset
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
    assert find_preset("sparseforge") == "alps+kd"
    assert find_preset("sparseforge", "paper") == "paper"
    assert find_preset("magnitude") is None


@pytest.mark.parametrize(
    ("name", "preset"),
    [("sparsforge", None), ("", None), ("ast", "tuned"), ("sparseforge", "best"), ("wanda", "paper")],
)
def test_what_does_not_exist_is_refused_with_what_does(name, preset):
    with pytest.raises(SparseForgeError, match="choose one of"):
        find_preset(name, preset)


def test_options_are_what_sparsify_takes():
    assert find_options("alps")["iterations"] is int and find_options("gmp")["end"] is float
    assert "score" in find_options("sparseforge") and "steps" not in find_options("sparseforge")
    assert find_options("magnitude") == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_config_says_its_method(method):
    """With its fields as options, that method gives the config again."""
    config = configure(method, *([] if method in ONE_SHOT else [7]), pattern="1:4")
    options = {name: getattr(config, name) for name in find_options(method)}
    steps = {} if method in ONE_SHOT else {"steps": 7}
    assert configure(find_name(config), **steps, pattern="1:4", **options) == config


def test_steps_belong_to_methods_that_train():
    with pytest.raises(SparseForgeError, match="alps does not train: leave out steps"):
        configure("alps", 7)
    with pytest.raises(SparseForgeError, match="ast trains: give the number of steps"):
        configure("ast")


def test_no_method_has_two_names():
    assert len(set(METHODS)) == len(METHODS)


@pytest.mark.parametrize(
    ("method", "name"), [("alps", "reorder"), ("sparsegpt", "choose_masks"), ("wanda", "every_token")]
)
@pytest.mark.parametrize("value", ["no", "false", 0, None])
def test_a_switch_is_true_or_false(method, name, value):
    """``"no"`` was taken for true."""
    with pytest.raises(SparseForgeError, match=f"{name} is .*: give True or False"):
        configure(method, **{name: value})


@pytest.mark.parametrize(
    ("method", "preset", "changes"),
    [
        ("sparseforge", "annealed", {"every_token": True}),
        ("ast", None, {"every_token": True}),
        ("gmp", None, {"expert_tokens": 8}),
        ("sparseforge", "alps+kd", {"expert_tokens": 8, "start": "magnitude", "reorder": False}),
    ],
)
def test_what_a_start_is_told_of_experts_needs_a_layer_wise_one(method, preset, changes):
    (name, value), *_ = changes.items()
    with pytest.raises(SparseForgeError, match=f"{name} is for a layer-wise start, and this run starts from"):
        configure(method, 4, preset=preset, **changes)
    fading = {"softness_start": 0.6} if preset == "annealed" else {}
    config = configure(method, 4, preset=preset, **{name: value, "start": "alps", **fading})
    assert getattr(config, name) == value
