"""Every schedule against arXiv 2605.06402: values by hand, monotone, right at both ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_fx.methods import schedule

share = st.floats(0, 1, allow_nan=False)
ordered = st.lists(share, min_size=2, max_size=2).map(sorted)


def test_ramp_is_linear_between_its_ends():
    assert [schedule.ramp(p, 0.2, 0.6) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx(
        [0, 0, 0.25, 0.5, 1, 1]
    )


def test_ramp_without_width_jumps():
    assert schedule.ramp(0.29999, 0.3, 0.3) == 0
    assert schedule.ramp(0.3, 0.3, 0.3) == 1
    assert schedule.ramp(0.0, 0.0, 0.0) == 1


def test_softness_of_the_authors_run():
    """lambda: 1 until step 2000, 0 from step 17000 of 20000, half way at 9500."""
    values = [schedule.softness(step / 20_000, 0.1, 0.85) for step in (0, 2000, 9500, 17_000, 20_000)]
    assert values == pytest.approx([1, 1, 0.5, 0, 0])


@given(times=ordered, progress=ordered)
def test_softness_falls_from_one_to_zero(times, progress):
    start, end = times
    early, late = (schedule.softness(p, start, end) for p in progress)
    assert 1 >= early >= late >= 0
    assert schedule.softness(end, start, end) == 0
    assert schedule.softness(1.0, start, end) == 0
    if start < end:
        assert schedule.softness(start, start, end) == 1
    assert schedule.softness(start - 1e-9, start, end) == 1


@given(end=share, final=share, progress=ordered)
def test_target_sparsity_rises_to_its_final_value(end, final, progress):
    early, late = (schedule.target_sparsity(p, end, final) for p in progress)
    assert 0 <= early <= late <= final
    assert schedule.target_sparsity(end, end, final) == final
    if end > 0:
        assert schedule.target_sparsity(0.0, end, final) == 0


def test_target_sparsity_by_hand():
    assert [schedule.target_sparsity(p, 0.1, 0.5) for p in (0.0, 0.05, 0.1, 0.9)] == pytest.approx([0, 0.25, 0.5, 0.5])


def test_temperature_is_the_papers_power_of_gamma():
    """T_k = max(T_min, T_0 gamma^k), k = 500 updates over the run."""
    gamma, updates = 0.97, 500
    half_life = math.log(0.5) / math.log(gamma) / updates
    for k in (0, 1, 10, 50, 98, 99, 499):  # 0.97^98 is the last above 0.05
        expected = max(0.05, 1.0 * gamma**k)
        assert schedule.temperature(k / updates, 1.0, 0.05, half_life) == pytest.approx(expected, rel=1e-9)


@given(progress=ordered, half_life=st.floats(1e-4, 1), floor=st.floats(1e-6, 0.5))
def test_temperature_falls_to_its_floor(progress, half_life, floor):
    early, late = (schedule.temperature(p, 1.0, floor, half_life) for p in progress)
    assert 1 >= early >= late >= floor
    assert schedule.temperature(0.0, 1.0, floor, half_life) == 1
    assert schedule.temperature(half_life, 1.0, 1e-6, half_life) == pytest.approx(0.5)


@given(times=ordered, progress=ordered, first=st.floats(0, 1), rise=st.floats(0, 2))
def test_between_rises_from_its_first_value_to_its_last(times, progress, first, rise):
    last = first + rise
    early, late = (schedule.between(p, *times, first, last) for p in progress)
    assert first <= early <= late <= last + 1e-9
    assert schedule.between(times[1], *times, first, last) == pytest.approx(last)
    if times[0] < times[1]:
        assert schedule.between(times[0], *times, first, last) == first


def test_the_smooth_step_by_hand():
    assert [schedule.smooth_step(t) for t in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.15625, 0.5, 1])


def test_learning_rate_by_hand():
    """Linear to the peak at a tenth of the run; half-way down the cosine it is the mean of peak and floor."""
    points = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 1.0: 0.1}
    for progress, factor in points.items():
        assert schedule.learning_rate(progress, 0.1, 0.1) == pytest.approx(factor)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))  # cos(pi / 4)
    assert schedule.learning_rate(0.325, 0.1, 0.1) == pytest.approx(quarter)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert schedule.learning_rate(0.0, 0.0, 0.1) == 1


@given(progress=ordered, warmup=st.floats(0, 0.99), floor=share)
def test_learning_rate_rises_then_falls_to_its_floor(progress, warmup, floor):
    early, late = (schedule.learning_rate(p, warmup, floor) for p in progress)
    assert min(early, late) >= 0 and max(early, late) <= 1
    if progress[1] <= warmup:
        assert early <= late
    if progress[0] >= warmup:
        assert early >= late >= floor - 1e-12
    assert schedule.learning_rate(warmup, warmup, floor) == pytest.approx(1)
    assert schedule.learning_rate(1.0, warmup, floor) == pytest.approx(floor)


@given(decay=st.floats(0.5, 0.999), updates=st.integers(1, 2000), reference=st.integers(1, 700))
def test_a_rescaled_decay_forgets_as_much_in_total(decay, updates, reference):
    rescaled = schedule.rescale_decay(decay, updates, reference)
    assert updates * math.log(rescaled) == pytest.approx(reference * math.log(decay), rel=1e-6, abs=1e-9)


def test_rescaling_to_the_same_length_changes_nothing():
    assert schedule.rescale_decay(0.9, 667, 667) == 0.9
    assert schedule.rescale_decay(0.9, 1, 2) == pytest.approx(0.81)
    assert schedule.rescale_decay(0.9, 0, 2) == pytest.approx(0.81)  # a run without updates has one
