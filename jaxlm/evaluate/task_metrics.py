"""What a model makes of a task: multiple choice by likelihood, answers by a verifier, bits per byte of the target.

    {"metric": "multiple_choice", "n": 40, "accuracy": {"value", "interval", "n"}, "accuracy_raw": {...}, "chance": .33}
    {"metric": "number", "n": 40, "score": {...}, "ended": {...}, "answer_tokens", "repetition", "toxic"}
    {"metric": "bits_per_byte", "n": 40, "bits_per_byte": {...}}

with "by_language" where a task has several. Multiple choice is measured twice: by the choice's log-probability
(`accuracy_raw`), which favours short choices, and by that over its UTF-8 bytes (`accuracy`: the headline).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxlm.base import config as configs
from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger
from jaxlm.data.rows import Piece
from jaxlm.evaluate import intervals
from jaxlm.evaluate.intervals import Figure
from jaxlm.evaluate.subject import Records, Subject
from jaxlm.evaluate.tasks import Example, Task
from jaxlm.feedback.config import VerifierConfig
from jaxlm.feedback.verifiers import Verifier
from jaxlm.feedback.verifying import verifier_for
from jaxlm.sample.config import SamplingConfig

# Log-probabilities that differ by less, relatively, are tied: float32 and the place in a row decide no more.
TIED = 1e-5


def measure(task: Task, subject: Subject, sampling: SamplingConfig, records: Records) -> dict[str, Any]:
    """A task's figures; its examples go to examples/task-NAME.jsonl.

    "cut": how many of its texts (each choice is one) were longer than a row, and lost the beginning of their prompt.
    """
    subject.cut.clear()
    try:
        if task.config.metric == "multiple_choice":
            found = multiple_choice(task, subject, records)
        elif task.config.metric == "bits_per_byte":
            found = bits_per_byte(task, subject, records)
        else:
            found = verified(task, subject, sampling, records)
    except UserError as error:
        raise UserError(f"{task.path}: {error}") from None
    if subject.cut:
        found["cut"] = len(subject.cut)
        logger.warning(
            "%s: %d texts are longer than %d tokens, and their prompts lost their beginning; raise row_length",
            task.name,
            found["cut"],
            subject.row_length,
        )
    return {"n": len(task.examples), **found}


def asks_chat(task: Task, subject: Subject) -> bool:
    return task.config.chat and subject.template is not None


def prompt_of(task: Task, subject: Subject, example: Example) -> str:
    """The prompt as the per-example records show it."""
    return task.render(example, asks_chat(task, subject))


def _piece(task: Task, subject: Subject, example: Example, text: str, number: int) -> Piece:
    if asks_chat(task, subject):
        return subject.answer(task.messages(example), text, number)
    return subject.continuation(task.text(example), task.config.separator + text, number)


def multiple_choice(task: Task, subject: Subject, records: Records) -> dict[str, Any]:
    """The likelihood of each choice given the prompt."""
    offered = [task.choices(example) for example in task.examples]

    def pieces() -> Iterator[Piece]:
        number = 0
        for example, (choices, _) in zip(task.examples, offered, strict=True):
            for text in choices:
                yield _piece(task, subject, example, text, number)
                number += 1

    sums = subject.sums(pieces())
    raw, normal, lines, number = [], [], [], 0
    for example, (choices, right) in zip(task.examples, offered, strict=True):
        logprobs = np.array([-sums[number + k].nats for k in range(len(choices))])
        number += len(choices)
        by_byte = logprobs / [len(text.encode()) for text in choices]
        raw.append(credit(logprobs, right))
        normal.append(credit(by_byte, right))
        shown = {"prompt": prompt_of(task, subject, example), "choices": choices, "target": right}
        scores = {"logprobs": logprobs.tolist(), "per_byte": by_byte.tolist(), "correct": normal[-1]}
        lines.append({"where": example.where} | shown | scores)
    records.write(f"task-{task.name}", lines)
    return {
        "metric": "multiple_choice",
        "accuracy": intervals.share(normal),
        "accuracy_raw": intervals.share(raw),
        "chance": float(np.mean([1 / len(choices) for choices, _ in offered])),
    } | _languages(normal, task.examples)


def credit(scores: np.ndarray, right: int) -> float:
    """1 where the right one has the highest score; where k share it, 1/k.

    >>> credit(np.array([-1.0, -2.0, -1.0]), 0)
    0.5
    """
    best = scores >= scores.max() - TIED * abs(scores.max())
    return float(best[right] / best.sum())


def bits_per_byte(task: Task, subject: Subject, records: Records) -> dict[str, Any]:
    """Bits a byte of the right answers' text, given their prompts."""
    targets = [str(task.target(example)) for example in task.examples]
    items = enumerate(zip(task.examples, targets, strict=True))
    sums = subject.sums(_piece(task, subject, example, text, number) for number, (example, text) in items)
    bits = np.array([sums[number].nats for number in range(len(targets))]) / math.log(2)
    sizes = np.array([len(text.encode()) for text in targets], np.float64)
    if not sizes.all():
        raise UserError(f"{task.examples[int(np.argmin(sizes))].where}: {task.config.target_field} is empty")
    records.write(
        f"task-{task.name}",
        (
            {"where": e.where, "prompt": prompt_of(task, subject, e), "target": text, "bits": float(b)}
            for e, text, b in zip(task.examples, targets, bits, strict=True)
        ),
    )
    return {"metric": "bits_per_byte", "bits_per_byte": intervals.ratio(bits, sizes) | {"n": len(sizes)}}


def verified(task: Task, subject: Subject, sampling: SamplingConfig, records: Records) -> dict[str, Any]:
    """What a verifier says of the model's own answers."""
    given = task.config.metric
    if isinstance(given, str):
        given = configs.from_dict(VerifierConfig, {"kind": given, "target_field": task.config.target_field})
    judges: list[Verifier] = [verifier_for(given, example.record, example.where) for example in task.examples]
    chat = asks_chat(task, subject)
    prompts = [
        subject.chat().prompt(task.messages(example)) if chat else subject.encode(task.text(example))
        for example in task.examples
    ]
    said = subject.generate(
        prompts, dataclasses.replace(sampling, max_tokens=task.config.max_tokens, stop=task.config.stop)
    )
    shown = [prompt_of(task, subject, example) for example in task.examples]
    answers = [completion.text if chat else completion.text.strip() for completion in said]
    verdicts = [judge(prompt, answer) for judge, prompt, answer in zip(judges, shown, answers, strict=True)]
    scores = [verdict.score for verdict in verdicts]
    records.write(
        f"task-{task.name}",
        (
            {"where": e.where, "prompt": p, "answer": a, "stop_reason": c.stop_reason, **v._asdict()}
            for e, p, a, c, v in zip(task.examples, shown, answers, said, verdicts, strict=True)
        ),
    )
    languages = [example.language for example in task.examples]
    answered = records.figures(f"task-{task.name}", said, languages)
    return {"metric": given.kind, "score": intervals.share(scores)} | _languages(scores, task.examples) | answered


def _languages(scores: Sequence[float], examples: Sequence[Example]) -> dict[str, dict[str, Figure]]:
    found = intervals.by_group(scores, [example.language for example in examples])
    return {"by_language": found} if found else {}
