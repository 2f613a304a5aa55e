"""Trains a sentencepiece model that gives every text back as it was."""

import io
import re
from collections.abc import Sequence

import sentencepiece

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.tokenizer.config import BASIC_TOKENS, TokenizerConfig

_UNKNOWN = "\u2585"  # sentencepiece's trainer leaves out every text with this character, which it uses itself
THREADS = 16  # fixed, because the unigram trainer's sums depend on it; the number of cores must not


def train(texts: Sequence[str], config: TokenizerConfig) -> bytes:
    """The content of a tokenizer.model. The same texts and config give the same bytes.

    Raises ConfigError for a vocabulary that these texts cannot fill, or that is too small for their characters, with
    the size that they reach.
    """
    if not texts:
        raise UserError("documents: the sample holds no train document; raise sample_bytes")
    model = io.BytesIO()
    pad, bos, eos, unk = BASIC_TOKENS
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.replace(_UNKNOWN, "") for text in texts),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            control_symbols=list(config.added_tokens),
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=pad,
            bos_piece=bos,
            eos_piece=eos,
            unk_piece=unk,
            # What makes encoding lossless: nothing is rewritten, nothing is added, and bytes spell what is unknown.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=2**30,  # a document is one "sentence": else line feeds would never be seen
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, texts, config) from error
    return model.getvalue()


def _explained(error: RuntimeError, texts: Sequence[str], config: TokenizerConfig) -> Exception:
    """What sentencepiece says about the vocabulary, in words that name the field."""
    size = sum(len(text.encode()) for text in texts)
    if most := re.search(r"too high.*<= (\d+)", str(error), re.S):
        return ConfigError(
            "vocab_size",
            f"got {config.vocab_size}; {size:,} bytes of text with algorithm={config.algorithm} give at most "
            f"{most[1]}: use that or less, or more text",
        )
    if least := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error)):
        needed = max(int(least[1]), int(least[2]))
        return ConfigError("vocab_size", f"got {config.vocab_size}; the characters of the text alone need {needed}")
    return error
