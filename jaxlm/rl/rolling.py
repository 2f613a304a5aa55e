"""Rolling out: the policy answers prompts, programs score the answers, the log keeps some of them."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.base.logging import logger
from jaxlm.base.metrics import Mean
from jaxlm.model.weights import Params
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import RLConfig
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rewards import Judge
from jaxlm.rl.rollout import Rollout
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.decoding import prepare
from jaxlm.sample.sampler import Completion, Sampler
from jaxlm.train.metrics_writer import cut_back
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first


class Roller:
    """Answers prompts and scores the answers, as far as programs do."""

    def __init__(self, config: RLConfig, sampler: Sampler, judge: Judge, gold: Judge | None, row_length: int):
        """`row_length`: the S of its rollouts."""
        self.config, self.sampler, self.judge, self.gold, self.row_length = config, sampler, judge, gold, row_length

    def roll(
        self, params: Params, prompts: Sequence[Prompt], step: int, *, samples: int, seed: int, rows: int
    ) -> tuple[Rollout, list[Completion], dict[str, Mean]]:
        """(host arrays of `rows` rows, completions, measurements). `params`: the learner's, on its mesh.

        An answer's random bits depend on (seed, step, prompt, sample) only.
        """
        config = self.config
        began = time.monotonic()
        sampling = SamplingConfig(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            samples=samples,
            seed=seed,
            batch_rows=config.sample_rows or max(rows, 1),
        )
        completions = self.sampler.generate(
            prepare(self.sampler.source_config, params),
            [prompt.ids for prompt in prompts],
            sampling,
            step=step,
            prompt_ids=names([prompt.number for prompt in prompts], self.judge.prompts),
        )
        drawn = time.monotonic()
        # One process scores: a function that is not sure of its scores would give each process another rollout.
        judge, gold = self.judge, self.gold
        scores = from_first(lambda: judge.scores(prompts, completions))
        measured = {"rl/repetition": mean([repetition(completion.ids) for completion in completions])}
        if gold is not None:
            measured["rl/gold"] = mean(from_first(lambda: gold.scores(prompts, completions)))
        measured["rl/rollout_seconds"] = mean([drawn - began])
        measured["rl/reward_seconds"] = mean([time.monotonic() - drawn])
        made = rollouts.gather(prompts, completions, scores, S=self.row_length, T=config.max_tokens, rows=rows)
        return made, completions, measured


def sampler_of(config: RLConfig, policy: ModelDirectory) -> Sampler:
    """What draws the policy's answers.

    Nothing but the chat template's own stop tokens ends them: a reward model has seen no other end.
    """
    template = policy.chat_template()
    ends = template.stop_ids if template else ()
    return Sampler(policy.config, policy.tokenizer(), ends=ends, prompt_room=config.max_prompt_tokens)


def names(numbers: Sequence[int], prompts: int) -> list[int]:
    """What names the random numbers of each prompt: its number among all `prompts`, and another one where a rollout
    asks it once more (as at an epoch's end), or its answers would be the same again.

    >>> names([7, 2, 7], 10)
    [7, 2, 17]
    """
    before = Counter[int]()
    made = []
    for number in numbers:
        made.append(number + prompts * before[number])
        before[number] += 1
    return made


def mean(values: Sequence[float]) -> Mean:
    """Of numbers on the host."""
    total: Any = np.float32(sum(values)), np.float32(len(values))
    return Mean(*total)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of an answer's n-grams that stood in it before.

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = Counter(tuple(ids[at : at + n]) for at in range(len(ids) - n + 1))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


class CompletionLog:
    """WORKDIR/completions.jsonl: some answers of each rollout, with their scores; process 0 writes."""

    def __init__(self, workdir: str, shown: int):
        self.path, self.shown = Path(workdir) / "completions.jsonl", shown

    def cut(self, step: int) -> None:
        """Takes out what a run wrote past the step from which it goes on."""
        if jax.process_index() == 0:
            cut_back(self.path, step)

    def write(
        self,
        step: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        scores: np.ndarray,
        drift: np.ndarray,
    ) -> None:
        if jax.process_index() != 0 or not self.shown:
            return
        samples = len(completions) // len(prompts)
        # One answer each to the first prompts, then further ones.
        order = sorted(range(len(completions)), key=lambda index: (index % samples, index))
        lines = []
        for index in order[: self.shown]:
            completion = completions[index]
            record = {
                "step": step,
                "prompt": prompts[index // samples].text,
                "answer": completion.text,
                "reward": _number(scores[index]),
                "kl": _number(drift[index]),
                "tokens": len(completion.ids),
                "stop_reason": completion.stop_reason,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            with open(self.path, "ab") as file:
                file.write("".join(lines).encode())
        except OSError as error:
            logger.warning("the completions of step %d could not be written: %s", step, error.strerror or error)


def _number(value: Any) -> float | None:
    """As JSON has it: no NaN."""
    return round(float(value), 5) if math.isfinite(value) else None
