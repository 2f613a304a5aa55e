"""What a model says of a batch of preferences: log-probabilities of whole answers, and from them sums of losses."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxlm.base import sharding
from jaxlm.base.arrays import Array, Bool, Float32
from jaxlm.base.metrics import Mean
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.preference import losses
from jaxlm.preference.config import PreferenceConfig
from jaxlm.train.losses import targets_of, token_losses

Made = TypeVar("Made")


def answer_logprobs(
    params: Params, rows: Mapping[str, Array], definition: Definition, chunk_tokens: int = 0
) -> Float32[Array, "N"]:
    """At every position of rows `[B, S]`, N = B · S: the log-probability of its answer's tokens up to there, nats.

    So an answer's whole one stands at its last token, where a reward would. `rows`: ids, segment_ids, positions and
    loss_mask. Makes the logits of `chunk_tokens` positions at a time, or of all.
    """
    hidden = apply(definition, params, lambda m: m(rows["ids"], rows["segment_ids"], rows["positions"])[0])
    targets, counted = targets_of(rows["ids"], rows["loss_mask"])
    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def each(part: tuple[Array, Array]) -> Array:
        return -token_losses(apply(definition, params, lambda m: m.logits(part[0])), part[1]).loss

    if not chunk_tokens or targets.size <= chunk_tokens:
        logprobs = each(flat)
    else:
        # Chunk c takes tokens c, c + C, …, so that each is spread over the devices as the batch is.
        chunks = jax.tree.map(lambda x: x.reshape(chunk_tokens, -1, *x.shape[1:]).swapaxes(0, 1), flat)
        logprobs = jax.lax.map(jax.checkpoint(each), chunks).swapaxes(0, 1).reshape(-1)
    of_next = jnp.where(counted, logprobs.reshape(targets.shape), 0.0)
    return running_sums(jnp.roll(of_next, 1, axis=1), rows["positions"] == 0).reshape(-1)


def running_sums(values: Float32[Array, "B S"], first: Bool[Array, "B S"]) -> Float32[Array, "B S"]:
    """Sums along the rows, begun anew wherever `first` says. No difference of two long sums, which would lose digits.

    >>> running_sums([[1, 2, 3, 4]], [[1, 0, 1, 0]])
    [[1, 3, 3, 7]]
    """
    values = sharding.constrain(values, "batch", None)

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(add, (first, values), axis=1)[1]


class PreferenceSums(NamedTuple):
    """Sums over a batch's weighted pairs, scalars; they add over micro-batches and hosts."""

    loss: Array
    weight: Array
    """weights: the prompts, because a prompt's pairs weigh 1 in all"""
    correct: Array
    """weights of pairs whose chosen answer has the higher implicit reward"""
    chosen_reward: Array
    rejected_reward: Array
    chosen_logprob: Array
    """of whole answers"""
    rejected_logprob: Array


def pair_losses(
    config: PreferenceConfig, logprobs: Float32[Array, "N"], pairs: Mapping[str, Array], kl: Float32[Array, ""]
) -> losses.PairLosses:
    """Of R pairs that point into `logprobs`; 0 for padding."""
    counted = pairs["weight"] > 0

    def side(name: str) -> losses.Answers:
        given = pairs.get(f"{name}_reference", jnp.zeros_like(pairs["weight"]))
        # Chosen before anything is computed: 0 times the derivative of what is not finite would be NaN.
        return losses.Answers(
            logprobs=jnp.where(counted, logprobs[pairs[name]], 0),
            tokens=jnp.where(counted, pairs[f"{name}_tokens"], 1).astype(jnp.float32),
            reference=jnp.where(counted, given, 0),
        )

    return losses.losses(config.method, side("better"), side("worse"), kl)


def piece_sums(
    config: PreferenceConfig, params: Params, piece: Mapping[str, Array], definition: Definition, kl: Array
) -> PreferenceSums:
    """Sums over the pairs of a piece of a batch; `kl`: the `reference_point` of the whole batch."""
    logprobs = answer_logprobs(params, piece, definition, config.loss_chunk_tokens)
    return weighted_sums(pair_losses(config, logprobs, piece, kl), logprobs, piece)


def weighted_sums(made: losses.PairLosses, logprobs: Float32[Array, "N"], pairs: Mapping[str, Array]) -> PreferenceSums:
    weight = pairs["weight"]
    counted = weight > 0
    total = lambda each: jnp.sum(jnp.where(counted, weight * each, 0))
    known = jax.lax.stop_gradient(logprobs)
    return PreferenceSums(
        loss=total(made.loss),
        weight=total(jnp.ones_like(weight)),
        correct=total((made.chosen > made.rejected).astype(weight.dtype)),
        chosen_reward=total(made.chosen),
        rejected_reward=total(made.rejected),
        chosen_logprob=total(known[pairs["better"]]),
        rejected_logprob=total(known[pairs["worse"]]),
    )


def as_metrics(sums: PreferenceSums, prompts: Array) -> dict[str, Mean]:
    means = {
        "accuracy": sums.correct,
        "margin": sums.chosen_reward - sums.rejected_reward,
        "chosen_reward": sums.chosen_reward,
        "rejected_reward": sums.rejected_reward,
        "chosen_logprob": sums.chosen_logprob,
        "rejected_logprob": sums.rejected_logprob,
    }
    named = {f"preference/{name}": Mean(total, sums.weight) for name, total in means.items()}
    return {"preference/loss": Mean(sums.loss, prompts)} | named


def reference_point(
    config: PreferenceConfig, params: Params, batch: Mapping[str, Array], definition: Definition, pieces: int
) -> Float32[Array, ""]:
    """KTO's z of the global batch before it is cut at 0: the mean log-ratio of answers to other prompts.

    Weighed as the losses are: a pair counts by its weight, half of it each answer. Before all gradients, and over all
    `pieces`, so that they share one. 0 for other methods.
    """
    if config.kto is None:
        return jnp.float32(0)

    def drift(piece: Mapping[str, Array]) -> Array:
        rows = {**piece, "ids": piece["other_ids"], "loss_mask": piece["other_mask"]}
        logprobs = answer_logprobs(params, rows, definition, config.loss_chunk_tokens)
        off = lambda side: logprobs[piece[side]] - piece[f"{side}_other"]
        return jnp.sum(jnp.where(piece["weight"] > 0, piece["weight"] * (off("better") + off("worse")) / 2, 0))

    total = sum_in_pieces(drift, batch, pieces)
    return jax.lax.stop_gradient(total / jnp.maximum(jnp.sum(batch["weight"]), 1))


def sum_in_pieces(make: Callable[[Any], Array], batch: Any, pieces: int) -> Array:
    """Σ make(piece), one piece after the other, cut as `train/update.gradients_in_pieces` does."""
    if pieces == 1:
        return make(batch)
    each = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    return jnp.sum(jax.lax.map(make, each))
