"""In which dtype a run computes: what is timed and when, and weights there and back again."""

import pytest
import torch
from torch import nn
from transformers import BatchFeature

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models import compute_dtype
from sparseforge_fx.models.compute_dtype import ComputeDtype, cast, cast_inputs, choose_dtype, dtype_of, time_steps
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("half", compute_dtype.HALVES, ids=str)
@pytest.mark.parametrize(("times_slower", "chosen"), [(9.0, torch.float32), (1.1, None), (0.4, None)])
def test_a_half_that_is_clearly_slower_gives_way(half, times_slower, chosen, monkeypatch):
    monkeypatch.setattr(compute_dtype, "time_steps", lambda d: {str(d[0])[6:]: times_slower, str(d[1])[6:]: 1.0})
    found = choose_dtype(half, CPU)
    assert found.dtype == (chosen or half) and found.checkpoint == half
    assert found.describe()["seconds_per_step"] == {str(half)[6:]: times_slower, "float32": 1.0}
    assert found.notes() == ([] if chosen is None else [
        f"computed in float32, which is 9.0 times as fast on this processor; the checkpoint's own dtype is {str(half)[6:]}"
    ])  # fmt: skip
    assert ComputeDtype.read(found.describe()) == found


def test_nothing_is_timed_where_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(compute_dtype, "time_steps", None)
    assert choose_dtype(torch.float32, CPU) == ComputeDtype(torch.float32, torch.float32)
    assert choose_dtype(torch.bfloat16, torch.device("cuda")).dtype == torch.bfloat16
    told = choose_dtype(torch.bfloat16, CPU, torch.float16)
    assert told.dtype == torch.float16
    assert told.notes() == ["computed in float16; the checkpoint's own dtype is bfloat16"]


def test_the_measurement_draws_no_random_numbers_of_the_run():
    state = torch.get_rng_state()
    seconds = time_steps((torch.bfloat16, torch.float32))
    assert seconds.keys() == {"bfloat16", "float32"} and all(0 < s < 5 for s in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [None, {}, {"dtype": "int8", "checkpoint": "bfloat16", "seconds_per_step": {}}, "x"])
def test_a_run_that_does_not_say_its_dtype_is_refused(wrong):
    with pytest.raises(SparseForgeError, match="does not say in which dtype it computes"):
        ComputeDtype.read(wrong)


def test_weights_come_back_in_their_own_dtypes_with_their_zeros():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.BatchNorm1d(16), nn.Linear(16, 16)).bfloat16()
    model[1].float()  # as models keep some of theirs
    model[3].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(hard_mask(model[0].weight.abs(), TWO_FOUR))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert dtype_of(model) == torch.bfloat16

    back = cast(model, torch.float32)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32, torch.int64}
    assert model[3].weight is model[0].weight
    model[0].branch = nn.Parameter(torch.randn(3))
    back()
    assert model[0].branch.dtype == torch.bfloat16 and model[3].weight is model[0].weight
    del model[0].branch
    after = model.state_dict()
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype for name, t in before.items())
    assert check_pattern(model[0].weight, TWO_FOUR)


def test_inputs_follow_the_model():
    """Tensors of its own dtype, in any nesting; ids and tensors that were something else beside it stay."""
    half, full, ids = torch.ones(2).half(), torch.ones(2), torch.arange(2)
    batch = BatchFeature({"x": half, "more": [half, (full, "text")], "ids": ids})
    (turned, none), single = cast_inputs(([batch], None), torch.float16, torch.float64), [half]
    assert none is None and list(turned[0]) == ["x", "more", "ids"]
    assert [turned[0]["x"].dtype, turned[0]["more"][0].dtype] == [torch.float64] * 2
    assert turned[0]["more"][1] == (full, "text") and turned[0]["ids"] is ids and batch["x"] is half
    assert cast_inputs(single, torch.float16, torch.float16)[0] is half
