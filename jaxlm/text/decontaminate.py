"""Train documents that share runs of words with held-out documents.

The n-gram overlap of Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13 words, lower case).
Held-out documents shorter than n words can only be met by `dedup`.
"""

import functools
import hashlib
import re

import numpy as np
from jaxtyping import UInt64

from jaxlm.text.clean import Reason

# A word is a run of letters and digits; in scripts written without spaces (Thai, Lao, Burmese, Khmer, kana, Chinese)
# it is one character, else a whole sentence would count as one word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class HeldoutIndex:
    """Hashes of all n-grams of the held-out documents: 8 bytes each, a false match in 2^64."""

    def __init__(self, ngram_words: int):
        self.ngram_words = ngram_words
        self._pending: list[np.ndarray] = []
        self._sorted = np.zeros(0, np.uint64)

    def add(self, text: str) -> None:
        self._pending.append(np.unique(ngrams(text, self.ngram_words)))

    def overlap(self, text: str) -> float:
        """The share of the text's n-grams that stand in a held-out document; 0 for a text of fewer than n words."""
        if self._pending:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._pending]))
            self._pending = []
        found = ngrams(text, self.ngram_words)
        if not len(found) or not len(self._sorted):
            return 0.0
        at = np.minimum(np.searchsorted(self._sorted, found), len(self._sorted) - 1)
        return float(np.mean(self._sorted[at] == found))

    def rule(self, max_share: float):
        """The rule that drops documents of a larger overlap."""

        def decontaminate(text: str) -> str | Reason:
            return Reason("overlaps_heldout") if self.overlap(text) > max_share else text

        return decontaminate


def ngrams(text: str, words: int) -> UInt64[np.ndarray, " N"]:
    """A hash of every run of `words` words: sum over j of hash(word i+j) * odd_j, modulo 2^64."""
    hashes = np.array([_hash(word) for word in _WORD.findall(text.casefold())], np.uint64)
    count = len(hashes) - words + 1
    total = np.zeros(max(count, 0), np.uint64)
    for j in range(words if count > 0 else 0):
        total += hashes[j : j + count] * (_hash(f"place {j}") | np.uint64(1))
    return total


@functools.lru_cache(1 << 18)
def _hash(word: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little"))
