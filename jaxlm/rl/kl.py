"""How far the policy is from its reference: estimators from drawn tokens, and the coefficient in front of them.

For tokens drawn from the policy itself, with d = logprobs - reference (http://joschu.net/blog/kl-approx.html), each
estimates KL(policy ‖ reference); where it is put decides what is minimised (tested on all outcomes of a small softmax):

| estimator | its mean | in the reward | as a loss, the expected gradient is that of |
| --- | --- | --- | --- |
| k1 = d | KL, exactly | KL(policy ‖ reference): what PPO does | nothing: it is 0 |
| k2 = d²/2 | biased, little variance | — | KL(policy ‖ reference) |
| k3 = exp(-d) - 1 + d | KL, exactly; never below 0 | — | KL(reference ‖ policy), the other direction: what GRPO does |

"As a loss" holds token by token, with the drawn prefixes as they are: that a token leads to prefixes of more or less KL
is seen in the reward only. And it holds on-policy: after the first update of a batch, the mean is over the old policy.
"""

import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float, Int


def wide(x: Float[Array, "..."] | Int[Array, "..."]) -> Float[Array, "..."]:
    """At least float32: differences of bf16 log-probabilities are noise, and an integer buffer would make .73 a 0."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def k1(logprobs: Float[Array, "B T"], reference: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """logprobs - reference, nats; unbiased, of either sign."""
    return wide(logprobs) - wide(reference)


def k2(logprobs: Float[Array, "B T"], reference: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Half the squared difference."""
    return 0.5 * jnp.square(k1(logprobs, reference))


def k3(logprobs: Float[Array, "B T"], reference: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp(-d) - 1 + d; `expm1`, since exp(-d) - 1 has no digits left where the policies are close."""
    difference = k1(logprobs, reference)
    return jnp.expm1(-difference) + difference


def fixed(coefficient: float | Array, observed_kl: float | Array) -> float | Array:
    """The coefficient as it is, in `adaptive`'s place."""
    return coefficient


def adaptive(
    coefficient: float | Array,
    observed_kl: float | Array,
    target: float,
    horizon: int,
    n: int,
    clip: float = 0.2,
) -> Array:
    """The next coefficient: times 1 + clip(observed / target - 1, ±`clip`) · n / horizon (arXiv:1909.08593, 2.2).

    `observed_kl` and `target` are nats an answer; `n` answers were drawn since the last call, `horizon` counts answers
    too: so the rate does not depend on the batch. NaN goes through: a skipped step must keep the old coefficient.
    """
    error = jnp.clip(wide(jnp.asarray(observed_kl)) / target - 1.0, -clip, clip)
    return coefficient * (1.0 + error * (n / horizon))
