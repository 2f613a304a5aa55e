"""Divergences between a teacher's and a student's next token, as sums over counted positions (`train/losses.py`).

forward KL                 KL(p, q) = Σ p (log p - log q)             p: the teacher's, q: the student's
reverse KL                 KL(q, p)
generalised Jensen-Shannon β KL(p, m) + (1 - β) KL(q, m), m = β p + (1 - β) q       (arXiv:2306.13649, equation 1)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float32, Int
from jaxlm.distill.config import DistillConfig
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.train import losses
from jaxlm.train.losses import TokenSums


def divergence(
    teacher: Float32[Array, "N C"], student: Float32[Array, "N C"], config: DistillConfig
) -> Float32[Array, "N"]:
    """Nats of each position, from log-probabilities over the same C classes.

    >>> divergence(log([[.5, .5]]), log([[.75, .25]]), DistillConfig(teacher="x"))
    [.1438410]
    """
    if config.divergence == "forward_kl":
        return _kl(teacher, student)
    if config.divergence == "reverse_kl":
        return _kl(student, teacher)
    share = config.beta
    mixture = jnp.logaddexp(teacher + jnp.log(share), student + jnp.log1p(-share))
    return share * _kl(teacher, mixture) + (1 - share) * _kl(student, mixture)


def _kl(p: Float32[Array, "N C"], q: Float32[Array, "N C"]) -> Float32[Array, "N"]:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def truncated(logits: Float32[Array, "N V"], k: int) -> tuple[Int[Array, "N k"], Float32[Array, "N k+1"]]:
    """The k likeliest tokens, and log-probabilities of each and, last, of all others together."""
    _, ids = jax.lax.top_k(logits, k)
    return ids, gathered(logits, ids)


def gathered(logits: Float32[Array, "N V"], ids: Int[Array, "N k"]) -> Float32[Array, "N k+1"]:
    """Log-probabilities of these tokens and, last, of all others together.

    The others' are summed and not taken from 1: where the k have all but 1e-8, that would be a difference of rounding.
    """
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    rows = jnp.arange(logits.shape[0])[:, None]
    among = jnp.zeros(logits.shape, jnp.bool_).at[rows, ids].set(True)
    others = jax.nn.logsumexp(jnp.where(among, -jnp.inf, logits), axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, ids, axis=1), others], axis=-1) - normalizer


def live_sums(
    params: Params,
    rows: Mapping[str, Array],
    teacher: Params,
    *,
    config: DistillConfig,
    definition: Definition,
    teacher_definition: Definition,
    chunk_tokens: int,
) -> TokenSums:
    """Sums over the targets of packed `rows`, the divergence to a teacher that reads them too.

    The logits of both are made for `chunk_tokens` positions at a time (and once more for the gradient), or for all.
    """
    teacher_hidden = jax.lax.stop_gradient(apply(teacher_definition, teacher, lambda m: m(*_places(rows))[0]))

    def between(hidden: Array, logits: Array) -> Array:
        given = apply(teacher_definition, teacher, lambda m: m.logits(hidden)) / config.temperature
        given, logits = jax.lax.stop_gradient(given), logits / config.temperature
        if config.top_k:
            ids, logprobs = truncated(given, config.top_k)
            return divergence(logprobs, gathered(logits, ids), config)
        return divergence(jax.nn.log_softmax(given), jax.nn.log_softmax(logits), config)

    return _sums(params, rows, definition, chunk_tokens, between, teacher_hidden)


def stored_sums(
    params: Params, rows: Mapping[str, Array], *, config: DistillConfig, definition: Definition, chunk_tokens: int
) -> TokenSums:
    """The same against what was stored of a teacher: `teacher_ids` [B, S, k], `teacher_logprobs` [B, S, k + 1]."""

    def between(stored: tuple[Array, Array], logits: Array) -> Array:
        return divergence(stored[1], gathered(logits / config.temperature, stored[0]), config)

    stored = rows["teacher_ids"], rows["teacher_logprobs"]
    return _sums(params, rows, definition, chunk_tokens, between, stored)


def _places(rows: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    return rows["ids"], rows["segment_ids"], rows["positions"]


def _sums(
    params: Params,
    rows: Mapping[str, Array],
    definition: Definition,
    chunk_tokens: int,
    between: Callable[[Any, Array], Array],
    given: Any,
) -> TokenSums:
    """`between`: (a chunk of what is `given` [B, S, …], the student's logits there) → divergence of each position."""
    hidden, routing = apply(definition, params, lambda m: m.routed(*_places(rows)))
    targets, counted = losses.targets_of(rows["ids"], rows["loss_mask"])
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (hidden, targets, counted, given))

    def sums(flat: Any) -> TokenSums:
        hidden, targets, counted, given = flat
        logits = apply(definition, params, lambda m: m.logits(hidden))
        far = jnp.sum(jnp.where(counted, between(given, logits), 0.0))
        return losses.token_sums(logits, targets, counted)._replace(divergence=far)

    return losses.in_chunks(sums, flat, chunk_tokens)._replace(routing=routing)
