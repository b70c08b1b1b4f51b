"""Integer grids: zero stays zero, the error is that of the nearest point, and a scale is searched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.grid import Grid, find_scales, round_to_grid
from sparseforge_fx.pattern import Pattern, check_pattern, hard_mask


def quantize_weight(weight, grid, dim=-1):
    """Every group of ``weight`` along ``dim`` on a grid of its own."""
    rows = weight.movedim(dim, -1).float()
    parts = [round_to_grid(part, find_scales(part, grid)[:, None], grid) for part in rows.split(grid.group, -1)]
    return torch.cat(parts, -1).movedim(-1, dim).to(weight.dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from([0, 1]),
    st.integers(0, 99),
)
def test_few_levels_and_exact_zeros(bits, group, rows, columns, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) > 0.5)
    got = quantize_weight(weight if dim else weight.t().contiguous(), Grid(bits, group), dim)
    got = got if dim else got.t()
    assert (got[weight == 0] == 0).all() and torch.isfinite(got).all()
    for row in got:
        for part in row.split(group):
            assert len(part.unique()) <= 2**bits - 1


def test_by_hand():
    grid = Grid(3)  # -3 .. 3
    assert grid.largest == 3
    got = round_to_grid(torch.tensor([0.9, -2.6, 7.0, 0.0, 0.4]), torch.tensor(1.0), grid)
    assert got.tolist() == [1, -3, 3, 0, 0]


def test_the_scale_beats_that_of_the_largest_weight():
    torch.manual_seed(0)
    weight, grid = torch.randn(64, 128), Grid(4)
    found = find_scales(weight, grid)[:, None]
    absmax = weight.abs().amax(1, keepdim=True) / grid.largest
    error = lambda scale: (round_to_grid(weight, scale, grid) - weight).square().sum()  # noqa: E731
    assert error(found) < 0.9 * error(absmax)


def test_the_error_is_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    got = quantize_weight(weight, Grid(8, 64))
    step = weight.abs().amax(1, keepdim=True) / 127
    inside = (got - weight).abs() <= 0.5 * step + 1e-6
    assert inside.float().mean() > 0.99  # the others are cut off by the search


def test_a_sparse_weight_keeps_its_pattern_and_dtype():
    weight = torch.randn(8, 64).bfloat16()
    weight = weight * hard_mask(weight.abs(), Pattern(2, 4))
    got = quantize_weight(weight, Grid(4, 32))
    assert got.dtype == torch.bfloat16 and check_pattern(got, Pattern(2, 4)) and torch.count_nonzero(got)


def test_zeros_alone():
    assert not quantize_weight(torch.zeros(2, 8), Grid(4, 4)).any()


@pytest.mark.parametrize("grid", [Grid(1), Grid(9), Grid(4, 0)])
def test_grids_that_make_no_sense(grid):
    with pytest.raises(SparseForgeError, match="2 to 8 bits"):
        grid.check()
