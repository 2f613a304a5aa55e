"""Losses of reward models: sums over weighted pairs of answers, which the caller divides once, by the prompts.

A prompt's loss on a criterion is Σ_a w_a · (mean over annotation a's untied pairs) / Σ_a w_a, over annotations with at
least one. It is linear in the pairs: `pair_weights` gives each its share, 1 in all, so a device only sees a flat list.
The loss of a batch is Σ weight · loss over all of its pairs, of all criteria, divided by its prompts with signal:

    two prompts with 6 and 1 pairs, of which each weighs 1/6 and 1:   Σ weight · loss / 2,   not   Σ loss / 7
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float, Int

Pair = TypeVar("Pair", bound=Hashable)


def pair_weights(annotations: Iterable[tuple[float, Sequence[Pair]]]) -> dict[Pair, float]:
    """(weight, untied pairs) of each annotation of a prompt → each pair's weight, 1 in all.

    A pair is whatever names it; the same pair from two annotations is merged. Empty where no annotation of a weight
    above 0 has a pair: such a prompt has no signal.

    >>> pair_weights([(1.0, [("a", "b"), ("a", "c")]), (3.0, [("a", "b")]), (9.0, [])])
    {('a', 'b'): 0.875, ('a', 'c'): 0.125}
    """
    annotations = list(annotations)
    for weight, _ in annotations:
        if not 0 <= weight < math.inf:
            raise ValueError(f"an annotation weighs {weight}; a finite number of 0 or more is needed")
    counted = [(weight, pairs) for weight, pairs in annotations if weight > 0 and pairs]
    total = sum(weight for weight, _ in counted)
    weights: dict[Pair, float] = {}
    for weight, pairs in counted:
        for pair in pairs:
            weights[pair] = weights.get(pair, 0.0) + weight / total / len(pairs)
    return weights


def pair_losses(
    better: Float[Array, "*n"],
    worse: Float[Array, "*n"],
    margin: Float[Array, "*n"] | float = 0.0,
    centring: float = 0.0,
) -> Float[Array, "*n"]:
    """-log sigmoid(better - worse - margin) + centring · (better + worse)², nats a pair.

    Bradley and Terry's model as in Stiennon et al. 2020 (arXiv:2009.01325, section 3.4); the margin by how much better
    an answer is from Llama 2 (arXiv:2307.09288, equation 2). Differences say nothing of the rewards' level: centring
    holds it near 0 (Eisenstein et al. 2023, arXiv:2312.09244, equation 2).
    """
    return jax.nn.softplus(margin - (better - worse)) + centring * jnp.square(better + worse)


def ranking_losses(
    rewards: Float[Array, "P K"], ranks: Int[Array, "P K"], margin: float = 0.0, centring: float = 0.0
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """Each prompt's mean pair loss over its untied pairs (Ouyang et al. 2022, arXiv:2203.02155, equation 1), and 1.

    `ranks` are tiers, 0 the best; below 0: not ranked, or no answer. 0 and 0 for a prompt without an untied pair.
    """
    ahead, rewards = _ahead(ranks), jnp.where(ranks >= 0, rewards, 0)
    better, worse = jnp.broadcast_arrays(rewards[:, :, None], rewards[:, None, :])
    each = jnp.where(ahead, pair_losses(better, worse, margin, centring), 0)
    pairs = jnp.sum(ahead, axis=(1, 2)).astype(rewards.dtype)
    return jnp.sum(each, axis=(1, 2)) / jnp.maximum(pairs, 1), (pairs > 0).astype(rewards.dtype)


def plackett_luce(rewards: Float[Array, "P K"], ranks: Int[Array, "P K"]) -> Float[Array, "P"]:
    """-log of the chance to draw a prompt's answers in their order, each by softmax among those not yet drawn.

    Plackett 1975, "The Analysis of Permutations". `ranks` as in `ranking_losses`. Tied answers do not compete, as in
    pairs: each is drawn from itself and the tiers below, so a prompt with all answers tied gives 0.
    """
    ahead, rewards = _ahead(ranks), jnp.where(ranks >= 0, rewards, 0)
    over = jnp.where(ahead, rewards[:, None, :] - rewards[:, :, None], -jnp.inf)
    own = jnp.zeros_like(rewards)[:, :, None]
    return jnp.sum(jax.nn.logsumexp(jnp.concatenate([own, over], axis=2), axis=2), axis=1)


def _ahead(ranks: Int[Array, "P K"]) -> Array:
    """bool `[P, K, K]`: whether the first answer stands in a better tier than the second."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first >= 0) & (first < second)


class RankingSums(NamedTuple):
    """Sums over weighted pairs for each criterion, `[C]`; they add over micro-batches and hosts."""

    loss: Array
    """weight · pair loss, nats"""
    weight: Array
    """weights: the prompts with signal on this criterion, because a prompt's pairs weigh 1 in all"""
    correct: Array
    """weights of pairs whose better answer scores higher"""
    difference: Array
    """weight · (better - worse)"""
    level: Array
    """weight · (better + worse) / 2: where the rewards lie, which centring holds near 0"""


def ranking_sums(
    scores: Float[Array, "N C"],
    better: Int[Array, "R"],
    worse: Int[Array, "R"],
    criterion: Int[Array, "R"],
    weight: Float[Array, "R"],
    margin: Float[Array, "R"],
    centring: float = 0.0,
) -> RankingSums:
    """Sums over R pairs whose answers' scores stand at the positions `better` and `worse` of N.

    Pairs of weight 0 are padding: they add exactly 0 to the sums and to the gradient, whatever the scores there are.
    A score that is not finite in a pair that counts makes its criterion's sums so too.
    """
    counted = weight > 0
    # Chosen before anything is computed: 0 times the derivative of what is not finite would be NaN.
    high = jnp.where(counted, scores[better, criterion], 0)
    low = jnp.where(counted, scores[worse, criterion], 0)
    losses = pair_losses(high, low, jnp.where(counted, margin, 0), centring)
    of_criterion = criterion[:, None] == jnp.arange(scores.shape[1], dtype=criterion.dtype)[None, :]

    def total(each: Array) -> Array:
        return jnp.sum(jnp.where(of_criterion, (weight * each)[:, None], 0), axis=0)

    return RankingSums(
        loss=total(losses),
        weight=total(jnp.ones_like(weight)),
        correct=total((high > low).astype(weight.dtype)),
        difference=total(high - low),
        level=total((high + low) / 2),
    )


def batch_loss(sums: RankingSums, prompts: Float[Array, ""]) -> Float[Array, ""]:
    """The loss to descend: all criteria's sums over the *global* batch's `prompts` with signal, a number above 0.

    One divisor for all criteria, known before the step: pieces of a batch only add, and a criterion that few prompts
    are ranked by does not weigh more in the batches where these are rare.
    """
    return jnp.sum(sums.loss) / prompts
