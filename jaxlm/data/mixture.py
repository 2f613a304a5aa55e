"""Which source each row of a run comes from: a function of the row's number and of the weights' history.

Grain's own `MapDataset.mix` serves fixed weights above 0 and rounds them to a hundredth of the smallest. Weights that
change in the middle of a run, or are 0 for a while, need each source's count up to any row, which this file gives.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxlm.base.errors import ConfigError

History = tuple[tuple[int, tuple[float, ...]], ...]


def continued(history: History, step: int, weights: Sequence[float]) -> History:
    """The history of a run that goes on from `step` with these weights.

    >>> continued(((0, (1.0, 0.0)),), 500, (1.0, 0.5))
    ((0, (1.0, 0.0)), (500, (1.0, 0.5)))
    """
    past = [(start, tuple(old)) for start, old in history if start < step]
    if past and past[-1][1] == tuple(weights):
        return tuple(past)
    return (*past, (step, tuple(weights)))


class _Stretch(NamedTuple):
    first_row: int
    weights: tuple[int, ...]
    drawn_before: tuple[int, ...]
    """Rows of each source before `first_row`."""


class Mixture:
    """
    >>> mixture = Mixture(((0, (2, 1)), (2, (0, 1))), rows_per_step=3)
    >>> [mixture.locate(row)[0] for row in range(9)]
    [0, 0, 1, 0, 0, 1, 1, 1, 1]
    """

    def __init__(self, history: History, rows_per_step: int):
        """`history` holds (from step, a weight for each source), the first from step 0.

        Raises ConfigError for weights that are no numbers of 0 or more, or all 0, and for steps that do not rise.
        """
        self.sources = len(history[0][1]) if history else 0
        self._stretches: list[_Stretch] = []
        for step, weights in history:
            _check(step, weights, self.sources, bool(self._stretches))
            first_row, drawn = step * rows_per_step, (0,) * self.sources
            if self._stretches:
                last = self._stretches[-1]
                if first_row <= last.first_row:
                    raise ConfigError("history", f"step {step} does not come after the one before it")
                drawn = self.drawn(first_row)
            self._stretches.append(_Stretch(first_row, _whole(weights), drawn))
        if not self._stretches:
            raise ConfigError("history", "is empty; it must hold at least (0, weights)")

    def drawn(self, row: int) -> tuple[int, ...]:
        """How many of the rows before `row` come from each source."""
        stretch = self._stretch(row)
        counts = _shares(row - stretch.first_row, stretch.weights)
        return tuple(a + b for a, b in zip(stretch.drawn_before, counts, strict=True))

    def locate(self, row: int) -> tuple[int, int]:
        """(source, the row's number in the source's own endless order)."""
        stretch = self._stretch(row)
        before = _shares(row - stretch.first_row, stretch.weights)
        after = _shares(row + 1 - stretch.first_row, stretch.weights)
        source = next(i for i in range(self.sources) if after[i] != before[i])
        return source, stretch.drawn_before[source] + before[source]

    def _stretch(self, row: int) -> _Stretch:
        return next(s for s in reversed(self._stretches) if s.first_row <= row)


def _shares(rows: int, weights: tuple[int, ...]) -> list[int]:
    """`rows` divided in proportion to `weights`, so that one row more is one more for exactly one source.

    The first source gets its rounded-up share of all, the second its share of the remainder, and so on: a remainder
    grows by 0 or 1 as the whole does, and so do both its parts.
    """
    counts = []
    weight_left = sum(weights)
    for weight in weights:
        rest = rows * (weight_left - weight) // weight_left if weight_left else 0
        counts.append(rows - rest)
        rows, weight_left = rest, weight_left - weight
    return counts


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion that the weights have as they are written: (0.7, 0.3) gives (7, 3)."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * scale) for weight in exact)


def _check(step: int, weights: Sequence[float], sources: int, later: bool) -> None:
    if not later and step != 0:
        raise ConfigError("history", f"begins at step {step}; the first weights must hold from step 0")
    if len(weights) != sources or not sources:
        raise ConfigError("history", f"has {len(weights)} weights from step {step}; {sources or 'some'} are needed")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError("history", f"has the weights {weights} from step {step}; numbers >= 0, not all 0, are needed")
