"""Batches of ranked answers: whole prompts, their answers packed side by side, one forward for each answer.

    row 0   prompt 5, answer a | prompt 5, answer c      | padding
    row 1   prompt 5, answer b | prompt 2, answer a | prompt 2, answer b

An answer is its whole conversation and a segment of its own, which attention does not leave; its reward is read at its
last token. All answers of a prompt lie in one piece of a batch, where its pairs point at them by row * S + position. A
batch is a function of the step: each epoch has its order, by seed and epoch, in which prompts are placed, each answer
into the first row with room, until a prompt does not fit. `Prompt`s are plain values: stages make them of records.
"""

import bisect
import functools
import math
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import grain
import numpy as np
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.base.errors import ConfigError, UserError, nearest
from jaxlm.data import rows
from jaxlm.data.prefetch import prefetched
from jaxlm.data.rows import Piece
from jaxlm.reward.config import RewardConfig


class Pair(NamedTuple):
    """One answer ranked above another of the same prompt."""

    better: int
    """The answer's place among the prompt's answers."""
    worse: int
    criterion: int
    """Which of the model's scores the pair is about."""
    weight: float
    """Share of the prompt's loss; 1 in all over a prompt's pairs on a criterion (`losses.pair_weights`)."""
    distance: int = 1
    """How many tiers apart."""
    margin: float = 0.0
    """By how much the better answer should score higher."""
    annotator: int = 0
    """Whose ranking it is, as the caller numbers them."""
    kind: int = 0
    """What made the worse answer, as the caller numbers them."""


class Prompt(NamedTuple):
    """A prompt's answers; those that stand in no pair are left out of batches."""

    name: str
    answers: Sequence[np.ndarray]
    """Token ids of the conversation up to the end of each answer."""
    pairs: Sequence[Pair]
    prefix: int = 0
    """How many of the ids are the prompt's: an answer's length is counted without them."""
    targets: Sequence[np.ndarray] = ()
    """bool, a token each, of every answer: which are its own. Rewards are read without them."""


class Place(NamedTuple):
    row: int
    start: int


class Shape(NamedTuple):
    """What every piece of a batch has."""

    rows: int
    row_length: int
    pairs: int


Placed = tuple[int, dict[int, Place]]
"""A prompt, by number, with the places of its answers in the order of placing."""


class RankingBatches:
    """
    >>> batches = RankingBatches(prompts, rows=16, row_length=1024, pairs=512, seed=0)
    >>> batches.batch(step=1000)["ids"].shape
    (16, 1024)
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        rows: int,
        row_length: int,
        pairs: int,
        seed: int,
        pieces: int = 1,
        own: Sequence[int] | None = None,
        prefetch: int = 2,
        exclude: Collection[str] = (),
    ):
        """A batch has `rows` rows of `row_length` tokens and room for `pairs` pairs.

        It can be worked off in `pieces` A, of which piece a has the rows and pairs a, a + A, …, as
        `train/update.gradients_in_pieces` takes them; pairs point into their own piece. `own`: which rows of a batch
        to make; None: all. `prefetch` counts batches. `exclude`: names of prompts that are padding in their place.

        Prompts that cannot train are left out; `dropped` has their names by reason. Raises UserError when none is
        left, and ValueError for prompts that are none.
        """
        sizes = {"accumulate": pieces, "batch_rows": rows, "batch_pairs": pairs, "row_length": row_length}
        for field, size in sizes.items():
            if size < 1:
                raise ConfigError(field, f"got {size}; at least 1 is needed")
            if field.startswith("batch") and size % pieces:
                raise ConfigError(field, f"{size} do not divide into {pieces} pieces (accumulate)")
        self.shape, self.pieces = Shape(rows // pieces, row_length, pairs // pieces), pieces
        self.own = range(rows) if own is None else own
        self.dropped: dict[str, list[str]] = {}
        self.kept: list[int] = []
        """The numbers of those that are left among all that were given."""
        for number, prompt in enumerate(prompts):
            reason = unusable(prompt, self.shape)
            if reason:
                self.dropped.setdefault(reason, []).append(prompt.name)
            else:
                self.kept.append(number)
        self.planned = [prompts[number] for number in self.kept]
        """What batches are planned with: all else stays where it is when a prompt is excluded."""
        self.prompts = [p._replace(pairs=()) if p.name in exclude else p for p in self.planned]
        """What they are filled with: an excluded one has no pairs."""
        if unknown := {*exclude} - {prompt.name for prompt in prompts}:
            name = min(unknown)
            raise ConfigError("exclude", f"no prompt is named {name!r}{nearest(name, [p.name for p in prompts[:999]])}")
        if not any(prompt.pairs for prompt in self.prompts):
            counts = ", ".join(f"{len(names)} {reason}" for reason, names in self.dropped.items())
            room = f"row_length is {row_length}, batch_pairs {pairs}"
            raise UserError(f"sources: no prompt is left with answers to compare: {counts or 'there is none'} ({room})")
        self.seed, self.prefetch = seed, prefetch
        self._plan = functools.lru_cache(maxsize=2)(self._epoch)
        self._ends: list[int] = []
        self._lock = threading.Lock()

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of `fill`."""
        epoch, number = self.locate(step)
        return self.arrays(self._plan(epoch)[number])

    def described(self, step: int, history: Any = ()) -> list[dict[str, str]]:
        """The prompts of a step's batch."""
        epoch, number = self.locate(step)
        placed = [prompt for piece in self._plan(epoch)[number] for prompt, _ in piece]
        return [{"prompt": self.prompts[prompt].name} for prompt in placed if self.prompts[prompt].pairs]

    def packing(self) -> dict[str, Any]:
        """What the first epoch's batches hold, and how full they are."""
        kept = [prompt for prompt in self.prompts if prompt.pairs]
        tokens = sum(len(prompt.answers[answer]) for prompt in kept for answer in _paired(prompt))
        steps = self.first_step(1)
        room = steps * self.pieces * self.shape.rows * self.shape.row_length
        counts = {"prompts": len(kept), "pairs": sum(len(prompt.pairs) for prompt in kept), "batches": steps}
        left_out = {"left_out": {reason: len(names) for reason, names in self.dropped.items()}} if self.dropped else {}
        return counts | {"tokens": tokens, "padding_share": 1 - tokens / room} | left_out

    def batches(self, start_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, batch) from `start_step` on, without end, made ahead in a thread."""
        return prefetched(self.batch, start_step, self.prefetch)

    def heldout(self, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """All prompts once, in order; what the last batch has too much is padding. `limit` bounds the batches."""
        for batch in self._planned(range(len(self.prompts)))[:limit]:
            yield self.arrays(batch)

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with: as many as the epochs before it have. Plans them when asked first."""
        with self._lock:
            while len(self._ends) < epoch:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + len(self._plan(len(self._ends))))
            return self._ends[epoch - 1] if epoch else 0

    def epoch_steps(self, epoch: int) -> int:
        """How many batches an epoch has; another order packs otherwise."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, the batch's number in it)."""
        while self.first_step(len(self._ends)) <= step:
            self.first_step(len(self._ends) + 1)
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - self.first_step(epoch)

    def _epoch(self, epoch: int) -> list[list[list[Placed]]]:
        seed = zlib.crc32(f"rankings/{self.seed}/{epoch}".encode())
        order = cast(Sequence[int], grain.MapDataset.range(len(self.planned)).shuffle(seed=seed))
        return self._planned(order[i] for i in range(len(order)))

    def _planned(self, order: Iterable[int]) -> list[list[list[Placed]]]:
        """Batches of pieces of prompts; the last one may lack pieces."""
        made = plan(self.planned, order, self.shape)
        return [made[first : first + self.pieces] for first in range(0, len(made), self.pieces)]

    def arrays(self, batch: list[list[Placed]]) -> dict[str, np.ndarray]:
        """What a planned batch is filled with; kinds of batches that hold more add to it."""
        return fill(self.prompts, batch + [[]] * (self.pieces - len(batch)), self.shape, self.own)


def unusable(prompt: Prompt, shape: Shape) -> str:
    """Why a prompt cannot train in batches of this shape; empty where it can. Raises ValueError for what is no prompt.

    A prompt is left out whole: losing long answers alone would leave the model with judgements of short ones.
    """
    _check(prompt)
    if not prompt.pairs:
        return "no_untied_pair"
    if any(len(prompt.answers[answer]) > shape.row_length for answer in _paired(prompt)):
        return "answer_longer_than_a_row"
    if len(prompt.pairs) > shape.pairs:
        return "more_pairs_than_a_piece"
    empty = np.zeros(shape.rows, int)
    return "" if place(prompt, empty, shape.row_length) else "answers_longer_than_a_piece"


def _check(prompt: Prompt) -> None:
    sums: dict[int, float] = {}
    for pair in prompt.pairs:
        low, high = sorted((pair.better, pair.worse))
        if not 0 <= low < high < len(prompt.answers) or pair.criterion < 0:
            raise ValueError(f"prompt {prompt.name}: {pair} is no pair of {len(prompt.answers)} answers")
        if not (0 < pair.weight < math.inf and math.isfinite(pair.margin)):
            raise ValueError(f"prompt {prompt.name}: {pair} needs a weight above 0 and a margin, both finite")
        sums[pair.criterion] = sums.get(pair.criterion, 0.0) + pair.weight
    for criterion, total in sums.items():
        if abs(total - 1) > 1e-6:
            raise ValueError(f"prompt {prompt.name}: pairs on criterion {criterion} weigh {total}; 1 in all is needed")
    for answer in _paired(prompt):
        size = len(prompt.answers[answer])
        if not 0 <= prompt.prefix < size:
            raise ValueError(f"prompt {prompt.name}: answer {answer} has {size} tokens, {prompt.prefix} of the prompt")


def _paired(prompt: Prompt) -> list[int]:
    """The answers that stand in a pair, the longest first, as they pack best."""
    answers = {pair.better for pair in prompt.pairs} | {pair.worse for pair in prompt.pairs}
    return sorted(answers, key=lambda answer: (-len(prompt.answers[answer]), answer))


def place(prompt: Prompt, used: np.ndarray, row_length: int) -> dict[int, Place] | None:
    """Each answer's place, in the first row that has room behind the tokens `used` in it, which grow.

    None when one has no room; `used` is then as it was.
    """
    after, places = used.copy(), {}
    for answer in _paired(prompt):
        size = len(prompt.answers[answer])
        fits = after + size <= row_length
        row = int(np.argmax(fits))
        if not fits[row]:
            return None
        places[answer] = Place(row, int(after[row]))
        after[row] += size
    used[:] = after
    return places


def plan(prompts: Sequence[Prompt], order: Iterable[int], shape: Shape) -> list[list[Placed]]:
    """The prompts in this order, each in one piece: a piece ends before the first prompt that it has no room for."""
    pieces: list[list[Placed]] = []
    used, pairs_left = np.zeros(shape.rows, int), 0
    for number in order:
        prompt = prompts[number]
        places = place(prompt, used, shape.row_length) if len(prompt.pairs) <= pairs_left else None
        if places is None:
            pieces.append([])
            used, pairs_left = np.zeros(shape.rows, int), shape.pairs
            places = place(prompt, used, shape.row_length)
            assert places is not None, "prompts that fit into no piece are left out before"
        pieces[-1].append((number, places))
        pairs_left -= len(prompt.pairs)
    return pieces


PAIR_ARRAYS = {
    "better": np.int32,
    "worse": np.int32,
    "criterion": np.int32,
    "weight": np.float32,
    "margin": np.float32,
    "distance": np.int32,
    "ranked": np.int32,
    "annotator": np.int32,
    "kind": np.int32,
    "better_tokens": np.int32,
    "worse_tokens": np.int32,
}


def fill(
    prompts: Sequence[Prompt], pieces: Sequence[Sequence[Placed]], shape: Shape, own: Sequence[int]
) -> dict[str, np.ndarray]:
    """A batch of B rows, S tokens and R pairs, those of piece a of A at a, a + A, …:

    ids, segment_ids, positions    int32 [own rows, S], as in `data/rows.py`
    better, worse                  int32 [R], row * S + position of each answer's last token, in the pair's piece
    criterion, weight, margin      int32, float32, float32 [R]; pairs of weight 0 are padding, 0 in all arrays
    distance, annotator, kind      int32 [R], as in `Pair`
    ranked                         int32 [R], how many of the prompt's answers are compared on this criterion: K
    better_tokens, worse_tokens    int32 [R], length of each answer, without the prompt
    prompts                        float32 [], how many there are, each with signal
    """
    A, signal = len(pieces), 0
    contents: list[list[Piece]] = [[] for _ in range(shape.rows * A)]
    batch = {name: np.zeros(shape.pairs * A, kind) for name, kind in PAIR_ARRAYS.items()}
    for a, placed in enumerate(pieces):
        pairs: list[tuple[float, ...]] = []
        for number, places in placed:
            for answer, (row, _) in places.items():
                contents[row * A + a].append(Piece(prompts[number].answers[answer], number))
            signal += bool(prompts[number].pairs)
            pairs += _pair_values(prompts[number], places, shape.row_length)
        for array, column in zip(batch.values(), zip(*pairs, strict=True), strict=bool(pairs)):
            array[a::A][: len(pairs)] = column
    out = [[not prompts[piece.document].pairs for piece in row] for row in contents]
    made = [rows.expand(contents[row], shape.row_length, pad_id=0, excluded=out[row]) for row in own]
    batch |= {name: np.stack([row[name] for row in made]) for name in ("ids", "segment_ids", "positions")}
    return batch | {"prompts": np.array(signal, np.float32)}


def _pair_values(prompt: Prompt, places: dict[int, Place], row_length: int) -> Iterator[tuple[float, ...]]:
    """Of each pair what `PAIR_ARRAYS` names, in its order."""
    sizes = {answer: len(prompt.answers[answer]) for answer in places}
    last = {answer: at.row * row_length + at.start + sizes[answer] - 1 for answer, at in places.items()}
    compared: dict[int, set[int]] = {}
    for pair in prompt.pairs:
        compared.setdefault(pair.criterion, set()).update((pair.better, pair.worse))
    for pair in prompt.pairs:
        better, worse, criterion, weight, distance, margin, annotator, kind = pair
        ranked, tokens = len(compared[criterion]), (sizes[better] - prompt.prefix, sizes[worse] - prompt.prefix)
        yield last[better], last[worse], criterion, weight, margin, distance, ranked, annotator, kind, *tokens


def ranking_batches(config: RewardConfig, prompts: Sequence[Prompt], mesh: Mesh, pieces: int) -> RankingBatches:
    """Of whole global batches in `pieces`; 0: of batches as large as a piece, to measure."""
    rows, pairs = config.batch_rows, config.batch_pairs
    if not pieces:
        rows, pairs = rows // config.accumulate, pairs // config.accumulate
    own = sharding.own_rows(mesh, rows)
    return RankingBatches(
        prompts,
        rows=rows,
        row_length=config.row_length,
        pairs=pairs,
        seed=config.seed,
        pieces=pieces or 1,
        own=own,
        exclude=config.exclude if pieces else (),
    )
