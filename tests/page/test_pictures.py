"""Pictures: what is drawn of a run's curves."""

import pytest

from sparseforge_fx.page.pictures import POINTS, curves, frontier, thinned


def test_few_points_stand_for_many():
    rows = [{"step": s, "loss": float(s % 2)} for s in range(1, 5001)]
    short = thinned(rows)
    assert len(short) == POINTS and short[-1] is rows[-1]
    assert all(0.4 < row["loss"] < 0.6 for row in short[:-1])  # means, not every twentieth value
    assert [row["step"] for row in short] == sorted(row["step"] for row in short)
    assert thinned(rows[:POINTS]) == rows[:POINTS]


def test_what_stands_still_gets_no_picture():
    rows = [
        {"step": s, "tokens": s, "seconds": s, "loss": 3 - s, "task": 3.0, "lambda": 0.0, "new_one": s} for s in (1, 2)
    ]
    drawn, constant = curves(rows)
    assert [title for title, _ in drawn] == ["Loss", "New one"]  # a curve that nobody knows is drawn, too
    assert constant == {"task": 3.0, "lambda": 0.0}
    assert "loss goes from 2 to 1" in drawn[0][1]
    assert curves([]) == ([], {}) and curves(rows[:1])[0] == []


def test_a_picture_is_the_same_every_time_and_has_text():
    points = [("dense", 10.0, 20.0), ("packed", 15.0, 25.0)]
    svg = frontier(points)
    assert svg == frontier(points) and svg.startswith("<svg viewBox=") and "<metadata" not in svg
    assert ">tokens per second</text>" in svg and "packed: 15 tokens per second at perplexity 25" in svg
    assert "var(--ink)" in svg and "var(--line-2)" in svg


@pytest.mark.parametrize("low", [0.0, 5.4])
def test_an_axis_begins_at_zero_where_that_hides_nothing(low):
    ((_, svg),), _ = curves([{"step": 1, "loss": low}, {"step": 2, "loss": 5.5}])
    assert (">0</text>" in svg) == (low == 0)
