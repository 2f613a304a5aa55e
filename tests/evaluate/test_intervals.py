"""Intervals against numbers by hand, against scipy's, and against repeated draws."""

import numpy as np
import pytest
from scipy import stats

from jaxlm.evaluate.intervals import by_group, clustered_share, difference, mean, ratio, share


def test_wilson_by_hand():
    # p = 3/4, n = 4, z = 1.96: centre (.75 + .4802) / 1.9604, half 1.96 / 1.9604 * sqrt(.1875/4 + .060025)
    assert share([1, 1, 1, 0]) == {"value": 0.75, "interval": pytest.approx([0.300636, 0.954414], abs=1e-6), "n": 4}


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (37, 40), (1, 200)])
def test_wilson_is_scipys(right, n):
    found = share([True] * right + [False] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-4)


def test_clusters_of_one_are_independent_examples():
    scores = np.array([1.0, 0, 1, 1, 0, 1, 0, 1] * 10)
    alone, clusters = share(scores), clustered_share(scores, np.ones(80))
    assert clusters["value"] == alone["value"] == 0.625
    assert clusters["interval"] == pytest.approx(alone["interval"], abs=2e-3)  # N / (N - 1)


def test_pairs_that_always_agree_count_once():
    once = clustered_share(np.array([1.0, 0, 1, 1, 0, 1]), np.ones(6))
    thrice = clustered_share(3 * np.array([1.0, 0, 1, 1, 0, 1]), 3 * np.ones(6))
    assert thrice["interval"] == pytest.approx(once["interval"])
    assert clustered_share(np.array([9.0]), np.array([9.0])) == share([1])


def test_intervals_cover_the_truth_in_95_of_100_cases():
    draw = np.random.default_rng(0)
    inside = {"share": 0, "clustered": 0, "difference": 0}
    for _ in range(1000):
        low, high = share(draw.random(60) < 0.9)["interval"]
        inside["share"] += low < 0.9 < high
        pairs = draw.integers(1, 6, 80)
        won = draw.binomial(pairs, draw.beta(4, 2, 80)).astype(float)  # prompts differ: 2/3 on average
        low, high = clustered_share(won, pairs.astype(float))["interval"]
        inside["clustered"] += low < 2 / 3 < high
        low, high = difference(share(draw.random(80) < 0.7), share(draw.random(50) < 0.6))["interval"]
        inside["difference"] += low < 0.1 < high
    assert all(930 <= count <= 970 for count in inside.values()), inside


def test_the_difference_by_hand():
    a, b = {"value": 0.7, "interval": [0.6, 0.9]}, {"value": 0.5, "interval": [0.2, 0.6]}
    # below: sqrt(.1² + .1²), above: sqrt(.2² + .3²)
    assert difference(a, b)["value"] == pytest.approx(0.2)
    assert difference(a, b)["interval"] == pytest.approx([0.2 - 0.1414214, 0.2 + 0.3605551])
    assert difference(a, {"value": 0.5, "interval": None})["interval"] is None


def test_the_ratio_covers_the_truth_in_95_of_100_cases():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        below = random.integers(10, 1000, 60).astype(float)
        above = below * random.gamma(20, 0.1, 60)  # the true ratio is 2
        low, high = ratio(above, below)["interval"]
        inside += low < 2 < high
    assert 920 <= inside <= 970


def test_one_document_has_no_interval():
    assert ratio(np.array([3.0]), np.array([2.0])) == {"value": 1.5, "interval": None}
    assert mean([4.0]) == {"value": 4.0, "interval": None, "n": 1}


def test_groups_are_shown_where_there_are_several():
    assert by_group([1, 0, 1], ["en", "en", "en"]) == {}
    assert {name: found["value"] for name, found in by_group([1, 0, 1], ["en", "en", "ru"]).items()} == {
        "en": 0.5,
        "ru": 1.0,
    }
