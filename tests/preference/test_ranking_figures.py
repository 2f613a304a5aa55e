import math

import numpy as np
import pytest
import scipy.stats

from jaxlm.preference import figures
from jaxlm.preference.figures import Answers, Pairs, Share
from jaxlm.preference.ranked import Pair, Prompt, RankingBatches


def pairs_of(difference, **columns):
    count = len(difference)
    rest = {name: np.asarray(columns.get(name, np.zeros(count, int))) for name in Pairs._fields[1:]}
    return Pairs(np.asarray(difference, float), **rest)


def test_wilson_by_hand():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        share = figures.wilson(correct, total)
        assert (share.correct, share.total, share.share) == (correct, total, correct / total)
        assert share[3:] == pytest.approx((low, high), abs=5e-5)
    everything = figures.wilson(29, 29)
    assert (everything.low, everything.high) == pytest.approx((0.8830, 1.0), abs=5e-5)
    nothing = figures.wilson(0, 0)
    assert math.isnan(nothing.share)
    assert nothing[3:] == (0.0, 1.0)


def test_wilson_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = [
        share.low <= 0.7 <= share.high
        for share in (figures.wilson(int(k), 40) for k in random.binomial(40, 0.7, 20_000))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_accuracy_in_all_and_by_what_a_pair_is():
    pairs = pairs_of(
        [1.0, -1.0, 0.0, 2.0, 3.0], ranked=[2, 2, 4, 4, 4], distance=[1, 1, 1, 2, 3], annotator=[7, 7, 7, 0, 0]
    )
    assert figures.accuracy(pairs)[:3] == (3, 5, 0.6), "equal rewards are wrong"
    counts = lambda column: {value: share[:2] for value, share in figures.accuracy_by(pairs, column).items()}
    assert counts("ranked") == {2: (1, 2), 4: (2, 3)}
    assert counts("distance") == {1: (1, 3), 2: (1, 1), 3: (1, 1)}
    assert counts("annotator") == {0: (2, 2), 7: (1, 3)}
    assert counts("criterion") == {0: (3, 5)}


def test_a_calibrated_model_has_no_calibration_error_and_a_boastful_one_has():
    random = np.random.default_rng(0)
    true = random.normal(scale=2.0, size=200_000)
    # The pair is turned so that the answer preferred comes first; with chance sigmoid it is the one thought better.
    difference = np.where(random.random(len(true)) < 1 / (1 + np.exp(-true)), true, -true)
    table, error = figures.calibration(difference)
    assert error < 0.01
    assert [(round(b.low, 2), round(b.high, 2)) for b in table][:2] == [(0.5, 0.55), (0.55, 0.6)]
    assert all(b.observed.low - 0.005 < b.predicted < b.observed.high + 0.005 for b in table)
    assert sum(b.observed.total for b in table) == len(difference)
    assert figures.calibration(3 * difference)[1] > 0.08


def test_calibration_by_hand():
    logit = lambda p: math.log(p / (1 - p))
    table, error = figures.calibration(np.array([logit(0.6), -logit(0.7), logit(0.95), logit(0.99)]), bins=2)
    assert [(b.observed.correct, b.observed.total) for b in table] == [(1, 2), (2, 2)]
    assert [b.predicted for b in table] == pytest.approx([0.65, 0.97])
    assert error == pytest.approx(0.5 * 0.15 + 0.5 * 0.03)
    table, error = figures.calibration(np.array([800.0, -800.0], np.float32))
    assert (table[-1].observed.total, error) == (2, pytest.approx(0.5))
    assert math.isnan(table[0].predicted)
    assert math.isnan(figures.calibration(np.array([]))[1])


def test_correlations_are_those_of_scipy():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 30, 200)  # with ties
    reward = (np.sqrt(tokens) + random.normal(size=200)).astype(np.float32)
    found = figures.correlation(reward, tokens)
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(reward, tokens).statistic, abs=1e-6)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(reward, tokens).statistic, abs=1e-6)
    assert figures.correlation(tokens, np.exp(tokens / 30)).spearman == pytest.approx(1)
    for x in ([], [1.0], [0.1, 0.1, 0.1]):
        assert all(map(math.isnan, figures.correlation(np.array(x), np.arange(len(x)))))
    answers = Answers(np.array([1.0, 2.0, 5.0, 1.0]), np.array([10, 20, 10, 20]), np.array([0, 0, 1, 1]))
    by_criterion = figures.length_correlation(answers)
    assert {criterion: found.pearson for criterion, found in by_criterion.items()} == pytest.approx({0: 1, 1: -1})


def test_results_are_gathered_from_batches_without_padding_and_each_answer_once():
    ids = lambda *sizes: [np.arange(size) for size in sizes]
    three = [Pair(0, 1, 0, 0.5), Pair(0, 2, 0, 0.5, 2, 0.0, 4), Pair(2, 1, 1, 1.0)]
    prompts = [Prompt("a", ids(5, 3, 4), three, 2), Prompt("b", ids(6, 7), [Pair(1, 0, 0, 1.0)], 2)]
    batches = RankingBatches(prompts, rows=2, row_length=8, pairs=5, seed=0)
    held = list(batches.heldout())
    assert len(held) == 2
    rewards = [(np.array([3.0, 3.0, 0.5, 9, 9]), np.array([1.0, 2.0, 0.25, 9, 9])), (np.full(5, 4.0), np.full(5, 6.0))]
    pairs, answers = figures.gather((batch, *both) for batch, both in zip(held, rewards, strict=True))
    assert pairs.difference.tolist() == [2.0, 1.0, 0.25, -2.0]
    assert pairs.criterion.tolist() == [0, 0, 1, 0]
    assert pairs.ranked.tolist() == [3, 3, 2, 2]
    assert pairs.distance.tolist() == [1, 2, 1, 1]
    assert pairs.annotator.tolist() == [0, 4, 0, 0]
    found = sorted(zip(answers.criterion.tolist(), answers.tokens.tolist(), answers.reward.tolist(), strict=True))
    assert found == [(0, 1, 1.0), (0, 2, 2.0), (0, 3, 3.0), (0, 4, 6.0), (0, 5, 4.0), (1, 1, 0.25), (1, 2, 0.5)]
    assert figures.accuracy(pairs) == Share(3, 4, 0.75, *figures.wilson(3, 4)[3:])
