"""How much a completion says again."""

from collections import Counter
from collections.abc import Sequence


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of an answer's n-grams that stood in it before.

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = Counter(tuple(ids[at : at + n]) for at in range(len(ids) - n + 1))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0
