"""Numbers that make no sense are refused in one sentence, whoever takes them, before anything is done."""

import inspect
import math
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.catalog import TRAINED, find_options
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.pattern import TWO_FOUR
from sparseforge_fx.ranges import Count, Positive, Range, Share, check_numbers, checked
from sparseforge_fx.training.distillation import Distillation

BAD = (math.nan, math.inf, -math.inf, -1, "4", True)


def numeric(kind):
    """Is the type, or one of its alternatives, a number?"""
    return any(k in (int, float) for k in (get_args(kind) or (kind,)))


def options():
    for method in (*LAYERWISE, *TRAINED):
        for name, kind in find_options(method).items():
            if numeric(kind):
                yield method, name


@pytest.mark.parametrize(("method", "name"), options())
def test_every_number_of_every_method(method, name):
    make = LAYERWISE[method] if method in LAYERWISE else next(iter(TRAINED[method].values()))
    for value in BAD:
        with pytest.raises(SparseForgeError, match=f"^{name} is .*: give a "):
            make(TWO_FOUR, **{name: value}) if method in LAYERWISE else make(10, TWO_FOUR, **{name: value})


def test_every_field_says_its_range():
    for presets in TRAINED.values():
        config = type(next(iter(presets.values()))(10, TWO_FOUR))
        hints = get_type_hints(config, include_extras=True)
        bare = [f.name for f in fields(config) if hints[f.name] in (int, float)]
        assert not bare, f"{config.__name__}: {bare}"


REFUSED = {
    "steps": 0, "tokens": -5, "batch_size": 0, "length": 0, "accumulate": 0, "lr": math.nan,
    "slorb_block": -1, "weight_decay": -0.1, "calibration": 0, "save_seconds": math.nan,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [("task", -1.0), ("kl", math.nan), ("feature_weight", math.inf), ("temperature", 0.0)]
)
def test_numbers_of_the_objective(name, value):
    with pytest.raises(SparseForgeError, match=f"^{name} is {value}: give a finite number"):
        Distillation(**{name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_of_sparsify(name):
    class Untouched(nn.Module):
        def forward(self, x):
            raise AssertionError("looked at before the numbers")

    with pytest.raises(SparseForgeError, match=f"^{name} is {REFUSED[name]}: give a "):
        sf.sparsify(Untouched(), [torch.randn(2, 8)], **{name: REFUSED[name]})


@pytest.mark.parametrize("change", [{"method": "sparsegpt", "damping": math.nan}, {"temperature_floor": math.nan}])
def test_options_of_the_method_are_looked_at_before_the_data(change):
    def data():
        raise AssertionError("read before the options")
        yield

    with pytest.raises(SparseForgeError, match="is nan: give a finite number above 0"):
        sf.sparsify(nn.Linear(4, 4), data(), **change)


def test_numbers_of_prepare_and_configure():
    with pytest.raises(SparseForgeError, match="kl is nan: give a finite number from 0"):
        sf.prepare(nn.Linear(4, 4), torch.randn(2, 4), sf.annealed_preset(4), objective=Distillation(kl=math.nan))
    with pytest.raises(SparseForgeError, match=r"steps is 1\.5: give a whole number from 1"):
        sf.configure("gmp", 1.5)


def test_what_is_inside_and_what_is_said():
    @checked
    def take(a: Count, b: Positive | None = None, c: Share = 0.5, d: str = "", *rest: float):
        return a, b, c, d

    assert take(1) == (1, None, 0.5, "") and take(a=torch.Size([3])[0], b=2, c=1) == (3, 2, 1, "")
    for arguments, sentence in {
        (0,): "a is 0: give a whole number from 1",
        (1.0,): "a is 1.0: give a whole number from 1",
        (None,): "a is None: give a whole number from 1",
        (1, 0): "b is 0: give a finite number above 0",
        (1, None, 1.5): "c is 1.5: give a finite number from 0 up to 1",
    }.items():
        with pytest.raises(SparseForgeError, match=f"^{sentence}$"):
            take(*arguments)
    with pytest.raises(SparseForgeError, match="x is 2: give a whole number above 2 and up to 3"):
        check_numbers({"x": Annotated[int, Range(2, 3, above=True)]}, {"x": 2})
    with pytest.raises(TypeError):
        take()
    assert get_origin(Count) is Annotated


@pytest.mark.parametrize("value", ["off", "False", 0, 1, [], torch.tensor(True)])
def test_a_truth_value_is_one(value):
    @checked
    def run(on: bool = True, maybe: bool | None = None, how: bool | str = "auto") -> tuple:
        return on, maybe, how

    assert run(np.bool_(False), None, "off") == (False, None, "off")
    for name in ("on", "maybe"):
        with pytest.raises(SparseForgeError, match=f"^{name} is .*: give True or False$"):
            run(**{name: value})


def test_text_is_taken_where_it_may_stand_for_a_number():
    @checked
    def write(size: str | int = "5GB", much: int = 1) -> tuple:
        return size, much

    assert write("40KB") == ("40KB", 1) and write(40) == (40, 1)
    for given in ({"size": 1.5}, {"size": True}, {"much": "1"}):
        with pytest.raises(SparseForgeError, match="give a whole number"):
            write(**given)


def test_a_loop_that_is_told_off_is_not_compiled():
    with pytest.raises(SparseForgeError, match=r"^compile is 'off': give True or False$"):
        sf.prepare(nn.Linear(8, 8), torch.zeros(1, 8), compile="off")


def is_checked(function):
    while function is not None:
        if function.__code__ is checked(lambda: None).__code__:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


PRESETS = {"alps_kd_preset", "annealed_preset", "paper_preset", "paper_universal_preset"}  # their config looks at them


def test_no_public_function_takes_a_number_or_a_truth_value_unseen():
    functions = {name: value for name in sf.__all__ if inspect.isfunction(value := getattr(sf, name))}
    for name, function in functions.items():
        hints = {k: v for k, v in get_type_hints(function).items() if k != "return"}
        takes = [k for k, v in hints.items() if {int, float, bool} & {v, *get_args(v)}]
        assert not takes or is_checked(function) or name in PRESETS, f"{name} takes {takes} and is not @checked"
