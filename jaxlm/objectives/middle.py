"""Fill in the middle: documents of a row cut in three, and put together in another order (arXiv:2207.14255).

A document `<s> a b c d e f g h </s>`, cut into the prefix a, the middle b c and the suffix d e, becomes

    PSM   <s> <PRE> a <SUF> d e <MID> b c </s>
    SPM   <s> <PRE> <SUF> d e <MID> a b c </s>          (the paper's second form, which it trains with)

Its last three tokens, here f g h, have given way to the sentinels: it keeps its length and its place in the row. What
follows the suffix in the text is out of sight, as it is to a prompt that was cut to the context; but a token of the
suffix is always left, so that no EOS says of a text that goes on that it ends.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxlm.objectives.config import FillInTheMiddleConfig
from jaxlm.objectives.tokens import special_token
from jaxlm.tokenizer.tokenizer import Tokenizer

# Tokens of text that have to be left for a document to be cut; shorter ones stay as they are.
LEAST_TEXT = 3


class Sentinels(NamedTuple):
    """Ids of the tokens before each part."""

    prefix: int
    suffix: int
    middle: int


def sentinels_of(config: FillInTheMiddleConfig, tokenizer: Tokenizer) -> Sentinels:
    """Raises ConfigError for one that the tokenizer lacks."""
    fields = ("prefix_token", "suffix_token", "middle_token")
    where = "objective.fill_in_the_middle"
    return Sentinels(*(special_token(tokenizer, f"{where}.{field}", getattr(config, field)) for field in fields))


def rearranged(
    text: Int32[np.ndarray, "N"], begin: int, end: int, suffix_first: bool, sentinels: Sentinels
) -> Int32[np.ndarray, "M"]:
    """`text` with its middle, tokens begin to end - 1, last; three tokens longer."""
    prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
    pre, suf, mid = ([token] for token in sentinels)
    parts = [pre, suf, suffix, mid, prefix, middle] if suffix_first else [pre, prefix, suf, suffix, mid, middle]
    return np.concatenate(parts).astype(np.int32)


def rearrange_row(
    ids: Int32[np.ndarray, "S"],
    segments: Int32[np.ndarray, "S"],
    loss_mask: Bool[np.ndarray, "S"],
    random: np.random.Generator,
    config: FillInTheMiddleConfig,
    sentinels: Sentinels,
    ends: tuple[int | None, int],
) -> Int32[np.ndarray, "S"]:
    """The row with some of its documents rearranged, each where it was; positions, segments and loss mask hold on.

    `ends` are BOS and EOS, which stay in front and at the end. A piece of a document too long for a row is taken as a
    document. Segments with targets of their own (chats) stay as they are, as do those of fewer than 6 tokens of text.
    """
    made = ids.copy()
    begins = np.flatnonzero((segments > 0) & (np.diff(segments, prepend=0) != 0))
    for begin in begins:
        end = begin + int(np.argmin(np.append(segments[begin:] == segments[begin], False)))
        first = begin + (ids[begin] == ends[0])
        last = end - (ids[end - 1] == ends[1])
        length = last - first - len(sentinels)
        draws, cuts = random.random(2), random.random(2)  # drawn for each, so that none depends on those before it
        if draws[0] >= config.rate or length < LEAST_TEXT or not loss_mask[begin + 1 : end].all():
            continue
        low, high = sorted((cuts * length).astype(int))  # two places drawn alike, never behind the last token
        made[first:last] = rearranged(ids[first : first + length], low, high, draws[1] < config.suffix_first, sentinels)
    return made
