"""Best-of-n and rejection sampling: answers of a prompt in groups, their scores, and which of them are kept.

asked = groups(lines)                                   # of a sample stage's completions.jsonl
kept = select(asked, scores, keep="best")
curve([[.1, .7, .4, .2], [0., 0., 1., 0.]])
[{"n": 1, "score": .3, "kl_bound": 0.}, {"n": 2, …, "kl_bound": .193}, {"n": 4, …, "kl_bound": .636}]
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.base.errors import UserError
from jaxlm.feedback.verifying import verifier_for
from jaxlm.rl.config import SelectConfig
from jaxlm.train.processes import from_first

Answer = dict[str, Any]


class Kept(NamedTuple):
    chosen: list[tuple[int, int]]
    """(prompt, answer) of each that is kept, in order"""
    cut_off: int
    """answers that did not end by themselves: as chats to train on, they would be given an end that nobody wrote"""
    repeated: int
    """answers left out since the prompt has the same text already"""


def groups(lines: Sequence[Answer], where: str) -> list[list[Answer]]:
    """The lines of each prompt: its samples 0, 1, … follow each other. Raises UserError where they do not."""
    made: list[list[Answer]] = []
    for line in lines:
        if line.get("sample") == 0:
            made.append([])
        if not made or line.get("sample") != len(made[-1]):
            raise UserError(f"{where}: sample {line.get('sample')} does not follow on the one before; was it edited?")
        made[-1].append(line)
    if len({len(group) for group in made}) != 1:
        raise UserError(f"{where}: its prompts have different numbers of answers; was it edited?")
    return made


def select(
    asked: Sequence[Sequence[Answer]],
    scores: Sequence[Sequence[float]],
    keep: Literal["best", "above"],
    threshold: float = 0.0,
) -> Kept:
    """The best ended answer of each prompt (of equal ones the first), or all ended ones from `threshold` on."""
    chosen: list[tuple[int, int]] = []
    cut_off = repeated = 0
    for prompt, (answers, own) in enumerate(zip(asked, scores, strict=True)):
        ended = [index for index, answer in enumerate(answers) if answer["stop_reason"] != "length"]
        cut_off += len(answers) - len(ended)
        if keep == "best":
            chosen += [(prompt, index) for index in sorted(ended, key=lambda index: -own[index])[:1]]
            continue
        good = [index for index in ended if own[index] >= threshold]
        first = {answers[index]["text"]: index for index in reversed(good)}
        repeated += len(good) - len(first)
        chosen += [(prompt, index) for index in sorted(first.values())]
    return Kept(chosen, cut_off, repeated)


def expected_best(scores: Sequence[float], n: int) -> float:
    """The mean over all choices of n of these answers of the best one's score: no choice of n is more likely.

    >>> expected_best([.1, .7, .4], 2)          # (.7 + .4 + .7) / 3
    .6
    """
    K = len(scores)
    # The i-th lowest, counted from 0, is the best of those sets that take the other n - 1 from below it.
    ways = ((score, math.comb(index, n - 1)) for index, score in enumerate(sorted(scores)))
    return math.fsum(score * count for score, count in ways) / math.comb(K, n)


def curve(scores: Sequence[Sequence[float]]) -> list[dict[str, int | float]]:
    """The mean score of the best of 1, 2, 4, … answers up to all, with the standard error over prompts.

    "kl_bound" is log n - (n - 1) / n: the best of n is no more nats away from the distribution that the answers were
    drawn from (arXiv:2401.01879, theorem 1).
    """
    K = len(scores[0])
    made = []
    for n in sorted({2**power for power in range(K.bit_length())} | {K}):
        each = [expected_best(own, n) for own in scores]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        bound = math.log(n) - (n - 1) / n
        made.append({"n": n, "score": math.fsum(each) / len(each), "standard_error": error, "kl_bound": bound})
    return made


def answered(answer: Answer) -> list[dict[str, Any]]:
    """The conversation with the answer at its end."""
    asked = answer.get("messages") or [{"role": "user", "content": answer["prompt"]}]
    return [*asked, {"role": "assistant", "content": answer["text"]}]


def scores_of(config: SelectConfig, asked: list[list[Answer]], judge: Any) -> list[list[float]]:
    """Of each prompt's answers: the criteria of `judge`, a loaded reward model if there is one, weighted, and the
    verifiers' scores, weighted."""
    total = np.zeros((len(asked), len(asked[0])))
    if judge is not None:
        weights = {criterion.name: criterion.weight for criterion in config.criteria}
        rewards = judge.rewards([answered(answer) for group in asked for answer in group]).astype(np.float64)
        given = np.array([weights.get(name, 0.0) for name in judge.config.criteria])
        total += np.sum(rewards * given[None, :], axis=1).reshape(total.shape)
    for verifier in config.verifiers:
        for row, group in enumerate(asked):
            where = f"verifiers: prompt {group[0]['prompt_id']} of {config.samples}"
            verify = verifier_for(verifier, group[0], where)
            each = lambda verify=verify, group=group: [verify(a["prompt"], a["text"]).score for a in group]
            total[row] += verifier.weight * np.array(from_first(each))
    if not np.isfinite(total).all():
        raise UserError("reward_model: gives scores that are not finite; is it damaged?")
    return total.tolist()
