"""From logits to a token, in the order of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p.

    settings = settings_of(SamplingConfig(temperature=0.7, top_p=0.9))
    kept = process(logits, seen, settings)              # [B, V], minus infinity where a token is cut off
    ids, logprobs = draw(kept, uniform, settings)       # [B] each

No step sorts the vocabulary. On two CPU cores at [16, 8192], sorting takes 29 ms, `jax.random.categorical` 4 ms, one
cumulative sum 1.2 ms, the draw below 0.2 ms, a cut below 1 ms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Bool, Float32, Int32, UInt32
from jaxlm.sample.config import SamplingConfig


class Settings(NamedTuple):
    """Scalars of the distribution. What is off is None, so it is no part of the compiled program; values are traced."""

    temperature: Array | None
    """float32; None: take the most likely token"""
    repetition_penalty: Array | None
    """float32"""
    top_k: Array | None
    """float32 (it is compared with a count)"""
    top_p: Array | None
    """float32"""
    min_p: Array | None
    """float32"""
    vocabulary: Array | None = None
    """int32: the tokenizer's size, when the model has more logits than that"""


def settings_of(config: SamplingConfig, vocabulary: int | None = None) -> Settings:
    """Truncation is off when greedy: the most likely token survives every cut. `vocabulary`: see `Settings`."""
    draws = config.temperature > 0
    return Settings(
        temperature=jnp.float32(config.temperature) if draws else None,
        repetition_penalty=jnp.float32(config.repetition_penalty) if config.repetition_penalty != 1 else None,
        top_k=jnp.float32(config.top_k) if draws and config.top_k else None,
        top_p=jnp.float32(config.top_p) if draws and config.top_p < 1 else None,
        min_p=jnp.float32(config.min_p) if draws and config.min_p else None,
        vocabulary=None if vocabulary is None else jnp.int32(vocabulary),
    )


def process(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"] | None, settings: Settings
) -> Float32[Array, "B V"]:
    """Logits of the distribution to draw from; `seen` marks the tokens under the repetition penalty.

    Tokens as likely as the last one that is kept are kept too, so that ties do not depend on their order.
    """
    if settings.vocabulary is not None:
        logits = jnp.where(jnp.arange(logits.shape[1])[None] < settings.vocabulary, logits, -jnp.inf)
    if settings.repetition_penalty is not None:
        assert seen is not None
        penalized = jnp.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
        logits = jnp.where(seen, penalized, logits)
    if settings.temperature is None:
        return logits
    logits = logits / settings.temperature
    if settings.top_k is not None:
        logits = _keep_top(logits, jnp.ones_like(logits), settings.top_k)
    if settings.top_p is not None:
        logits = _keep_top(logits, jax.nn.softmax(logits, axis=-1), settings.top_p)
    if settings.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(settings.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def draw(
    logits: Float32[Array, "B V"], uniform: Float32[Array, "B"], settings: Settings
) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """Token ids by the inverse of the cumulative distribution at `uniform` in [0, 1), and their log-probabilities.

    The log-probabilities are those of the distribution drawn from, cut and tempered. Greedy, where they would all be 0,
    they are those of the logits as given. `uniform` has 23 bits: tokens rarer than 1e-7 are drawn in steps of that.
    """
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[:, None])
    total = jnp.sum(weights, axis=-1)
    if settings.temperature is None:
        ids = _first(logits == top[:, None])
    else:
        ids = _invert(weights, uniform)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    return ids, chosen - top - jnp.log(total)


def _invert(weights: Float32[Array, "B V"], uniform: Float32[Array, "B"], block: int = 128) -> Int32[Array, "B"]:
    """The first token whose cumulative weight exceeds uniform * total: first its block, then its place in the block."""
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % block))).reshape(B, -1, block)
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = (uniform * ends[:, -1])[:, None]
    # Sums in different orders differ in the last bits; `weight > 0` keeps tokens that were cut off from being drawn.
    at = _first((ends > target) & (sums > 0), fallback=_last(sums > 0))[:, None]
    inside = jnp.take_along_axis(blocks, at[:, :, None], axis=1)[:, 0]
    before = jnp.take_along_axis(ends - sums, at, axis=1)
    passed = before + jnp.cumsum(inside, axis=-1) > target
    return at[:, 0] * block + _first(passed & (inside > 0), fallback=_last(inside > 0))


def _keep_top(
    logits: Float32[Array, "B V"], weights: Float32[Array, "B V"], enough: Float32[Array, ""]
) -> Float32[Array, "B V"]:
    """Minus infinity below the highest threshold at or above which the weights add up to `enough`.

    Exact: floats order like the unsigned integers of `_order`, and the threshold is found bit by bit, in 32 passes.
    """
    order = _order(logits)

    def set_bit(step: Int32[Array, ""], found: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        higher = found | jnp.left_shift(jnp.uint32(1), (31 - step).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= higher[:, None], weights, 0.0), axis=-1)
        return jnp.where(reached >= enough, higher, found)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def _order(x: Float32[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats: the sign bit is turned over, and all others too where it was set."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _first(mask: Bool[Array, "B N"], fallback: Int32[Array, "B"] | None = None) -> Int32[Array, "B"]:
    """Index of the first true entry (`argmax` runs ten times as long on CPU)."""
    N = mask.shape[1]
    found = jnp.min(jnp.where(mask, jnp.arange(N, dtype=jnp.int32)[None], N), axis=-1)
    return jnp.minimum(found, N - 1) if fallback is None else jnp.where(found < N, found, fallback)


def _last(mask: Bool[Array, "B N"]) -> Int32[Array, "B"]:
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1], dtype=jnp.int32)[None], 0), axis=-1)
