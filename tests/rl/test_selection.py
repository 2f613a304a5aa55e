"""Which answers are kept, and what the best of n is worth."""

import itertools
import math

import numpy as np
import pytest

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl.config import SelectConfig
from jaxlm.rl.selection import curve, expected_best, groups, select


def answer(text: str, sample: int, ended: bool = True) -> dict:
    return {"text": text, "sample": sample, "stop_reason": "eos" if ended else "length"}


ASKED = [
    [answer("a", 0), answer("b", 1), answer("c", 2, ended=False), answer("d", 3)],
    [answer("x", 0), answer("y", 1), answer("x", 2), answer("z", 3)],
    [answer("cut", sample, ended=False) for sample in range(4)],
]
SCORES = [[0.1, 0.7, 0.9, 0.7], [0.5, -1.0, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0]]


def test_the_best_ended_answer_of_each_prompt():
    # Of equal ones the first; what was cut off is none, however good.
    kept = select(ASKED, SCORES, "best")
    assert kept == ([(0, 1), (1, 0)], 5, 0)


def test_all_ended_answers_from_the_threshold_on_each_text_once():
    assert select(ASKED, SCORES, "above", 0.5) == ([(0, 1), (0, 3), (1, 0)], 5, 1)
    assert select(ASKED, SCORES, "above", 0.7) == ([(0, 1), (0, 3)], 5, 0)
    assert select(ASKED, SCORES, "above", 2.0) == ([], 5, 0)


def test_the_curve_by_hand():
    assert expected_best([0.1, 0.7, 0.4], 2) == pytest.approx(0.6, abs=1e-12)  # (.4 + .7 + .7) / 3
    found = curve([[0.1, 0.7, 0.4, 0.2], [0.0, 0.0, 1.0, 0.0]])
    # One: means .35 and .25. Two: (.2 + .4 + .4 + .7 · 3) / 6 = .516667 and 3 / 6. Four: .7 and 1.
    assert [line["n"] for line in found] == [1, 2, 4]
    np.testing.assert_allclose([line["score"] for line in found], [0.3, 0.508333, 0.85], atol=1e-6)
    np.testing.assert_allclose([line["kl_bound"] for line in found], [0, 0.193147, 0.636294], atol=1e-6)
    np.testing.assert_allclose(found[0]["standard_error"], 0.05, atol=1e-12)
    assert [line["n"] for line in curve([[1.0] * 6])] == [1, 2, 4, 6]
    assert math.isnan(curve([[1.0] * 6])[0]["standard_error"])


@pytest.mark.parametrize("n", range(1, 7))
def test_the_expected_best_is_the_mean_over_all_choices(n):
    scores = np.random.default_rng(0).standard_normal(6).tolist()
    every = [max(some) for some in itertools.combinations(scores, n)]
    assert expected_best(scores, n) == pytest.approx(np.mean(every), abs=1e-12)


def test_lines_are_put_together_by_their_sample_numbers():
    lines = [line for group in ASKED for line in group]
    assert groups(lines, "x") == ASKED
    for broken in (lines[1:], lines[:2] + lines[3:], lines[:-1]):
        with pytest.raises(UserError, match="x: .* was it edited"):
            groups(broken, "x")


def test_fields_that_do_not_go_together_are_refused_by_name():
    verifiers = (VerifierConfig(kind="exact"),)
    for message, fields in {
        "^samples: is empty": dict(samples=""),
        "^reward_model: is empty, and there is no verifier": dict(verifiers=()),
        "^threshold: got None; keep='above' needs": dict(keep="above"),
        "^threshold: is for keep='above'": dict(threshold=1.0),
        "^criteria: is empty": dict(reward_model="x", criteria=()),
    }.items():
        with pytest.raises(ConfigError, match=message):
            SelectConfig(**dict(samples="x", verifiers=verifiers) | fields)
