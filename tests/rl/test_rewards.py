"""Rewards by programs: each prompt's own verifiers, their weighted sum, and records that cannot be judged."""

import pytest

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rewards import Judge, verifier_for
from jaxlm.sample.sampler import Completion


def almost_right(prompt: str, answer: str) -> float:
    return 0.73


def repeats(prompt: str, answer: str) -> bool:
    return prompt in answer


def of(name: str, **fields) -> VerifierConfig:
    return VerifierConfig(kind="function", function=f"{__name__}:{name}", **fields)


def said(text: str) -> Completion:
    return Completion(text, (1,), (-1.0,), "eos")


def asked(*records: dict) -> list[Prompt]:
    return [
        Prompt(number, f"p{number}", (1,), record, f"x.jsonl:{number + 1}") for number, record in enumerate(records)
    ]


@pytest.mark.parametrize(
    ("kind", "target", "right", "wrong"),
    [
        ("exact", "42", "42", "42."),
        ("exact", ["42", "42."], "42.", "43"),
        ("normalized", "The end", "the  END!", "an end"),
        ("number", 42, "about 42", "42 or 43"),
        ("choice", "B", "(B)", "A or B"),
        ("regex", r"^\d+$", "42", "x42"),
        ("json_schema", {"type": "integer"}, "42", "4.5"),
    ],
)
def test_each_kind_of_verifier_reads_its_target(kind, target, right, wrong):
    verify = verifier_for(VerifierConfig(kind=kind, target_field="answer"), {"answer": target}, "here")
    assert verify("", right).score == 1
    assert verify("", wrong).score == 0


def test_scores_are_the_weighted_sums_of_each_prompts_own_verifiers():
    some = asked({"target": "a"}, {"target": "b"})
    judge = Judge([VerifierConfig(kind="exact", weight=2.0), of("almost_right", weight=-0.5)], some, "verifiers")
    # As many answers for each prompt as there are; the prompts in any order.
    done = [said(text) for text in "abba"]
    assert judge.scores([some[1], some[0]], done) == [-0.365, 1.635, -0.365, 1.635]
    assert Judge([of("almost_right")], some, "verifiers").scores(some, done) == [0.73] * 4
    assert Judge([of("repeats")], some, "verifiers").scores(some[1:], [said("p1!"), said("p0")]) == [1, 0]
    assert Judge([], some, "verifiers").scores(some, done) == [0] * 4


def test_a_record_that_cannot_be_judged_is_refused_at_the_start_by_name():
    some = asked({"target": "4"}, {"goal": "4"})
    with pytest.raises(UserError, match="verifiers: x.jsonl:2: has no field 'target', which verifier exact compares"):
        Judge([VerifierConfig(kind="exact")], some, "verifiers")
    with pytest.raises(UserError, match="gold: x.jsonl:1: target: .*got 'four'; a number"):
        Judge([VerifierConfig(kind="number")], asked({"target": "four"}), "gold")
    with pytest.raises(UserError, match="x.jsonl:1: target: pattern: .* is no regular expression"):
        Judge([VerifierConfig(kind="regex")], asked({"target": "("}), "verifiers")
    with pytest.raises(ConfigError, match="function: .*cannot be imported"):
        Judge([VerifierConfig(kind="function", function="nowhere:at_all")], some, "verifiers")
