"""What follows from prices: the frontier that every decision lies on, one format everywhere, groups together."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.decision import decide, everywhere, frontier, standing
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.plans import Plan, PlannedWeight, Price

INT8, SPARSE, BOTH = map(parse_format, ("dense int8", "2:4", "2:4 int8"))


def plan_of(prices, **options):
    """Weights a, b, ... with (loss, bytes, microseconds) by format, in a goal that binds nothing."""
    weights = [
        PlannedWeight(name, (8, 16), DENSE, {f: Price(p[0], p[1], {1: p[2]}) for f, p in by.items()}, group)
        for name, group, by in prices
    ]
    return Plan(weights, (1,), {"speedup": 1.0}, None, 1, **options)


PRICES = [
    ("a", "", {DENSE: (0, 100, 10), INT8: (0.1, 50, 5), SPARSE: (1, 60, 4)}),
    ("b", "", {DENSE: (0, 100, 10), INT8: (0.2, 50, 5), SPARSE: (0.3, 60, 2), BOTH: (2, 30, 1)}),
]


def test_the_frontier_from_dense_to_the_fastest():
    assert frontier(plan_of(PRICES)) == [
        pytest.approx(point)
        for point in [(1, 0), (20 / 15, 0.1), (20 / 7, 0.4), (20 / 6, 1.3), (20 / 5, 3)]
    ]  # fmt: skip


def test_one_format_everywhere_and_where_it_stands():
    both = everywhere(plan_of(PRICES), BOTH)
    assert list(both.formats.values()) == [INT8, BOTH]  # the values alone where it cannot be sparse
    assert standing(both) == pytest.approx((20 / 6, 2.1))
    assert set(everywhere(both, parse_format("dense int4")).formats.values()) == {DENSE}
    by_hand = replace(both, weights=[replace(w, format=parse_format("dense int4")) for w in both.weights])
    assert all(map(math.isnan, standing(by_hand)))


def test_a_group_moves_together():
    grouped = plan_of([(name, "q", by) for name, _, by in PRICES])
    for speed in (1.2, 2.0, 3.0):
        assert len(set(decide(replace(grouped, goal={"speedup": speed})).formats.values())) == 1
    assert BOTH not in decide(replace(grouped, goal={"bytes": 0.6})).formats.values()
    with pytest.raises(SparseForgeError, match=r"no formats give speedup 9: with these it is 3\.33 at most"):
        decide(replace(grouped, goal={"speedup": 9.0}))


numbers = st.integers(1, 40).map(lambda n: n / 4)
prices = st.tuples(numbers, numbers, numbers)
plans = st.lists(
    st.tuples(st.dictionaries(st.sampled_from([INT8, SPARSE, BOTH]), prices), st.booleans()), min_size=1, max_size=6
).map(
    lambda found: plan_of(
        [
            (str(i), "0" if i and together else str(i), {DENSE: (0, 40, 40), **by})
            for i, (by, together) in enumerate(found)
        ]
    )
)


@settings(max_examples=100)
@given(plans, st.floats(1.0, 4.0))
def test_every_decision_lies_on_or_above_the_frontier(made, speed):
    line = frontier(made)
    times, losses = [1 / s for s, _ in line], [loss for _, loss in line]
    assert all(a > b for a, b in itertools.pairwise(times))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(losses))
    try:
        reached, loss = standing(decide(replace(made, goal={"speedup": speed})))
    except SparseForgeError:
        assert speed > line[-1][0] * (1 - 1e-9)
        return
    assert reached >= speed * (1 - 1e-9)
    for (t1, l1), (t2, l2) in itertools.pairwise(zip(times, losses, strict=True)):
        if t2 <= 1 / reached <= t1:  # no formats at all are below the hull
            assert loss >= l1 + (l2 - l1) * (t1 - 1 / reached) / (t1 - t2) - 1e-9
