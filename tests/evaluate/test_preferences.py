"""Win rates by hand: shares of pairs, ties, clusters, whose annotations count."""

import math

import numpy as np
import pytest

from jaxlm.base.errors import UserError
from jaxlm.evaluate import lineage, preferences
from jaxlm.evaluate.config import RatingsConfig
from jaxlm.evaluate.preferences import points, ratings
from jaxlm.feedback.rankings import parse
from jaxlm.reward.config import RankingSource


def record(prompt_id, tiers, annotator="ann", role="trainer", status="submitted", criterion="overall", **extra):
    """Completions are called by their policy and a number: new1, new2, old1."""
    ids = [id for tier in tiers for id in tier]
    annotation = {"id": "1", "annotator": annotator, "role": role, "status": status, "rankings": {criterion: tiers}}
    return parse(
        {
            "prompt_id": prompt_id,
            "messages": [{"role": "user", "content": "?"}],
            "completions": [{"id": id, "content": id, "policy": id.rstrip("0123456789")} for id in ids],
            "annotations": [annotation | extra],
        }
    )


CONFIG = RatingsConfig(sources=(RankingSource(name="r", path="r.jsonl"),), policy="new")


def test_shares_of_pairs_by_hand():
    records = [
        record("1", [["new1"], ["old1", "new2"], ["person1"]]),  # new1: 2 of 2; new2: a tie and a win, 1.5 of 2
        record("2", [["old1"], ["new1"]]),  # 0 of 1
        record("2", [["new1"], ["old1"]], annotator="bob", role="expert"),  # 1 of 1
        record("3", [["old1"], ["person1"]]),  # none of its own
        record("4", [["new1"], ["old1"]], status="draft"),
        record("5", [["new1"], ["old1"]], criterion="short"),
    ]
    found = ratings(CONFIG, records)
    assert (found["value"], found["pairs"], found["n"], found["prompts"]) == (pytest.approx(4.5 / 6), 6, 2, 2)
    assert found["by_role"] == {"trainer": pytest.approx(3.5 / 5), "expert": 1.0}
    assert found["annotators"] == {"ann": 5, "bob": 1}
    against = ratings(RatingsConfig(sources=CONFIG.sources, policy="new", against="old", roles=("trainer",)), records)
    assert (against["value"], against["pairs"]) == (0.5, 3)  # 1, .5 and 0
    assert against["bradley_terry"] == 0
    short = ratings(RatingsConfig(sources=CONFIG.sources, policy="new", criterion="short"), records)
    assert short["value"] == 1


def test_bradley_terry_of_two_is_the_log_odds():
    records = [record(str(n), [["new1"], ["old1"]] if n < 30 else [["old1"], ["new1"]]) for n in range(40)]
    found = ratings(RatingsConfig(sources=CONFIG.sources, policy="new", against="old"), records)
    assert found["bradley_terry"] == pytest.approx(math.log(3))
    # Wilson of 39, since the variance over 40 clusters has 39 below: centre .72758, half .13159
    assert found["interval"] == pytest.approx([0.59599, 0.85917], abs=1e-5)


def test_nothing_to_compare_is_no_evidence():
    found = ratings(CONFIG, [record("1", [["old1"], ["person1"]])])
    problem = "no ranking record compares 'new' and others by 'overall'"
    assert found["no_evidence"] == f"{problem} (other policies there: old, person; criteria: overall)"


def test_the_optimised_reward_model_is_no_judge():
    digest = "0123456789abcdef" * 4
    unfit = lambda optimised: lambda annotation: lineage.unfit_judge(annotation, optimised)
    judged = [
        record("1", [["new1"], ["old1"]], annotator="reward", role="judge", model_hash=digest),
        record("2", [["new1"], ["old1"]], annotator="other", role="judge", model_hash="f" * 64),
        record("3", [["new1"], ["old1"]], annotator="silent", role="judge"),
        record("4", [["old1"], ["new1"]]),
    ]
    assert ratings(CONFIG, judged, unfit(set()))["pairs"] == 4
    found = ratings(CONFIG, judged, unfit({digest}))
    assert (found["value"], found["pairs"]) == (0.5, 2)
    assert found["left_out"]["reward"] == "is the very reward model that the model was optimised for"
    assert "does not say by which model" in found["left_out"]["silent"]
    found = ratings(CONFIG, judged[:1], unfit({digest}))
    assert found["no_evidence"] == "reward: is the very reward model that the model was optimised for"


def test_points():
    assert points(np.array([1.0, 0.5, 0.1]), np.array([0.0, 0.5, 0.2])).tolist() == [1, 0.5, 0]


def test_bad_records_are_refused_by_line(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt_id": "1"}\n')
    config = RatingsConfig(sources=(RankingSource(name="r", path=str(tmp_path / "r.jsonl")),), policy="new")
    with pytest.raises(UserError, match=r"ratings.sources: .*r.jsonl:1: missing_field: completions: is missing"):
        preferences.read(config)
