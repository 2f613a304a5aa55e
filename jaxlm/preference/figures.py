"""What a reward model's held-out pairs show: how often it agrees, how sure it is, whether it likes length.

Works on the host, on arrays gathered from the devices; numpy only. Intervals take pairs for independent, which those of
one prompt are not: read them as the least that is unknown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Z_95 = 1.959964  # standard normal quantile of 97.5 %


class Pairs(NamedTuple):
    """Held-out pairs, an array each, `[R]`; `RankingBatches` says what they hold."""

    difference: np.ndarray
    """better's reward - worse's, without margin"""
    criterion: np.ndarray
    ranked: np.ndarray
    distance: np.ndarray
    annotator: np.ndarray
    kind: np.ndarray


class Answers(NamedTuple):
    """Held-out answers, each once a criterion, an array each, `[N]`."""

    reward: np.ndarray
    tokens: np.ndarray
    """length without the prompt"""
    criterion: np.ndarray


def gather(
    results: Iterable[tuple[Mapping[str, np.ndarray], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]],
) -> tuple[Pairs, Answers]:
    """(batch, the rewards of its better answers, those of its worse ones) of each batch → all pairs, all answers.

    Padding is left out; an answer of several pairs comes once.
    """
    pairs, answers = [], []
    for batch, better, worse in results:
        real = np.flatnonzero(batch["weight"] > 0)
        pairs.append([(better - worse)[real], *(batch[name][real] for name in Pairs._fields[1:])])
        place = np.concatenate([batch["better"][real], batch["worse"][real]])
        criterion = np.concatenate([batch["criterion"][real]] * 2)
        _, first = np.unique(np.stack([place, criterion]), axis=1, return_index=True)
        reward = np.concatenate([better[real], worse[real]])
        tokens = np.concatenate([batch["better_tokens"][real], batch["worse_tokens"][real]])
        answers.append([reward[first], tokens[first], criterion[first]])
    join = lambda parts: [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Pairs(*join(pairs)), Answers(*join(answers))


class Share(NamedTuple):
    """How many of how many, with the share's 95 % interval."""

    correct: int
    total: int
    share: float
    low: float
    high: float


def wilson(correct: int, total: int) -> Share:
    """Wilson 1927, "Probable Inference, the Law of Succession": unlike p ± 1.96 s it stays within 0 and 1, and has
    a width where all or none are correct.

    >>> wilson(8, 10)
    Share(correct=8, total=10, share=0.8, low=0.490..., high=0.943...)
    """
    if not total:
        return Share(0, 0, math.nan, 0.0, 1.0)
    share, z2 = correct / total, Z_95 * Z_95
    middle = share + z2 / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low, high = ((middle + sign * half) / (1 + z2 / total) for sign in (-1, 1))
    return Share(correct, total, share, max(0.0, low), min(1.0, high))


def accuracy(pairs: Pairs) -> Share:
    """Pairs whose better answer has the higher reward; equal rewards are wrong, so a constant model gets nothing."""
    return wilson(int(np.sum(pairs.difference > 0)), len(pairs.difference))


def accuracy_by(pairs: Pairs, column: str) -> dict[int, Share]:
    """Accuracy for each value of "ranked" (K), "distance", "criterion", "annotator" or "kind", in rising order."""
    values = getattr(pairs, column)
    return {int(value): accuracy(Pairs(*(x[values == value] for x in pairs))) for value in np.unique(values)}


class Bin(NamedTuple):
    """Pairs whose predictions lie from `low` to `high`."""

    low: float
    high: float
    predicted: float
    """mean prediction; NaN for no pairs"""
    observed: Share
    """how often the answer predicted to be better is"""


def calibration(difference: Float[np.ndarray, " R"], bins: int = 10) -> tuple[list[Bin], float]:
    """The reliability table, and the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3).

    A pair's prediction is sigmoid(|difference|), 1/2 to 1, that the answer with the higher reward is the better one.
    """
    predicted = 1 / (1 + np.exp(-np.abs(difference.astype(np.float64))))
    edges = np.linspace(0.5, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for number in range(bins):
        inside = which == number
        observed = wilson(int(np.sum(difference[inside] > 0)), int(np.sum(inside)))
        mean = float(np.mean(predicted[inside])) if observed.total else math.nan
        table.append(Bin(float(edges[number]), float(edges[number + 1]), mean, observed))
        if observed.total:
            error += observed.total / len(difference) * abs(observed.share - mean)
    return table, error if len(difference) else math.nan


def report(
    pairs: Pairs, answers: Answers, criteria: Sequence[str], names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """All figures as JSON; `names`: what the numbers in "annotator" and "kind" stand for."""
    table, error = calibration(pairs.difference)
    by = {
        column: {label(value): share._asdict() for value, share in accuracy_by(pairs, column).items()}
        for column, label in {
            "ranked": str,
            "distance": str,
            "criterion": lambda n: criteria[n],
            "annotator": lambda n: names["annotator"][n],
            "kind": lambda n: names["kind"][n],
        }.items()
    }
    lengths = {criteria[n]: found._asdict() for n, found in length_correlation(answers).items()}
    return plain(
        {
            "accuracy": accuracy(pairs)._asdict(),
            "accuracy_by": by,
            "calibration": [bin._asdict() | {"observed": bin.observed._asdict()} for bin in table],
            "calibration_error": error,
            "length_correlation": lengths,
        }
    )


def plain(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Correlation(NamedTuple):
    pearson: float
    """of the values"""
    spearman: float
    """of their ranks"""


def correlation(x: np.ndarray, y: np.ndarray) -> Correlation:
    """Of two arrays `[N]`; NaN for fewer than two values, and where all of one are equal."""
    return Correlation(_pearson(x, y), _pearson(_ranks(x), _ranks(y)))


def length_correlation(answers: Answers) -> dict[int, Correlation]:
    """Of reward with length, for each criterion: whether long answers are liked for their length."""
    made = {}
    for criterion in np.unique(answers.criterion):
        inside = answers.criterion == criterion
        made[int(criterion)] = correlation(answers.reward[inside], answers.tokens[inside])
    return made


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = (value.astype(np.float64) - np.mean(value, dtype=np.float64) for value in (x, y))
    return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))


def _ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
