"""Weights in few bits: by hand, against every other choice of codes, and against the nearest ones."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels.packed import pack_codes, unpack
from sparseforge_fx.methods.rounding import Grid, Rounded, codes_of, follow, format_of, round_weight, spread
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.scales import scales_like, wrong_scale

FORMATS = [parse_format(text) for text in ("int8", "int4/32", "2:4 int4/128", "int4/16", "2:4 int4/16")]


def layer(out=8, width=128, tokens=300, seed=0):
    """A 2:4 weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(out, width, generator=generator)
    return weight * hard_mask(weight.abs(), TWO_FOUR), x.t() @ x / tokens


def error(weight, rounded, moments):
    delta = (rounded.weight - weight).double()
    return (delta @ moments.double() * delta).sum().item()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 2), st.booleans(), st.floats(-12, 6), st.integers(0, 99)
)
def test_codes_and_scales_are_those_of_the_format(format, out, groups, seen, exponent, seed):
    weight, moments = layer(out, 128 * groups, seed=seed)
    weight *= 2.0**exponent
    codes, scales = round_weight(weight, format, moments if seen else None)
    grid = Grid(format)
    assert codes.dtype == torch.int8 and grid.least <= codes.min() and codes.max() <= grid.largest
    assert not codes[weight == 0].any()
    if format.levels is not None:
        assert torch.isin(codes, torch.tensor(format.levels)).all()
    dtype, columns = scales_like(format, weight.shape[1])
    assert scales.dtype == dtype and scales.shape == (out, columns) and wrong_scale(scales) is None
    assert unpack(pack_codes(codes, scales, format)).equal(Rounded(codes, scales).weight)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_without_inputs_the_codes_are_the_nearest(format):
    weight, _ = layer()
    found = round_weight(weight, format)
    step = spread(found.scales, 128)
    grid = Grid(format)
    inside = (weight / step > grid.least) & (weight / step < grid.largest)
    below, above = grid.halfway(found.codes.float())
    assert ((found.weight - weight).abs() <= 1.02 * torch.maximum(below, above) * step.abs())[inside].all()
    assert inside.float().mean() > 0.95


def test_by_hand():
    """Scale 1: the peak of 7 is on the grid, and so is everything else."""
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([7.0, -3.0, 0.0, 1.0])
    codes, scales = round_weight(weight, Format("dense", "int4", 32), torch.eye(32))
    assert codes[0, :4].tolist() == [7, -3, 0, 1] and scales.item() == 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seen", [True, False])
def test_the_sixteenth_code_of_int4_is_on_the_side_of_the_largest_weight(sign, seen):
    """Eight below and seven above: exact at a scale of 1 or -1, and at no other."""
    weight = sign * torch.tensor([[8.0, *range(-7, 8), 1.0, 0.0, *[3.0] * 14]])
    found = round_weight(weight, Format("dense", "int4", 32), torch.eye(32) if seen else None)
    assert torch.equal(found.weight, weight) and found.scales.item() == -sign and found.codes.min() == -8


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_the_layer_answers_is_nearer_than_by_nearest_codes(format):
    for seed in range(3):
        weight, moments = layer(seed=seed)
        assert error(weight, round_weight(weight, format, moments), moments) < 0.75 * error(
            weight, round_weight(weight, format), moments
        )


def test_no_other_code_of_one_place_is_better():
    """In the damped error, which is what is minimised: a tenth of the mean diagonal is added."""
    weight, moments = layer(out=2, width=32)
    found = round_weight(weight, Format("dense", "int4", 32), moments)
    h = moments + 0.1 * moments.diagonal().mean() * torch.eye(32)
    least = error(weight, found, h)
    worse = 0
    for row, place, change in itertools.product(range(2), range(32), (-1, 1)):
        codes = found.codes.clone()
        codes[row, place] += change
        if weight[row, place] != 0 and -8 <= codes[row, place] <= 7:
            worse += error(weight, found._replace(codes=codes), h) > least
            assert error(weight, found._replace(codes=codes), h) > 0.99 * least
    assert worse > 20


def test_the_scale_listens_to_the_inputs_that_matter():
    """One input a thousand times larger than the others, on the largest weight: to clip that would be the worst."""
    weight = torch.full((1, 32), 0.3)
    weight[0, 5] = 4.0
    energies = torch.ones(32)
    energies[5] = 1e6
    found = round_weight(weight, Format("dense", "int4", 32), torch.diag(energies))
    assert abs(found.weight[0, 5] - 4.0) < 0.01


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_groups_of_sixteen_with_their_levels_are_nearer_in_as_many_bytes(pattern):
    """Of normally distributed weights, by a quarter and more; both by shares that are tried and by nearest codes."""
    for seed in range(3):
        weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(seed))
        weight *= hard_mask(weight.abs(), TWO_FOUR) if pattern == "2:4" else 1
        fine, wide = (round_weight(weight, Format(pattern, "int4", group), torch.eye(256)) for group in (16, 32))
        packed = [pack_codes(*found, Format(pattern, "int4", group)) for found, group in ((fine, 16), (wide, 32))]
        assert packed[0].nbytes == packed[1].nbytes + 4 * 16
        assert (fine.weight - weight).square().sum() < 0.75 * (wide.weight - weight).square().sum()


def test_levels_by_hand():
    """Scale 1 of every group: each level is on the grid, and half-way between two is where the next begins."""
    format = Format("dense", "int4", 16)
    weight = torch.tensor([[*map(float, format.levels)]])
    for seen in (None, torch.eye(16)):
        found = round_weight(weight, format, seen)
        torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=0)
    grid = Grid(format)
    assert grid.nearest(torch.tensor([-64.0, 2.49, 2.51, 7.4, 7.6, 99])).tolist() == [-63, 0, 5, 5, 10, 53]
    below, above = grid.halfway(torch.tensor([-63.0, 0, 5, 53]))
    assert below.tolist() == [7, 2.5, 2.5, 6.5] and above.tolist() == [7, 2.5, 2.5, 6.5]


def test_a_mask_that_keeps_a_zero_and_one_that_drops_a_weight():
    weight, moments = layer(width=32)
    mask = torch.zeros(8, 32)
    mask[:, :8] = 1
    assert not round_weight(weight, Format("dense", "int4", 32), moments, mask).codes[:, 8:].any()


def test_without_a_seen_input_the_weight_itself_is_kept():
    weight, moments = layer()
    found, nearest = round_weight(weight, FORMATS[1], torch.zeros_like(moments)), round_weight(weight, FORMATS[1])
    assert error(weight, found, torch.eye(128)) <= error(weight, nearest, torch.eye(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_come_back_from_a_weight_of_any_dtype_and_its_scales(format, dtype):
    weight, moments = layer()
    found = round_weight(weight, format, moments)
    again = codes_of(found.weight.to(dtype), found.scales, format)
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scales, found.scales)


@pytest.mark.parametrize("values", ["2:4", "dense", "2:4 int4", "int3", ""])
def test_what_no_values_are(values):
    with pytest.raises(SparseForgeError, match="unknown values"):
        format_of(values)


def test_what_is_refused():
    weight, moments = layer(width=48)
    with pytest.raises(SparseForgeError, match="no multiple of the group of 32"):
        round_weight(weight, FORMATS[1], moments)
    with pytest.raises(SparseForgeError, match="not finite"):
        round_weight(weight / 0, FORMATS[0], moments)
    with pytest.raises(SparseForgeError, match="not finite"):
        round_weight(weight, FORMATS[0], moments / 0)


def test_following_takes_back_the_error_of_what_went_before():
    """By the definition: the damped least squares over the survivors of one row, in float64."""
    torch.manual_seed(0)
    weight, _ = layer(out=3, width=32)
    z = torch.randn(200, 32) @ torch.randn(32, 32)
    x = z + 0.3 * torch.randn(200, 32)
    moments, cross = x.t() @ x / 200, z.t() @ x / 200
    found = follow(weight, moments, cross)
    h = moments.double()
    damping = 0.1 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)
    for row, w in zip(found.double(), weight.double(), strict=True):
        on = w != 0
        right = w @ cross.double() + w @ damping
        want = torch.linalg.solve((h + damping)[on][:, on], right[on])
        torch.testing.assert_close(row[on], want, rtol=1e-2, atol=1e-3)
        assert not row[~on].any()
    assert torch.equal(follow(weight, moments, moments), weight)
