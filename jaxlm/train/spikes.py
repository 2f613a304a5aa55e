"""Spikes: a loss or gradient norm far above what the last good steps had.

What the last good steps had lies in the state, so that a run that goes on judges every step as one that never stopped.
"""

from typing import Any

import jax.numpy as jnp

from jaxlm.base.arrays import Array, Bool, Float32

# Least spread, as a share of the median: where all steps were alike, rounding is no spike.
LEAST_SPREAD = 0.01


def nothing_seen(window: int) -> Any:
    """Of the last `window` good steps, (loss, gradient norm) each; an empty dict where nobody asks."""
    return {"seen": jnp.zeros((window, 2)), "count": jnp.int32(0)} if window else {}


def is_spike(recent: Any, now: Float32[Array, "2"], limit: float) -> Bool[Array, ""]:
    """Whether a number lies above median + limit · MAD of its window, once that is full.

    MAD: the median absolute deviation from the median. Both hold with up to half of the window outliers.
    """
    seen = recent["seen"]
    middle = _median(seen)
    spread = jnp.maximum(_median(jnp.abs(seen - middle[None])), LEAST_SPREAD * jnp.abs(middle))
    return (recent["count"] >= seen.shape[0]) & jnp.any(now > middle + limit * spread)


def remembered(recent: Any, now: Float32[Array, "2"]) -> Any:
    """With one more good step, in the place of the oldest."""
    place = recent["count"] % recent["seen"].shape[0]
    return {"seen": recent["seen"].at[place].set(now), "count": recent["count"] + 1}


def _median(x: Float32[Array, "W C"]) -> Float32[Array, "C"]:
    """Of an even number, the upper of the two in the middle: no step's number is made up."""
    return jnp.sort(x, axis=0)[x.shape[0] // 2]
