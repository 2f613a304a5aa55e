"""Batches of preferences: those of rankings (`jaxlm/preference/ranked.py`), and whose tokens are whose.

A prompt's answers lie in one batch, each once, however many pairs they stand in; its pairs weigh 1 in all. Beside the
arrays that are there, a batch has

    loss_mask                                  bool [own rows, S]: an answer's own tokens, its stop token included
    better_tokens, worse_tokens                int32 [R], how many these are
    better_answer, worse_answer                int32 [R], each answer's number among all, in the prompts' order
    better_reference, worse_reference          float32 [R], its log-probability under the reference

and where answers to other prompts are asked for (KTO), in the same places, segments and positions:

    other_ids, other_mask                      int32, bool [own rows, S]: the same prompts, with an answer to another
    better_other, worse_other                  float32 [R], what stands there instead: its log-probability

An answer's place is then as long as the longer of the two; the shorter is filled up with padding that nothing reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.base.errors import UserError
from jaxlm.preference.config import PreferenceConfig
from jaxlm.preference.ranked import Placed, Prompt, RankingBatches
from jaxlm.preference.rewards import placed_batch
from jaxlm.train.state import Program


class Reference(NamedTuple):
    """Log-probabilities of answers under the reference, float32 `[answers]`, nats; NaN for those in no pair."""

    own: np.ndarray
    other: np.ndarray
    """of the answers to other prompts; empty where there are none"""


class Sequences(NamedTuple):
    """What stands in the places of a prompt's answers."""

    ids: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]


class PreferenceBatches(RankingBatches):
    """
    >>> batches = PreferenceBatches(prompts, others=False, rows=16, row_length=1024, pairs=256, seed=0)
    >>> batches.reference = reference_logprobs(...)
    >>> batches.batch(step=1000)["better_reference"].shape
    (256,)
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, others: bool, row_length: int, avoid: Sequence[str] = (), **batch: Any
    ):
        """`prompts` have their answers' targets; `others`: with answers to other prompts, but not those named in
        `avoid`. The rest: `RankingBatches`.

        Raises UserError where all are of one prompt, so that there is no other.
        """
        found = strangers(prompts, row_length, avoid) if others else []
        placed = [fitted(*both) for both in zip(prompts, found, strict=True)] if others else prompts
        super().__init__(placed, row_length=row_length, **batch)
        self.others = [found[number] for number in self.kept] if others else []
        self.first = np.cumsum([0, *(len(prompt.answers) for prompt in self.prompts)])
        self.reference: Reference | None = None

    def arrays(self, batch: list[list[Placed]]) -> dict[str, np.ndarray]:
        made = super().arrays(batch)
        made["loss_mask"] = self._grid(batch, [prompt.targets for prompt in self.prompts], np.bool_)
        sizes = lambda number, answer: int(np.sum(self.prompts[number].targets[answer]))
        made |= self._columns(batch, "tokens", sizes, np.int32)
        answers = lambda number, answer: int(self.first[number]) + answer
        made |= self._columns(batch, "answer", answers, np.int32)
        if self.others:
            made["other_ids"] = self._grid(batch, [each.ids for each in self.others], np.int32)
            made["other_mask"] = self._grid(batch, [each.targets for each in self.others], np.bool_)
        if self.reference is not None:
            for name, values in zip(("reference", "other"), self.reference, strict=True):
                if len(values):
                    looked_up = lambda number, answer, values=values: values[answers(number, answer)]
                    made |= self._columns(batch, name, looked_up, np.float32)
        return made

    def _grid(self, batch: list[list[Placed]], values: Sequence[Sequence[np.ndarray]], kind: Any) -> np.ndarray:
        """`[own rows, S]`: each answer's tokens' values, where it lies."""
        A = self.pieces
        whole = np.zeros((self.shape.rows * A, self.shape.row_length), kind)
        for a, placed in enumerate(batch):
            for number, places in placed:
                for answer, (row, start) in places.items() if self.prompts[number].pairs else ():
                    found = values[number][answer]
                    whole[row * A + a, start : start + len(found)] = found
        return whole[list(self.own)]

    def _columns(
        self, batch: list[list[Placed]], name: str, value: Callable[[int, int], Any], kind: Any
    ) -> dict[str, np.ndarray]:
        """`[R]` for the better and for the worse answers, from (prompt's number, answer); 0 where a pair is padding."""
        A = self.pieces
        made = {f"{side}_{name}": np.zeros(self.shape.pairs * A, kind) for side in ("better", "worse")}
        for a, placed in enumerate(batch):
            for side in ("better", "worse"):
                found = [
                    value(number, getattr(pair, side)) for number, _ in placed for pair in self.prompts[number].pairs
                ]
                made[f"{side}_{name}"][a::A][: len(found)] = found
        return made


def strangers(prompts: Sequence[Prompt], row_length: int, avoid: Sequence[str] = ()) -> list[Sequences]:
    """For every answer: its own prompt, followed by an answer to another one, cut at the row's end.

    The other prompt is the one before it that has pairs, so that it stays the same from epoch to epoch, and the
    reference has to be asked once; all of that one's compared answers come, each as often as the others.
    """
    asked = [number for number, prompt in enumerate(prompts) if prompt.pairs]
    names = {prompts[number].name for number in asked} - {*avoid}
    if len(names) < 2:
        raise UserError(f"sources: kto compares with answers to other prompts, and there are {len(names)} prompts")
    made = [Sequences(prompt.answers, prompt.targets) for prompt in prompts]
    for at, number in enumerate(asked):
        prompt = prompts[number]
        earlier = (prompts[asked[at - back]] for back in range(1, len(asked)))
        before = next(other for other in earlier if other.name not in (prompt.name, *avoid))
        compared = sorted({answer for pair in before.pairs for answer in (pair.better, pair.worse)})
        given = [compared[k % len(compared)] for k in range(len(prompt.answers))]
        both = [
            _joined(prompt, answer, before.answers[other], before.targets[other], row_length)
            for answer, other in enumerate(given)
        ]
        made[number] = Sequences(*zip(*both, strict=True))
    return made


def _joined(
    prompt: Prompt, answer: int, ids: np.ndarray, targets: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, targets) of the conversation up to the prompt's `answer`, then what is a target, and all behind it."""
    begin, other = int(np.argmax(prompt.targets[answer])), int(np.argmax(targets))
    joined = np.concatenate([prompt.answers[answer][:begin], ids[other:]])
    own = np.concatenate([np.zeros(begin, np.bool_), targets[other:]])
    return joined[:row_length], own[:row_length]


def fitted(prompt: Prompt, other: Sequences) -> Prompt:
    """The prompt, each of its answers as long as the longer of it and of what stands there instead."""
    longest = [max(len(a), len(b)) for a, b in zip(prompt.answers, other.ids, strict=True)]
    padded = lambda values: [np.pad(x, (0, n - len(x))) for x, n in zip(values, longest, strict=True)]
    return prompt._replace(answers=padded(prompt.answers), targets=padded(prompt.targets))


def preference_batches(
    config: PreferenceConfig, prompts: Sequence[Prompt], mesh: Mesh, pieces: int
) -> PreferenceBatches:
    """Of whole global batches in `pieces`; 0: of batches as large as a piece, to measure."""
    rows, pairs = config.batch_rows, config.batch_pairs
    if not pieces:
        rows, pairs = rows // config.accumulate, pairs // config.accumulate
    return PreferenceBatches(
        prompts,
        others=config.kto is not None,
        avoid=config.exclude,
        rows=rows,
        row_length=config.row_length,
        pairs=pairs,
        seed=config.seed,
        pieces=pieces or 1,
        own=sharding.own_rows(mesh, rows),
        exclude=config.exclude if pieces else (),
    )


def placed(program: Program, batch: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
    """What of a batch the program takes, on its mesh."""
    return placed_batch(program.mesh, {name: batch[name] for name in program.abstract_batch if name != "base"}, rows)
