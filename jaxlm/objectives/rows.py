"""What an objective makes of packed rows, on the host: a function of the seed, the step and a row's number alone.

    change = change_of(config.objective, tokenizer, config.seed)
    Loader(..., change=change)            # batches come changed; their order, and which rows they are, stay

Every row has its own random numbers, so that a batch is the same on any number of hosts and after any restart.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.data.loader import Change
from jaxlm.objectives.config import ObjectiveConfig
from jaxlm.objectives.masked_words import mask_row, vocabulary_of
from jaxlm.objectives.middle import rearrange_row, sentinels_of
from jaxlm.tokenizer.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def change_of(objective: ObjectiveConfig, tokenizer: Tokenizer, seed: int) -> Change | None:
    """What is done to a training batch; None: nothing. Raises ConfigError for tokens that the tokenizer lacks."""
    if objective.masked_words is not None:
        return _changed_by(_masked(objective, tokenizer), seed, "masked words")
    if (middle := objective.fill_in_the_middle) is not None:
        sentinels = sentinels_of(middle, tokenizer)

        def rearranged(batch: Batch, row: int, random: np.random.Generator) -> Batch:
            ids, segments, loss_mask = (batch[name][row] for name in ("ids", "segment_ids", "loss_mask"))
            ends = (tokenizer.bos_id, tokenizer.eos_id)
            return {"ids": rearrange_row(ids, segments, loss_mask, random, middle, sentinels, ends)}

        return _changed_by(rearranged, seed, "fill in the middle")
    return None


def heldout_change_of(objective: ObjectiveConfig, tokenizer: Tokenizer) -> Change | None:
    """The same of held-out rows: missing words that depend on the row's number alone, not on seed or step, so that runs
    compare. Rows for a decoder stay as they are: its figures are those of plain text."""
    if objective.masked_words is None:
        return None
    change = _changed_by(_masked(objective, tokenizer), 0, "held-out masked words")
    return lambda batch, step, numbers: change(batch, 0, numbers)


def abstract(objective: ObjectiveConfig, rows: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a changed batch, of those of a plain one."""
    return rows | {"targets": rows["ids"]} if objective.masked_words is not None else rows


def best_metric(config: Any) -> str:
    """What a `PretrainConfig`'s run is judged by; the average is what becomes the model, so it is what counts.

    Bits per byte add up the tokens of a text, which missing words do not: theirs is the loss over them alone.
    """
    name = "bits_per_byte" if config.objective.masked_words is None else "loss"
    return f"eval/ema_{name}" if config.optimizer.ema else f"eval/{name}"


def _masked(objective: ObjectiveConfig, tokenizer: Tokenizer) -> Any:
    """(batch, row, random) → the arrays of that row that change: its ids; its targets; where these count."""
    assert objective.masked_words is not None
    draw = functools.partial(mask_row, config=objective.masked_words, vocabulary=vocabulary_of(objective, tokenizer))

    def masked(batch: Batch, row: int, random: np.random.Generator) -> Batch:
        ids, chosen = draw(batch["ids"][row], batch["segment_ids"][row], random)
        return {"ids": ids, "targets": batch["ids"][row], "loss_mask": chosen}

    return masked


def _changed_by(change_row: Any, seed: int, name: str) -> Change:
    def change(batch: Batch, step: int, numbers: Sequence[int]) -> Batch:
        made = []
        for row, number in enumerate(numbers):
            random = np.random.default_rng([seed, zlib.crc32(name.encode()), step, number])
            made.append(change_row(batch, row, random))
        return batch | {key: np.stack([row[key] for row in made]) for key in made[0]}

    return change
