"""Experts as tables of the page."""

import pytest

from sparseforge_fx.page import stacks

REPORT = {
    "experts": {
        "m.0.up": {"tokens": [1200, 7, 90, 0], "error": [0.05, 0.5, 0.0625, None], "by_magnitude": [1, 3]},
        "m.1.up": {"tokens": [40, 50, 60], "error": [0.25, 0.25, 0.25], "by_magnitude": []},
    }
}


def test_a_line_for_every_stack():
    (table,) = stacks.of_stacks(REPORT)
    assert [dict(zip(table.head, row, strict=True)) for row in table.rows] == [
        {
            "stack": "m.0.up",
            "experts": "4",
            "fewest tokens": "0",
            "median": "48",
            "most": "1,200",
            "median error": "6.2%",
            "largest": "50.0%",
            "by magnitude": "1, 3",
        },
        {
            "stack": "m.1.up",
            "experts": "3",
            "fewest tokens": "40",
            "median": "50",
            "most": "60",
            "median error": "25.0%",
            "largest": "25.0%",
            "by magnitude": "none",
        },
    ]
    assert list(table.numbers) == [1, 2, 3, 4, 5, 6]


def test_a_line_for_every_expert():
    first, second = stacks.of_experts(REPORT)
    assert (first.caption, second.caption) == ("m.0.up", "m.1.up")
    assert first.rows == [("0", "1,200", "5.0%", ""), ("1", "7", "50.0%", "yes"), ("2", "90", "6.2%", ""), ("3", "0", "", "yes")]  # fmt: skip


def test_curvature_has_no_errors():
    report = {"experts": {"up": {"tokens": [64, 3], "by_magnitude": [1]}}}
    (table,), (each,) = stacks.of_stacks(report), stacks.of_experts(report)
    assert table.head == ("stack", "experts", "fewest tokens", "median", "most", "by magnitude")
    assert table.rows == [("up", "2", "3", "34", "64", "1")]
    assert each.rows == [("0", "64", "", ""), ("1", "3", "", "yes")]


@pytest.mark.parametrize("report", [{}, {"experts": {}}])
def test_a_model_without_experts(report):
    assert stacks.of_stacks(report) == stacks.of_experts(report) == []


def test_so_many_experts_that_single_ones_are_left_to_the_json():
    many = {f"m.{i}.up": {"tokens": [9] * 256, "error": [0.5] * 256, "by_magnitude": []} for i in range(20)}
    (table,) = stacks.of_stacks({"experts": many})
    assert len(table.rows) == 20 and stacks.of_experts({"experts": many}) == []
