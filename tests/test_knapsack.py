"""The knapsack: feasible whenever anything is, and within one step of the best that trying everything finds."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.knapsack import Option, choose, hull

#: quarters, whose sums are exact
numbers = st.integers(0, 40).map(lambda n: n / 4)
cases = st.lists(st.lists(st.builds(Option, numbers, numbers), min_size=1, max_size=5), min_size=1, max_size=5)


def total(items, chosen):
    taken = [options[k] for options, k in zip(items, chosen, strict=True)]
    return sum(o.value for o in taken), sum(o.weight for o in taken)


def best(items, limit):
    found = (total(items, chosen) for chosen in itertools.product(*(range(len(options)) for options in items)))
    return min((value for value, weight in found if weight <= limit), default=None)


@settings(max_examples=300, deadline=None)
@given(cases, numbers)
def test_against_trying_everything(items, limit):
    limit *= len(items) / 2
    chosen, optimum = choose(items, limit), best(items, limit)
    if optimum is None:
        assert chosen is None
        return
    value, weight = total(items, chosen)
    steps = [b.value - a.value for o in items for a, b in itertools.pairwise([o[k] for k in hull(o)])]
    assert weight <= limit
    assert optimum <= value <= optimum + max(steps, default=0.0)


@settings(max_examples=100, deadline=None)
@given(cases)
def test_without_a_limit_that_binds_every_item_has_its_least_value(items):
    assert total(items, choose(items, 1e9))[0] == sum(min(o.value for o in options) for options in items)


def test_the_hull_leaves_out_what_no_multiplier_would_take():
    options = [Option(0, 8), Option(4, 6), Option(3, 4), Option(9, 5), Option(9, 0), Option(0, 9)]
    assert hull(options) == [0, 2, 4]


@pytest.mark.parametrize(("limit", "chosen"), [(16, [0, 0]), (12, [1, 0]), (8, [1, 1]), (7.5, None)])
def test_the_cheapest_step_is_the_first(limit, chosen):
    items = [[Option(0, 8), Option(1, 4)], [Option(0, 8), Option(2, 4)]]
    assert choose(items, limit) == chosen


def test_what_a_step_leaves_over_is_filled_from_inside_of_the_hull():
    wide = [Option(0, 10), Option(5, 6), Option(6, 0)]  # the middle is above the line between the others
    assert hull(wide) == [0, 2]
    assert choose([wide], 7) == [1]
