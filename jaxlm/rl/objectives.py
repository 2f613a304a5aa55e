"""Losses of policy and value function, as sums: micro-batches and hosts add theirs up and one division follows.

    weights, units = normalizers(mask, "token")
    sums = policy_loss(logprobs, old_logprobs, advantages, mask, .2, .2, weights=weights)
    loss = sums.loss / (units summed over the global batch)

`mask` and what may stand outside of it: see `advantages`. Log-probabilities are nats, of the drawn tokens.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Bool, Float, Int
from jaxlm.base.config import check
from jaxlm.reward.losses import pair_losses
from jaxlm.rl.advantages import real
from jaxlm.rl.kl import k1, k3, wide

Normalization = Literal["token", "sequence", "constant"]

# A ratio's logarithm above which it is cut: exp(40) = 2e17, whose square and sums still are float32 numbers.
HIGHEST_LOG_RATIO = 40.0


class PolicySums(NamedTuple):
    """Sums over an answer's tokens, scalars; all but `loss` are measurements, without gradient and weights."""

    loss: Array
    """weighted clipped surrogate, to be minimised; divide by `normalizers`' units"""
    clipped: Array
    """tokens whose gradient the clipping stops"""
    ratio: Array
    """p / p_old, as the loss has it; a token's has mean 1 in expectation under the old policy"""
    squared_deviation: Array
    """(p / p_old - 1)²"""
    old_kl: Array
    """k3 of KL(old policy ‖ policy), nats"""
    tokens: Array
    """how many were counted"""


def policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_low: float | Array,
    clip_high: float | Array,
    *,
    weights: Float[Array, "B T"] | None = None,
    sequence_ratio: bool = False,
) -> PolicySums:
    """PPO's clipped surrogate, -min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A) (arXiv:1707.06347, eq. 7).

    Only `logprobs` get a gradient. Outside of the clip it is exactly 0 where the minimum takes the clipped term: for
    A > 0 above 1 + clip_high, for A < 0 below 1 - clip_low. `weights`: from `normalizers`; without, each token's is 1.

    `sequence_ratio`: each token has its answer's ratio, exp(mean over the answer's tokens of log p - log p_old); with
    the weights of "sequence" and one advantage an answer that is GSPO's objective (arXiv:2507.18071, equations 5 to 7).

    The logarithm of the ratio is cut at `HIGHEST_LOG_RATIO`, from above alone: an infinite ratio would make 0 · inf =
    NaN with an advantage of 0, and in the gradient of every clipped token. Towards 0 nothing of the kind can happen.
    """
    advantages = jax.lax.stop_gradient(real(advantages, mask))
    log_ratio = real(logprobs, mask) - jax.lax.stop_gradient(real(old_logprobs, mask))
    log_ratio = jnp.minimum(log_ratio, HIGHEST_LOG_RATIO)
    ratio = jnp.exp(answer_means(log_ratio, mask) if sequence_ratio else log_ratio)
    bound = jnp.where(advantages > 0, 1.0 + clip_high, 1.0 - clip_low)
    clipped = ((advantages > 0) & (ratio > bound)) | ((advantages < 0) & (ratio < bound))
    loss = -jnp.where(clipped, bound, ratio) * advantages
    log_ratio, ratio = jax.lax.stop_gradient((log_ratio, ratio))
    return PolicySums(
        loss=_total(loss, mask, weights),
        clipped=jnp.sum(clipped.astype(loss.dtype)),
        ratio=_total(ratio, mask),
        squared_deviation=_total(jnp.square(ratio - 1.0), mask),
        old_kl=_total(k3(jnp.zeros_like(log_ratio), log_ratio), mask),
        tokens=jnp.sum(mask.astype(loss.dtype)),
    )


def answer_means(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Each answer's mean over its own tokens, at each of them; 0 elsewhere."""
    tokens = jnp.maximum(jnp.sum(mask.astype(x.dtype), axis=1, keepdims=True), 1.0)
    return jnp.where(mask, jnp.sum(real(x, mask), axis=1, keepdims=True) / tokens, 0.0)


def kl_loss(
    logprobs: Float[Array, "B T"],
    reference: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    estimator: Callable[[Array, Array], Array] = k3,
    *,
    weights: Float[Array, "B T"] | None = None,
    drawn: Float[Array, "B T"] | None = None,
) -> Array:
    """Sum of k2 or k3 to the reference, for the loss; `weights` as in `policy_loss`. k1 is refused (`kl` says why).

    `drawn`: the tokens' log-probabilities as they were drawn; each counts then by its ratio to that policy, whose
    gradient counts too: unbiased where the policy has moved on, and of k3 the gradient is the KL's (arXiv:2512.02556,
    section 3.1).
    """
    check(estimator is not k1, "estimator", "k1 has no expected gradient in a loss; use k2 or k3, or k1 in the reward")
    logprobs = real(logprobs, mask)
    each = estimator(logprobs, jax.lax.stop_gradient(real(reference, mask)))
    if drawn is not None:
        log_ratio = logprobs - jax.lax.stop_gradient(real(drawn, mask))
        each *= jnp.exp(jnp.minimum(log_ratio, HIGHEST_LOG_RATIO))
    return _total(each, mask, weights)


class PairSums(NamedTuple):
    """Sums over pairs of answers, scalars; all but `loss` are measurements, without gradient."""

    loss: Array
    """-log σ(β Δ); divide by `pairs`"""
    margin: Array
    """β Δ: the best answer's implicit reward minus the worst one's"""
    correct: Array
    """pairs whose best answer has the higher implicit reward"""
    pairs: Array
    """how many were counted"""


def pair_loss(
    logprobs: Float[Array, "B T"],
    reference: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    signs: Float[Array, "B"],
    beta: float,
) -> PairSums:
    """The DPO loss (arXiv:2305.18290, equation 7) of rows 2i and 2i + 1, the best and the worst answer to a prompt.

    `signs` are `advantages.best_and_worst`'s: 1 and -1 for a pair, 0 and 0 where a prompt has none. Only `logprobs` get
    a gradient.
    """
    ratios = jnp.sum(real(logprobs, mask) - jax.lax.stop_gradient(real(reference, mask)), axis=1)
    rewards, weight = beta * ratios.reshape(-1, 2), signs[::2]
    total = lambda each: jnp.sum(jnp.where(weight == 0, 0.0, weight * each))
    margin = jax.lax.stop_gradient(rewards[:, 0] - rewards[:, 1])
    return PairSums(
        loss=total(pair_losses(rewards[:, 0], rewards[:, 1])),
        margin=total(margin),
        correct=total((margin > 0).astype(margin.dtype)),
        pairs=total(jnp.ones_like(margin)),
    )


class ValueSums(NamedTuple):
    """Sums over an answer's tokens, scalars; all but `loss` are measurements, without gradient and weights."""

    loss: Array
    """weighted half of the larger squared error; divide by `normalizers`' units"""
    clipped: Array
    """tokens at which the clipped value's error is the larger one: their gradient is 0"""
    error: Array
    """return - value"""
    squared_error: Array
    returns: Array
    squared_returns: Array
    tokens: Array
    """how many were counted"""


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float | Array,
    *,
    weights: Float[Array, "B T"] | None = None,
) -> ValueSums:
    """½ max((v - R)², (v_clipped - R)²), v_clipped within ±`clip` of the rollout's value; infinity: no clipping.

    (The values' counterpart of PPO's clipping, arXiv:2005.12729, section 3.) Only `values` get a gradient.
    """
    values = real(values, mask)
    old_values, returns = jax.lax.stop_gradient((real(old_values, mask), real(returns, mask)))
    kept = old_values + jnp.clip(values - old_values, -clip, clip)
    error, kept_error = jnp.square(values - returns), jnp.square(kept - returns)
    # Asked this way round, NaN ends up in the loss.
    clipped = ~((jnp.abs(values - old_values) <= clip) | (kept_error <= error))
    loss = 0.5 * jnp.where(clipped, jax.lax.stop_gradient(kept_error), error)
    off = returns - jax.lax.stop_gradient(values)
    return ValueSums(
        loss=_total(loss, mask, weights),
        clipped=jnp.sum(clipped.astype(loss.dtype)),
        error=_total(off, mask),
        squared_error=_total(jnp.square(off), mask),
        returns=_total(returns, mask),
        squared_returns=_total(jnp.square(returns), mask),
        tokens=jnp.sum(mask.astype(loss.dtype)),
    )


def explained_variance(sums: ValueSums) -> Array:
    """1 - Var(return - value) / Var(return), of sums over any number of batches.

    1: the values know the returns; 0: no better than a constant. NaN where the returns do not vary, or by less than a
    thousandth of their size: the difference of two float32 sums cannot tell.
    """
    variance = lambda total, squares: squares / sums.tokens - jnp.square(total / sums.tokens)
    spread = variance(sums.returns, sums.squared_returns)
    unexplained = variance(sums.error, sums.squared_error)
    known = spread > 1e-6 * sums.squared_returns / sums.tokens
    return jnp.where(known, 1.0 - unexplained / jnp.where(known, spread, 1.0), jnp.nan)


class Normalizers(NamedTuple):
    """Σ token losses · `weights` [B, T] / Σ `units` (a scalar), both over the global batch, is the mean asked for."""

    weights: Array
    units: Array


def normalizers(mask: Bool[Array, "B T"], kind: Normalization, max_length: int = 0) -> Normalizers:
    """What counts alike. Rows without a real token count nowhere.

    "token": all tokens of the global batch, so that long answers weigh more (DAPO, arXiv:2503.14476, section 3.3).
    "sequence": all answers, each by the mean over its tokens (GRPO, arXiv:2402.03300, equation 3).
    "constant": all answers, each by the sum over its tokens / `max_length`, the most tokens that an answer may have, so
    that an answer's length does not weaken its tokens (Dr. GRPO, arXiv:2503.20783, section 3.2). That is a number of
    the run, not the width of the mask, which changes with the padding.

    >>> token losses [1, 1, 1, 1] and [2, 2]; "token", "sequence", "constant" with max_length 8
    8 / 6, (1 + 2) / 2, (4 + 4) / (2 · 8)
    """
    kinds = get_args(Normalization)
    check(kind in kinds, "normalization", f"got {kind!r}; one of {', '.join(kinds)} is needed")
    counted = mask.astype(float)
    lengths = jnp.sum(counted, axis=1, keepdims=True)
    if kind == "token":
        return Normalizers(counted, jnp.sum(counted))
    answers = jnp.sum((lengths > 0).astype(counted.dtype))
    if kind == "sequence":
        return Normalizers(counted / jnp.maximum(lengths, 1.0), answers)
    check(max_length >= 1, "max_length", f"got {max_length}; the most tokens of an answer are needed to divide by")
    return Normalizers(counted / max_length, answers)


def token_logprobs(
    logits: Float[Array, "N V"], ids: Int[Array, "N"], temperature: float | Array = 1.0
) -> Float[Array, "N"]:
    """log p(id), nats, under softmax(logits / temperature): policy, old policy and reference take the same temperature.

    The chosen logit is picked by comparing with an iota: a gather's gradient would be a scatter into [N, V].
    """
    if isinstance(temperature, int | float):
        check(temperature > 0, "temperature", f"got {temperature}; above 0 is needed: greedy answers have no ratio")
    logits = wide(logits) / temperature
    chosen = jax.lax.broadcasted_iota(ids.dtype, logits.shape, 1) == ids[:, None]
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "N V"]) -> Float[Array, "N"]:
    """Entropy of softmax(logits) at each position, nats: exact, over the whole vocabulary, not from drawn tokens.

    The logits are those drawn from, divided by the temperature; minus infinity is allowed. Summed over a drawn answer
    it estimates the answer's entropy without bias, but its gradient leaves out how tokens change the prefixes to come.
    """
    logprobs = jax.nn.log_softmax(wide(logits), axis=-1)
    possible = logprobs > -jnp.inf  # 0 · log 0 is 0; selected before the product, or its gradient would be NaN
    return -jnp.sum(jnp.exp(logprobs) * jnp.where(possible, logprobs, 0.0), axis=-1)


def _total(x: Float[Array, "B T"], mask: Bool[Array, "B T"], weights: Float[Array, "B T"] | None = None) -> Array:
    if weights is not None:
        x = x * real(weights, mask).astype(x.dtype)
    return jnp.sum(jnp.where(mask, x, 0.0))
