"""N:M mathematics against a reference that a reader can check by eye."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import (
    TWO_FOUR,
    Pattern,
    Unstructured,
    all_patterns,
    check_pattern,
    density,
    distance_from_binary,
    from_groups,
    hard_mask,
    parse_pattern,
    to_groups,
)

PATTERNS = [Pattern(1, 2), Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(8, 16), Pattern(16, 32)]


@st.composite
def scores_with_ties(draw):
    """(pattern, scores, dim): few distinct values, so that most groups hold ties."""
    pattern = draw(st.sampled_from(PATTERNS))
    other, groups, dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, -1, -2]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]))
    length = groups * pattern.m
    values = draw(st.lists(st.integers(-2, 2), min_size=other * length, max_size=other * length))
    rows = torch.tensor(values, dtype=dtype).reshape(other, length)
    return pattern, rows.t().contiguous() if dim in (0, -2) else rows, dim


def reference_mask(scores, pattern, dim):
    rows = scores.movedim(dim, -1).reshape(-1, pattern.m)
    mask = torch.zeros(rows.shape, dtype=torch.bool)
    for row, kept in zip(rows.tolist(), mask, strict=True):
        for i in sorted(range(pattern.m), key=lambda i: (-row[i], i))[: pattern.n]:
            kept[i] = True
    return mask.reshape(scores.movedim(dim, -1).shape).movedim(-1, dim)


@settings(max_examples=25)
@given(scores_with_ties())
def test_hard_mask_keeps_exactly_n_and_the_earlier_of_equals(case):
    pattern, scores, dim = case
    mask = hard_mask(scores, pattern, dim)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert (to_groups(mask, pattern, dim).sum(-1) == pattern.n).all()
    assert torch.equal(mask, reference_mask(scores, pattern, dim))
    assert torch.equal(hard_mask(mask.float(), pattern, dim), mask), "a hard mask is its own hard mask"
    assert check_pattern(scores * mask, pattern, dim)


def test_the_sort_and_the_comparison_agree_on_signed_zeros():
    scores = torch.tensor([[-0.0, 0.0, 0.0, -0.0, -1.0, 0.0, -0.0, 1.0]])
    assert hard_mask(scores, TWO_FOUR).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1]]
    wide = torch.cat([scores, scores - 5], 1)
    assert hard_mask(wide, Pattern(8, 16)).int().tolist() == [[1] * 8 + [0] * 8]
    assert hard_mask(scores.repeat(1, 2), Pattern(5, 16)).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 1] + [0] * 7 + [1]]


@settings(max_examples=15)
@given(st.sampled_from(PATTERNS), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_groups_round_trip(pattern, shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= pattern.m
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    groups = to_groups(tensor, pattern, dim)
    assert groups.shape[-1] == pattern.m
    assert torch.equal(from_groups(groups, dim), tensor)


def test_groups_are_consecutive_along_the_reduction_dimension():
    tensor = torch.arange(16).reshape(8, 2)
    assert to_groups(tensor, TWO_FOUR, dim=0).tolist() == [
        [[0, 2, 4, 6], [8, 10, 12, 14]],
        [[1, 3, 5, 7], [9, 11, 13, 15]],
    ]


@settings(max_examples=25)
@given(scores_with_ties(), st.sampled_from([0.01, 0.25, 0.5, 0.8, 0.999]))
def test_unstructured_keeps_its_share_of_the_tensor_and_the_earlier_of_equals(case, sparsity):
    _, scores, dim = case
    pattern = Unstructured(sparsity)
    mask, count = hard_mask(scores, pattern, dim), round(pattern.density * scores.numel())
    rows = scores.movedim(dim, -1).flatten().tolist()
    expected = sorted(sorted(range(len(rows)), key=lambda i: (-rows[i], i))[:count])
    assert mask.movedim(dim, -1).flatten().nonzero().flatten().tolist() == expected
    assert torch.equal(hard_mask(mask.float(), pattern, dim), mask)
    assert check_pattern(mask, pattern) and (
        count == 0 or not check_pattern(mask, Unstructured(1 - (count - 1) / len(rows)))
    )


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(SparseForgeError, match=r"dimension of 6 .* groups of 4"):
        to_groups(torch.zeros(2, 6), TWO_FOUR)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", TWO_FOUR),
        (" 1 : 2 ", Pattern(1, 2)),
        (TWO_FOUR, TWO_FOUR),
        ("50%", Unstructured(0.5)),
        (" 50.0 %", Unstructured(0.5)),
        (Unstructured(0.5), Unstructured(0.5)),
    ],
)
def test_parse(text, expected):
    pattern = parse_pattern(text)
    assert pattern == expected and parse_pattern(str(pattern)) == pattern
    assert pattern.density == 0.5
    assert pattern.fits(8) and pattern.fits(7) is isinstance(pattern, Unstructured)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "4:2",
        "4:4",
        "0:4",
        "-1:4",
        "2:4:8",
        "two:four",
        "²:4",
        None,
        Pattern(4, 2),
        "0%",
        "100%",
        "-5%",
        "%",
        "1e1%",
        Unstructured(1.5),
    ],
)
def test_parse_refuses(text):
    with pytest.raises(SparseForgeError, match="N:M"):
        parse_pattern(text)


def test_all_patterns_of_two_four():
    expected = ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert ["".join(str(int(v)) for v in row) for row in all_patterns(TWO_FOUR)] == expected
    assert all_patterns(Pattern(4, 8)).shape == (70, 8)


def test_measures():
    weight = torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 0.0, 0.0, -0.0]])
    assert check_pattern(weight, TWO_FOUR) and density(weight) == 0.25
    assert not check_pattern(torch.ones(1, 4), TWO_FOUR)
    assert not check_pattern(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), TWO_FOUR, dim=0)
    assert distance_from_binary(torch.tensor([0.0, 1.0])) == 0
    assert distance_from_binary(torch.full((4,), 0.5, dtype=torch.bfloat16)) == 1
    assert density(torch.zeros(0, 4)) == 0
