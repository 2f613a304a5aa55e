"""Figures with 95 % intervals: {"value", "interval", "n"}, n being what the interval counts as independent.

| what | interval |
| --- | --- |
| `share`: scores from 0 to 1 of independent examples | Wilson's |
| `clustered_share`: such scores that belong together, as all pairs of a prompt do | Wilson's of the effective number |
| `ratio`: any sums over sums, as nats over bytes | linearised ratio estimator |
| `difference` of two figures | from the ends of both intervals (MOVER) |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Z = 1.96
Figure = dict[str, Any]


def ratio(above: np.ndarray, below: np.ndarray) -> Figure:
    """sum(above) / sum(below) over documents `[N]`, with a 95 % interval for documents like these.

    The ratio estimator of survey sampling, linearised: its variance is N/(N-1) * sum((above - R below)²) / sum(below)²
    (Cochran, Sampling Techniques, section 6.4, without the correction for finite populations).
    """
    value = above.sum() / below.sum()
    N = len(above)
    if N < 2:
        return {"value": float(value), "interval": None}
    error = math.sqrt(N / (N - 1) * np.sum((above - value * below) ** 2)) / below.sum()
    return {"value": float(value), "interval": [float(value - Z * error), float(value + Z * error)]}


def mean(values: Sequence[float]) -> Figure:
    """The mean of independent numbers of any size, as a ratio with 1 below."""
    return ratio(np.array(values, np.float64), np.ones(len(values))) | {"n": len(values)}


def share(scores: Sequence[float] | Sequence[bool] | np.ndarray) -> Figure:
    """The mean of scores from 0 to 1 with Wilson's interval (E. B. Wilson, 1927), which holds at 0 and 1 too.

    Scores between 0 and 1 spread less than 0s and 1s of the same mean, so that for them it is wide enough.

    >>> share([1, 1, 1, 0])
    {'value': 0.75, 'interval': [0.3006, 0.9544], 'n': 4}
    """
    values = np.asarray(scores, np.float64)
    return _figure(float(values.mean()), len(values), len(values))


def clustered_share(above: np.ndarray, below: np.ndarray) -> Figure:
    """sum(above) / sum(below) over clusters `[N]`: scores from 0 to 1, of which each cluster has `below` many.

    Wilson's interval of the effective number, value * (1 - value) / variance with `ratio`'s variance over clusters
    (E. Korn, B. Graubard, 1998), and of the number of clusters where that variance is 0 or there is only one.
    """
    value, N = float(above.sum() / below.sum()), len(above)
    variance = N / max(N - 1, 1) * float(np.sum((above - value * below) ** 2)) / float(below.sum()) ** 2
    spread = value * (1 - value)
    effective = min(spread / variance, float(below.sum())) if N > 1 and variance > 1e-12 and spread > 0 else N
    return _figure(value, effective, N)


def _figure(value: float, effective: float, n: int) -> Figure:
    value = min(max(value, 0.0), 1.0)
    scale = 1 + Z**2 / effective
    centre = (value + Z**2 / (2 * effective)) / scale
    half = Z / scale * math.sqrt(value * (1 - value) / effective + Z**2 / (4 * effective**2))
    return {"value": value, "interval": [max(0.0, centre - half), min(1.0, centre + half)], "n": n}


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Figure:
    """a - b of two figures, taken as independent.

    The interval's ends lie at the root of the squared distances of both values to their own ends (MOVER: G. Zou and
    A. Donner, 2008; of two shares: R. Newcombe's tenth method, 1998). Two models on the same examples are not
    independent but alike, so that it is too wide for them rather than too narrow.
    """
    value = a["value"] - b["value"]
    if not a.get("interval") or not b.get("interval"):
        return {"value": value, "interval": None}
    (a_low, a_high), (b_low, b_high) = a["interval"], b["interval"]
    below = math.hypot(a["value"] - a_low, b_high - b["value"])
    above = math.hypot(a_high - a["value"], b["value"] - b_low)
    return {"value": value, "interval": [value - below, value + above]}


def by_group(scores: Sequence[float] | Sequence[bool], groups: Sequence[str]) -> dict[str, Figure]:
    """Group → its share; empty where all are of one group, of which the whole says the same."""
    names = sorted(set(groups))
    if len(names) < 2:
        return {}
    return {name: share([s for s, g in zip(scores, groups, strict=True) if g == name]) for name in names}
