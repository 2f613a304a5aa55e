from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError
from jaxlm.data.mixture import Mixture, continued

WEIGHTS = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def histories(draw):
    sources = draw(st.integers(1, 4))
    steps = [0, *sorted(draw(st.sets(st.integers(1, 30), max_size=3)))]
    weights = st.tuples(*[WEIGHTS] * sources).filter(any)
    return tuple((step, draw(weights)) for step in steps)


@settings(deadline=None)
@given(histories(), st.integers(1, 7))
def test_each_source_is_read_on_without_gap_or_repeat_however_weights_change(history, rows_per_step):
    mixture = Mixture(history, rows_per_step)
    places = [mixture.locate(row) for row in range(40 * rows_per_step)]
    for source in range(mixture.sources):
        numbers = [number for found, number in places if found == source]
        assert numbers == list(range(len(numbers)))
    for row in range(0, len(places), 5):
        before = Counter(source for source, _ in places[:row])
        assert mixture.drawn(row) == tuple(before[source] for source in range(mixture.sources))
    last_step, last_weights = history[-1]
    for source, _ in places[last_step * rows_per_step :]:
        assert last_weights[source] > 0


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(1, 10**12))
def test_shares_follow_the_weights_at_any_point(weights, row):
    mixture = Mixture(((0, tuple(weights)),), 1)
    for drawn, weight in zip(mixture.drawn(row), weights, strict=True):
        assert abs(drawn - row * weight / sum(weights)) < len(weights) + row * 1e-8


@pytest.mark.parametrize(("weights", "whole"), [((2, 1), 3), ((0.7, 0.3), 10), ((0.05, 0.95), 20), ((0, 3, 1), 4)])
def test_shares_are_exact_where_they_come_out_even(weights, whole):
    mixture = Mixture(((0, weights),), 1)
    for times in (1, 2, 10**9):
        expected = [round(times * whole * weight / sum(weights)) for weight in weights]
        assert list(mixture.drawn(times * whole)) == expected


def test_a_source_added_later_begins_at_its_first_row():
    mixture = Mixture(((0, (1.0, 0.0)), (10, (0.0, 1.0))), rows_per_step=4)
    assert mixture.locate(39) == (0, 39)
    assert mixture.locate(40) == (1, 0)
    assert mixture.drawn(50) == (40, 10)


def test_a_run_goes_on_with_the_same_or_other_weights():
    begun = continued((), 0, (2.0, 1.0))
    assert begun == ((0, (2.0, 1.0)),)
    assert continued(begun, 100, (2.0, 1.0)) == begun
    changed = continued(begun, 100, (1.0, 1.0))
    assert changed == ((0, (2.0, 1.0)), (100, (1.0, 1.0)))
    assert continued(changed, 60, (2.0, 1.0)) == begun, "restored to a step before the change"
    assert continued([[0, [2.0, 1.0]]], 100, (2.0, 1.0)) == begun, "as a checkpoint's JSON gives it"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ((), "is empty"),
        (((1, (1.0,)),), "begins at step 1"),
        (((0, (1.0,)), (0, (2.0,))), "step 0 does not come after"),
        (((0, (0.0, 0.0)),), "numbers >= 0, not all 0"),
        (((0, (-1.0, 2.0)),), "numbers >= 0, not all 0"),
        (((0, (float("nan"),)),), "numbers >= 0, not all 0"),
        (((0, (1.0, 2.0)), (5, (1.0,))), "has 1 weights from step 5; 2 are needed"),
    ],
)
def test_histories_that_make_no_sense_are_refused(history, message):
    with pytest.raises(ConfigError, match=f"history: .*{message}"):
        Mixture(history, 4)
