"""Missing words: which tokens of a row are predicted, and what stands in their place (BERT, arXiv:1810.04805, 3.1)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxlm.objectives.config import MaskedWordsConfig, ObjectiveConfig
from jaxlm.objectives.tokens import special_token
from jaxlm.tokenizer.tokenizer import Tokenizer


class Vocabulary(NamedTuple):
    """What of a tokenizer the drawing needs."""

    mask_id: int
    special: Int32[np.ndarray, "P"]
    """Ids that stand for no text: they are never predicted, and never put in a word's place."""
    ordinary: Int32[np.ndarray, "O"]
    """All others."""


def vocabulary_of(objective: ObjectiveConfig, tokenizer: Tokenizer) -> Vocabulary:
    """Raises ConfigError where the tokenizer has no mask_token."""
    assert objective.masked_words is not None
    mask_id = special_token(tokenizer, "objective.masked_words.mask_token", objective.masked_words.mask_token)
    special = np.array(sorted({*tokenizer.special_ids.values(), tokenizer.eos_id, tokenizer.pad_id}), np.int32)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), special)
    return Vocabulary(mask_id, special, ordinary)


def mask_row(
    ids: Int32[np.ndarray, "S"],
    segments: Int32[np.ndarray, "S"],
    random: np.random.Generator,
    config: MaskedWordsConfig,
    vocabulary: Vocabulary,
) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """(the row with words missing, which of its places are predicted).

    With mask id 4 and special ids up to 4, a row [2 9 8 7 3 0] may become [2 9 4 7 3 0], predicted at [0 0 1 0 0 0].
    """
    places, kinds = random.random((2, len(ids)))
    others = vocabulary.ordinary[random.integers(len(vocabulary.ordinary), size=len(ids))]
    chosen = (places < config.rate) & (segments > 0) & ~np.isin(ids, vocabulary.special)
    missing = chosen & (kinds < config.masked)
    swapped = chosen & ~missing & (kinds < config.masked + config.random)
    return np.where(missing, vocabulary.mask_id, np.where(swapped, others, ids)).astype(np.int32), chosen
