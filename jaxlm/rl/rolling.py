"""Rolling out: the policy answers prompts, programs score the answers, the log keeps some of them."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.base.logging import logger
from jaxlm.base.metrics import Mean
from jaxlm.model.config import adapted
from jaxlm.model.weights import Params
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import RLConfig
from jaxlm.rl.learner import Examples, RLState, Updated, order_of_answers, rows_of_updates
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rewards import Judge
from jaxlm.rl.rollout import Rollout
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.decoding import prepare
from jaxlm.sample.repetition import repetition
from jaxlm.sample.sampler import Completion, Sampler
from jaxlm.train.loop import compiled_step
from jaxlm.train.metrics_writer import cut_back
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first
from jaxlm.train.state import Program


class Answered(NamedTuple):
    """Prompts with the policy's answers and their scores: as many answers for each prompt as there are."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: list[float]

    @property
    def samples(self) -> int:
        return len(self.completions) // len(self.prompts)

    def alike(self, group: int) -> bool:
        """Whether all answers of a prompt got the same score."""
        return len({*self.scores[group * self.samples : (group + 1) * self.samples]}) == 1

    def put(self, group: int, other: "Answered", source: int) -> None:
        """The other's prompt `source`, with all its answers, in place of the one of `group`."""
        K = self.samples
        self.prompts[group] = other.prompts[source]
        self.completions[group * K : (group + 1) * K] = other.completions[source * K : (source + 1) * K]
        self.scores[group * K : (group + 1) * K] = other.scores[source * K : (source + 1) * K]


class Roller:
    """Answers prompts and scores the answers, as far as programs do."""

    def __init__(
        self,
        config: RLConfig,
        sampler: Sampler,
        judge: Judge,
        gold: Judge | None,
        row_length: int,
        whole: Callable[[Params], Params] = lambda params: params,
    ):
        """`row_length`: the S of its rollouts. `whole`: what the policy learns → all that it is."""
        self.whole = whole
        self.config, self.sampler, self.judge, self.gold, self.row_length = config, sampler, judge, gold, row_length

    def roll(
        self, params: Params, prompts: Sequence[Prompt], step: int, *, samples: int, seed: int, rows: int
    ) -> tuple[Rollout, list[Completion], dict[str, Mean]]:
        """(host arrays of `rows` rows, completions, measurements). `params`: the learner's, on its mesh.

        An answer's random bits depend on (seed, step, prompt, sample) only.
        """
        answered, seconds = self._answer(self._prepared(params), prompts, step, samples, seed, rows)
        return self._gathered(answered, rows), answered.completions, self._measured(answered, seconds)

    def roll_mixed(
        self, params: Params, prompts: Sequence[Prompt], fresh: Sequence[Prompt], step: int
    ) -> tuple[Rollout, list[Prompt], list[Completion], dict[str, Mean]]:
        """(a training rollout, its prompts, completions, measurements), with dynamic sampling where there are `fresh`
        prompts (DAPO, arXiv:2503.14476, section 3.2).

        A prompt whose answers all have one score teaches nothing; its place goes to the next fresh prompt whose answers
        differ. Fresh ones are asked, as many at a time as there are places, until all are filled or none is left.
        """
        config = self.config
        rows = config.prompts * config.samples
        prepared = self._prepared(params)
        answer = lambda some: self._answer(prepared, some, step, config.samples, config.seed, rows)
        answered, seconds = answer(prompts)
        first = mean(answered.scores)
        places = [group for group in range(len(prompts)) if answered.alike(group)]
        asked = replaced = 0
        while fresh and len(places) > replaced and asked < len(fresh):
            more, further = answer(fresh[asked : asked + len(places) - replaced])
            asked += len(more.prompts)
            seconds = seconds[0] + further[0], seconds[1] + further[1]
            for source in range(len(more.prompts)):
                if not more.alike(source):
                    answered.put(places[replaced], more, source)
                    replaced += 1
        measured = self._measured(answered, seconds)
        if config.grpo is not None and config.grpo.extra_prompts:
            counts = {"rl/extra_prompts": [asked], "rl/replaced_prompts": [replaced]}
            measured |= {"rl/first_reward": first} | {name: mean(count) for name, count in counts.items()}
        return self._gathered(answered, rows), answered.prompts, answered.completions, measured

    def _prepared(self, params: Params) -> Params:
        return prepare(self.sampler.source_config, self.whole(params))

    def _answer(
        self, prepared: Params, prompts: Sequence[Prompt], step: int, samples: int, seed: int, rows: int
    ) -> tuple[Answered, tuple[float, float]]:
        """(answers with scores, seconds of drawing and of scoring)."""
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
            prepared,
            [prompt.ids for prompt in prompts],
            sampling,
            step=step,
            prompt_ids=names([prompt.number for prompt in prompts], self.judge.prompts),
        )
        drawn = time.monotonic()
        # One process scores: a function that is not sure of its scores would give each process another rollout.
        scores = from_first(lambda: self.judge.scores(prompts, completions))
        return Answered([*prompts], completions, scores), (drawn - began, time.monotonic() - drawn)

    def _measured(self, answered: Answered, seconds: tuple[float, float]) -> dict[str, Mean]:
        measured = {"rl/repetition": mean([repetition(completion.ids) for completion in answered.completions])}
        began, gold = time.monotonic(), self.gold
        if gold is not None:
            measured["rl/gold"] = mean(from_first(lambda: gold.scores(answered.prompts, answered.completions)))
        measured["rl/rollout_seconds"] = mean([seconds[0]])
        measured["rl/reward_seconds"] = mean([seconds[1] + time.monotonic() - began])
        return measured

    def _gathered(self, answered: Answered, rows: int) -> Rollout:
        return rollouts.gather(*answered, S=self.row_length, T=self.config.max_tokens, rows=rows)


def sampler_of(config: RLConfig, policy: ModelDirectory) -> Sampler:
    """What draws the policy's answers.

    Nothing but the chat template's own stop tokens ends them: a reward model has seen no other end.
    """
    template = policy.chat_template()
    ends = template.stop_ids if template else ()
    shape = adapted(policy.config, config.lora) if config.lora else policy.config
    return Sampler(shape, policy.tokenizer(), ends=ends, prompt_room=config.max_prompt_tokens)


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


def mean(values: Sequence[int | float]) -> Mean:
    """Of numbers on the host."""
    total: Any = np.float32(sum(values)), np.float32(len(values))
    return Mean(*total)


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


class Iteration:
    """What the loop calls a step: draws answers, scores them, learns from them."""

    def __init__(
        self,
        config: RLConfig,
        program: Program,
        roller: Roller,
        frozen: dict[str, Params],
        box: tuple[Any, Program] | None = None,
    ):
        """`box`: a `replay.blackbox.BlackBox`, which keeps bad updates whole, and the program of one."""
        self.config, self.program, self.roller, self.frozen, self.box = config, program, roller, frozen, box
        self.log = CompletionLog(config.workdir, config.shown_completions)
        self.learn = compiled_step(program)

    def __call__(self, state: RLState, batch: dict[str, Any]) -> tuple[RLState, dict[str, Mean]]:
        config = self.config
        made, asked, completions, measured = self.roller.roll_mixed(
            state.policy.params, batch["prompts"], batch["fresh"], batch["step"]
        )
        began = time.monotonic()
        given = batch["rows"] | {
            "frozen": self.frozen,
            "rollout": rollouts.place(made, self.program.abstract_batch["rollout"]),
        }
        first = int(state.policy.step)
        state, learned, each = self.learn(state, given)
        if self.box and 0 < int(state.policy.skipped) <= self.config.loop.black_boxes and int(state.policy.halt) > 0:
            state = self._keep(state, each.examples, given, first, asked)
        scores, drift = jax.device_get(each[:2])
        measured["rl/learning_seconds"] = mean([time.monotonic() - began])
        step = batch["step"] + 1
        if step % config.loop.log_every_steps == 0 or step == config.steps:
            self.log.write(step, asked, completions, scores, drift)
        return state, measured | learned

    def _keep(
        self, state: RLState, examples: Examples, batch: dict[str, Any], first: int, asked: Sequence[Prompt]
    ) -> RLState:
        """Keeps the bad update at which policy and value function stand still; `first`: the rollout's first update."""
        assert self.box is not None
        box, program = self.box
        number = int(state.policy.step) - 1 - first
        answers = np.asarray(order_of_answers(self.config, state.step - 1, examples)[number])
        batch = {
            "examples": jax.tree.map(lambda x: x[answers], examples),
            "rows": jax.tree.map(lambda x: x[number], rows_of_updates(self.config, batch.get("pretraining", {}))),
            "frozen": batch["frozen"],
        }
        where = [(asked[answer // self.config.samples], answer % self.config.samples) for answer in answers.tolist()]
        told = [{"prompt": str(prompt.number), "of": prompt.where, "answer": answer} for prompt, answer in where]
        batch = jax.device_put(batch, program.shardings.batch)
        kept = box.keep(Updated(state.policy, state.value), program.step, batch, told)
        return state._replace(policy=kept.policy, value=kept.value)
