"""From scores to advantages: rewards of tokens, GAE, and the baselines of groups. Plain functions of global arrays.

`mask` is true at an answer's own tokens and comes from lengths, never from `ids != pad`. What stands elsewhere
(padding, a prompt in front, another speaker's turn) may be anything, NaN too: it changes no result and no gradient, and
gets 0. Everything is computed in float32 (or float64, where that comes in).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Bool, Float, Int
from jaxlm.base.config import check
from jaxlm.rl.kl import k1, wide

MissingEos = Literal["none", "penalty", "replace"]


def real(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """`x` in float32, 0 outside of `mask`: done before anything else, since NaN · 0 is NaN, in a gradient too."""
    return jnp.where(mask, wide(x), 0.0)


def last_tokens(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Each row's last real token; nothing in a row without any.

    >>> last_tokens([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    """
    columns = jnp.arange(mask.shape[1])[None, :]
    return mask & (columns == jnp.max(jnp.where(mask, columns, -1), axis=1, keepdims=True))


def token_rewards(
    scores: Float[Array, "B"] | Int[Array, "B"],
    logprobs: Float[Array, "B T"],
    reference: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    coefficient: float | Array,
) -> Float[Array, "B T"]:
    """PPO's reward of each token: -coefficient · k1 at every one, and the answer's score at its last one.

    `logprobs` and `reference`: of the drawn tokens under the policy that drew them and under the reference, nats.
    (Ziegler et al. 2019, arXiv:1909.08593, equation 2.) A row without a real token gets 0 everywhere: no score either.
    """
    drift = k1(real(logprobs, mask), real(reference, mask))
    at_end = jnp.where(last_tokens(mask), wide(scores)[:, None].astype(drift.dtype), 0.0)
    return at_end - coefficient * drift


def missing_eos(
    scores: Float[Array, "B"] | Int[Array, "B"], ended: Bool[Array, "B"], kind: MissingEos, amount: float | Array = 0.0
) -> Float[Array, "B"]:
    """Scores of answers that did not end by themselves (`ended` false: cut off at the token limit, no EOS).

    "none": as they are. "penalty": less by `amount` (positive, in the score's units). "replace": `amount` itself, so
    that a good beginning earns nothing; it has to lie below what a finished answer gets. EOS is never made up for them.
    To leave them out of the loss instead, the caller uses `mask & ended[:, None]`.

    >>> missing_eos([.9, .9], [True, False], "penalty", 1.0)
    [.9, -.1]
    """
    kinds = get_args(MissingEos)
    check(kind in kinds, "missing_eos", f"got {kind!r}; one of {', '.join(kinds)} is needed")
    scores = wide(scores)
    if kind == "none":
        return scores
    return jnp.where(ended, scores, scores - amount if kind == "penalty" else amount)


def overlong(lengths: Int[Array, "B"], most: int, tokens: int) -> Float[Array, "B"]:
    """DAPO's soft punishment, added to the score: 0 up to `most` - `tokens` tokens, then evenly down to -1 at `most`
    (arXiv:2503.14476, equation 13).

    >>> overlong([4, 6, 7, 8], most=8, tokens=4)
    [0, -.5, -.75, -1]
    """
    return -jnp.clip((lengths - (most - tokens)).astype(float) / tokens, 0.0, 1.0)


def generalized_advantages(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float | Array,
    lam: float | Array,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns by GAE (arXiv:1506.02438, equation 16); returns = advantages + values.

    `values[:, t]` is the value of the state in which token t is drawn. The episode ends with the last real token: the
    value after it is 0. Positions outside of `mask` are no steps: a token is followed by the next real one.
    """
    rewards, values = real(rewards, mask), real(values, mask)

    def step(after: tuple[Array, Array], at: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = after
        reward, value, counted = at
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        kept = jnp.where(counted, advantage, next_advantage), jnp.where(counted, value, next_value)
        return kept, jnp.where(counted, advantage, 0.0)

    end = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def rewards_to_come(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], gamma: float | Array
) -> Float[Array, "B T"]:
    """The discounted sum of a token's reward and those after it: REINFORCE++'s advantages before they are normalised
    (arXiv:2501.03262). The same as GAE's with λ = 1 and without values."""
    return generalized_advantages(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def whitened(x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, center: bool = True) -> Float[Array, "B T"]:
    """(x - mean) · rsqrt(variance + 1e-8), the variance unbiased, over all real tokens of the *global* batch.

    So it stands before the batch is cut into minibatches, or each is whitened by its own numbers. `center` false puts
    the mean back, as for rewards, whose level matters (Ziegler et al. 2019, their code). A single token gets its mean.
    """
    count = jnp.sum(mask.astype(float))
    # Counted from the highest value, equal ones are exactly 0: the factor is 1e4 then, and would blow rounding up.
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(mask, wide(x), -jnp.inf)))
    highest = jnp.where(count > 0, highest, 0.0)
    below = real(wide(x) - highest, mask)
    mean = jnp.sum(below) / jnp.maximum(count, 1.0).astype(below.dtype)
    off = real(below - mean, mask)
    variance = jnp.sum(off * off) / jnp.maximum(count - 1.0, 1.0).astype(off.dtype)
    result = off * jax.lax.rsqrt(variance + 1e-8)
    return result if center else jnp.where(mask, result + mean + highest, 0.0)


def group_advantages(
    rewards: Float[Array, "P K"], epsilon: float, *, ddof: int = 1, scale: bool = True
) -> Float[Array, "P K"]:
    """GRPO's advantages of K answers to each of P prompts: (r - mean) / (std + epsilon) (arXiv:2402.03300, 4.1.2).

    The standard deviation divides by K - `ddof`. `scale` false leaves the division out, which gives most weight to the
    prompts whose answers hardly differ: Dr. GRPO (arXiv:2503.20783). Equal rewards give exactly 0.
    """
    K = rewards.shape[1]
    check(K >= 2 and ddof < K, "samples", f"got {K} answers a prompt; a group needs at least {max(2, ddof + 1)}")
    check(epsilon > 0 or not scale, "epsilon", f"got {epsilon}; above 0 is needed: equal rewards would give 0 / 0")
    rewards = wide(rewards)
    # Counted from the highest: the mean of equal rewards need not round to that reward, that of zeros is 0.
    below = rewards - jnp.max(rewards, axis=1, keepdims=True)
    off = below - jnp.mean(below, axis=1, keepdims=True)
    if not scale:
        return off
    return off / (jnp.sqrt(jnp.sum(off * off, axis=1, keepdims=True) / (K - ddof)) + epsilon)


def leave_one_out(rewards: Float[Array, "P K"]) -> Float[Array, "P K"]:
    """RLOO: each answer's reward minus the mean of the other K - 1 (arXiv:2402.14740)."""
    K = rewards.shape[1]
    check(K >= 2, "samples", f"got {K} answers a prompt; 2 or more are needed, the others being the baseline")
    return group_advantages(rewards, 0.0, scale=False) * (K / (K - 1))


def best_and_worst(rewards: Float[Array, "P K"], counted: Bool[Array, "P K"]) -> Float[Array, "P K"]:
    """1 for the best and -1 for the worst of each prompt's `counted` answers, the first of equal ones; 0 for the rest.

    0 for all where best and worst are equal, or fewer than two count. NaN for all where a reward is no number.

    >>> best_and_worst([[.2, .9, .1, .9], [1, 1, 1, 1]], all)
    [[0, 1, -1, 0], [0, 0, 0, 0]]
    """
    rewards = wide(rewards)
    high, low = jnp.where(counted, rewards, -jnp.inf), jnp.where(counted, rewards, jnp.inf)
    at = jnp.arange(rewards.shape[1])[None, :]
    of = lambda which: (at == which[:, None]).astype(rewards.dtype)
    signs = of(jnp.argmax(high, axis=1)) - of(jnp.argmin(low, axis=1))
    untied = jnp.max(high, axis=1) > jnp.min(low, axis=1)
    # Or a prompt with a NaN, which is above nothing, would pass for one with a tie.
    broken = jnp.any(counted & ~jnp.isfinite(rewards), axis=1)
    return jnp.where(broken[:, None], jnp.nan, jnp.where(untied[:, None], signs, 0.0))
