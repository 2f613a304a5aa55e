"""Is a model preferred to others: by a reward model on the same prompts, or by people's and judges' ranking records?

    {"value": .61, "interval": [.55, .67], "n": 200, "against": "...", ...}

The share of comparisons that the model wins, a tie counting half. Prompts are what is independent: the interval of
`ratings`, whose prompts have many pairs, is clustered by prompt.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.base import manifest
from jaxlm.base.errors import UserError
from jaxlm.evaluate import intervals
from jaxlm.evaluate.config import EvaluateConfig, RatingsConfig, WinRateConfig
from jaxlm.evaluate.subject import Messages, Records, Subject, subject_of
from jaxlm.evaluate.tasks import objects
from jaxlm.feedback import rankings
from jaxlm.feedback.records import Annotation, RankingRecord
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.sampler import Completion
from jaxlm.text.clean import Reason


def prompts(config: WinRateConfig) -> list[list[dict[str, Any]]]:
    """The conversations up to the user's last turn."""
    found = []
    for where, record in [each for source in config.prompts for each in objects(source, "win_rate.prompts")]:
        given = record.get("messages", record.get("prompt"))
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f'win_rate.prompts: {where}: has neither "messages" nor a "prompt"')
        while messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"win_rate.prompts: {where}: holds no turn of the user")
        found.append(messages)
    return found[: config.limit or None]


def answers(asked: Sequence[Messages], subject: Subject, sampling: SamplingConfig) -> list[Completion]:
    template = subject.chat()
    return subject.generate([template.prompt(messages) for messages in asked], sampling)


def win_rate(
    config: EvaluateConfig, subject: Subject, records: Records, optimised: set[str], opened: Callable[[str, str], Any]
) -> dict[str, Any]:
    """The model's answers against another's, by a reward model; one of these two at a time is in memory too.

    `opened(path, field)` gives a model's folder and its `hub.LanguageModel`. A reward model among those that the model
    was `optimised` for, by hash, is no evidence.
    """
    asked_for = config.win_rate
    assert asked_for is not None
    asked = prompts(asked_for)
    own = answers(asked, subject, config.sampling)
    folder, rival = opened(asked_for.against, "win_rate.against")
    told = {"against": str(folder)}
    other = subject_of(config, rival, told["against"], "" if rival.chat_template else None)
    others = answers(asked, other, config.sampling)
    del rival, other
    folder, judge = opened(asked_for.reward_model, "win_rate.reward_model")
    found = compare(asked, own, others, lambda some: judge.reward(some, asked_for.criterion), records)
    digest = manifest.read(folder).hash
    told |= {"reward_model": str(folder), "reward_model_hash": digest}
    if digest in optimised:
        told["no_evidence"] = f"{folder} is the very reward model that the model was optimised for"
    records.figures("win_rate", own, ["" for _ in own])
    return found | told


def compare(
    asked: Sequence[Messages],
    own: Sequence[Completion],
    others: Sequence[Completion],
    reward: Callable[[list[list[dict[str, Any]]]], np.ndarray],
    records: Records,
) -> dict[str, Any]:
    """Which of two answers the reward model scores higher; prompts and scores go to examples/win_rate.jsonl."""
    conversation = lambda messages, said: [*map(dict, messages), {"role": "assistant", "content": said.text}]
    scores = [
        reward([conversation(messages, completion) for messages, completion in zip(asked, said, strict=True)])
        for said in (own, others)
    ]
    won = points(*scores)
    records.write(
        "win_rate",
        (
            {"messages": list(m), "own": a.text, "other": b.text, "own_reward": float(x), "other_reward": float(y)}
            for m, a, b, x, y in zip(asked, own, others, *scores, strict=True)
        ),
    )
    return intervals.share(won) | {"ties": int(np.sum(won == 0.5)), "own_reward": intervals.mean(scores[0].tolist())}


def points(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 for each comparison won, 1/2 for each tie."""
    return (own > others) + 0.5 * (own == others)


def read(config: RatingsConfig) -> list[RankingRecord]:
    """The records. Raises UserError for a bad one."""
    found = []
    for source in config.sources:
        for where, outcome, _ in rankings.read(source):
            if isinstance(outcome, RankingRecord):
                if source.heldout_share and source.split_of(outcome.prompt_id) == "train":
                    continue
                found.append(outcome)
            elif isinstance(outcome, Reason) and outcome.bad:
                raise UserError(f"ratings.sources: {where}: {outcome.name}: {outcome.detail}; mend the record")
    return found


def ratings(
    config: RatingsConfig,
    records: Sequence[RankingRecord],
    unfit: Callable[[Annotation], str] = lambda annotation: "",
) -> dict[str, Any]:
    """The share of pairs that `policy` wins; `unfit` says why an annotation must not count, "" of others.

    Pairs are those of one annotation with a completion of the policy and one of another, both ranked. With one
    opponent, "bradley_terry" is the difference of both strengths, ln(share won / share lost): the maximum of the
    Bradley-Terry likelihood, in nats.
    """
    won: dict[str, list[tuple[float, int]]] = {}
    by_role: dict[str, list[float]] = {}
    raters: dict[str, Counter[str]] = {"annotators": Counter(), "judges": Counter()}
    left_out: dict[str, str] = {}
    for record in records:
        policies = {completion.id: completion.policy for completion in record.completions}
        for annotation in record.annotations:
            pairs = list(_pairs(annotation, policies, config))
            if not pairs:
                continue
            if why := unfit(annotation):
                left_out[annotation.annotator] = why
                continue
            won.setdefault(record.prompt_id, []).append((sum(pairs), len(pairs)))
            by_role.setdefault(annotation.role, []).extend(pairs)
            raters["judges" if annotation.role == "judge" else "annotators"][annotation.annotator] += len(pairs)
    told: dict[str, Any] = {"policy": config.policy, "against": config.against or "all others"}
    told |= {"criterion": config.criterion, "prompts": len(won)} | {kind: dict(names) for kind, names in raters.items()}
    told |= {"left_out": left_out} if left_out else {}
    if not won:
        whose = f"{config.policy!r} and {config.against!r}" if config.against else f"{config.policy!r} and others"
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        seen = {c.policy for r in records for c in r.completions if c.policy} - {config.policy}
        ranked = {name for r in records for a in r.annotations for name in a.rankings}
        there = f"other policies there: {', '.join(sorted(seen)) or 'none'}; criteria: {', '.join(sorted(ranked))}"
        problem = f"no ranking record compares {whose} by {config.criterion!r} ({there})"
        return told | {"no_evidence": reasons or problem}
    above, below = np.array([np.sum(each, axis=0) for each in won.values()], np.float64).T
    figure = intervals.clustered_share(above, below)
    told |= {"pairs": int(below.sum()), "by_role": {role: float(np.mean(each)) for role, each in by_role.items()}}
    if config.against and 0 < figure["value"] < 1:
        told["bradley_terry"] = math.log(figure["value"] / (1 - figure["value"]))
    return figure | told


def _pairs(annotation: Annotation, policies: Mapping[str, str | None], config: RatingsConfig) -> list[float]:
    """A point for each pair that the policy wins, half a one for a tie; none of annotations that do not count."""
    if not annotation.trains or annotation.role not in config.roles:
        return []
    place = {id: tier for tier, ids in enumerate(annotation.rankings.get(config.criterion, ())) for id in ids}
    own = [id for id in place if policies[id] == config.policy]
    rival = lambda id: policies[id] not in (None, config.policy) and config.against in ("", policies[id])
    return [
        1.0 if place[a] < place[b] else 0.5 if place[a] == place[b] else 0.0 for a in own for b in place if rival(b)
    ]
