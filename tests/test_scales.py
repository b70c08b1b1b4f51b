"""How scales are kept: there and back, what they are then, and what none is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.formats import FINE, Format, parse_format
from sparseforge_fx.scales import ROW_BYTES, group_of, scale_values, scales_like, stored_scales, wrong_scale

FORMATS = [parse_format(text) for text in ("int8", "int4/32", "int4/128", "int4/16", "2:4 int4/16")]


def some(out, groups, seed, exponent=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(out, groups, generator=generator) + 0.01) * 2.0**exponent


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 4), st.integers(-12, 8), st.integers(0, 99))
def test_what_is_stored_is_near_and_stays(format, out, runs, exponent, seed):
    width = 128 * runs
    values = some(out, width // (format.group or width), seed, exponent)
    if format.group:
        values = values * (torch.randint(2, values.shape) * 2 - 1)
    kept = stored_scales(values, format)
    assert (kept.dtype, kept.shape[-1]) == scales_like(format, width) and wrong_scale(kept) is None
    assert group_of(kept, width) == format.group
    found = scale_values(kept)
    assert found.dtype == torch.float32 and found.shape == values.shape
    largest = values.abs().amax(-1, keepdim=True)
    room = largest * 0.51 / 127 if format.group == FINE else 2.0**-11 * values.abs()
    tiny = (values.abs() < largest / 254) & (format.group == FINE)  # none is zero: these are one step
    assert ((found - values).abs() <= room)[~tiny].all() and ((found * values) > 0).all()
    assert torch.equal(stored_scales(found, format), kept)  # to the bit


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_extremes_are_stored_as_something_that_is_a_scale(format):
    width = 128
    groups = width // (format.group or width)
    for value in (0.0, 1e-45, 1e-30, 1e30, 3e38):
        kept = stored_scales(torch.full((2, groups), value), format)
        assert wrong_scale(kept) is None and scale_values(kept).isfinite().all()


def test_by_hand():
    kept = stored_scales(torch.tensor([[127.0, -64.0, 0.1, 1.4]]), Format("dense", "int4", 16))
    assert kept.tolist()[0][:4] == [127, -64, 1, 1] and kept.shape == (1, 4 + ROW_BYTES)
    assert scale_values(kept).tolist() == [[127.0, -64.0, 1.0, 1.0]]


def test_of_stacks_each_row_has_its_own():
    values = torch.stack([some(3, 4, 0), some(3, 4, 1, 5)])
    each = [stored_scales(v, Format("dense", "int4", 16)) for v in values]
    every = stored_scales(values, Format("dense", "int4", 16))
    assert torch.equal(every, torch.stack(each)) and torch.equal(scale_values(every)[1], scale_values(each[1]))


@pytest.mark.parametrize(
    ("row", "codes", "what"),
    [
        (1.0, [0, 1], "zero"),
        (0.0, [1, 1], "zero"),
        (float("nan"), [1, 1], "not finite"),
        (float("inf"), [1, 1], "not finite"),
        (-1.0, [1, 1], "below zero"),
    ],
)
def test_bytes_that_are_no_scales(row, codes, what):
    scales = torch.cat((torch.tensor([codes], dtype=torch.int8), torch.tensor([[row]]).view(torch.int8)), 1)
    assert what in wrong_scale(scales)


def test_bytes_may_begin_anywhere():
    """As a slice of rows does, or what is cut out of a file."""
    kept = stored_scales(some(5, 7, 0), Format("dense", "int4", 16))
    memory = torch.cat((torch.zeros(1, dtype=torch.int8), kept.flatten()))
    assert torch.equal(scale_values(memory[1:].view(5, -1)), scale_values(kept))
    assert torch.equal(scale_values(kept[3:4]), scale_values(kept)[3:4])
