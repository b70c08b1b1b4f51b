"""Paired tests, against values worked out by hand."""

import math

import pytest

from sparseforge_fx.evaluation import paired


def test_the_error_of_a_ratio():
    assert paired.ratio_error([1.0, 2.0, 3.0], [1, 1, 1]) == pytest.approx(1 / math.sqrt(3))  # s / sqrt(n)
    assert paired.ratio_error([2.0, 4.0, 8.0], [1, 2, 4]) == pytest.approx(0.0)  # each at the mean rate
    assert paired.ratio_error([2.0], [1]) is None


def test_windows_in_pairs():
    dense = [10.0, 50.0, 90.0, 130.0] * 5  # windows differ by far more than the models
    found = paired.windows(dense, [d + 1 + 0.1 * (i % 2) for i, d in enumerate(dense)], [10] * 20)
    assert found["difference"] == pytest.approx(0.105) and found["stderr"] < 0.002
    assert found["pairs"] == 20 and found["p"] == pytest.approx(
        1e-4, rel=0.01
    )  # all of one sign: fewer than one in 10,000
    same = paired.windows(dense, dense, [10] * 20)
    assert same["difference"] == 0 and same["p"] == 1.0
    few = paired.windows([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1, 1, 1])
    assert few["p"] == pytest.approx(0.25, abs=0.02)  # two of the eight signs
    assert paired.windows([1.0], [2.0], [1]) is None


def test_documents_in_pairs():
    dense, sparse = [1] * 10 + [0] * 2 + [1] * 8, [0] * 10 + [1] * 2 + [1] * 8
    found = paired.documents(dense, sparse)
    assert (found["won"], found["lost"], found["pairs"], found["difference"]) == (2, 10, 20, -0.4)
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 4096)  # two tails of a binomial of 12
    assert paired.documents([1, 0], [1, 0])["p"] == 1.0
