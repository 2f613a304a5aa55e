"""Losses as sums over counted units, never as means: the caller divides once, by the global batch's count."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Bool, Float32, Int
from jaxlm.base.metrics import Mean
from jaxlm.model.experts import Routing
from jaxlm.model.weights import Definition, Params, apply


class TokenSums(NamedTuple):
    """Sums over the counted targets, float32 scalars."""

    loss: Array
    """-log p(target), nats"""
    squared_normalizer: Array
    """log²(Σ exp(logits)): what z-loss keeps small (arXiv:2204.02311, section 5)"""
    correct: Array
    """targets that no other token exceeds"""
    targets: Array
    """how many were counted"""
    routing: Routing | None = None
    """what the routers of a mixture of experts did, summed over all real tokens"""
    divergence: Array | None = None
    """from a teacher's next tokens, nats (`distill/losses.py`)"""


def targets_of(ids: Int[Array, "B S"], loss_mask: Bool[Array, "B S"]) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """What position i predicts, and whether it counts: token i + 1, where `loss_mask` marks that one as a target.

    >>> targets_of([[5, 6, 7]], [[0, 1, 1]])
    [[6, 7, 5]], [[1, 1, 0]]
    """
    last = jnp.arange(ids.shape[1])[None, :] == ids.shape[1] - 1
    return jnp.roll(ids, -1, axis=1), jnp.roll(loss_mask, -1, axis=1) & ~last


def predictions_of(rows: Mapping[str, Array]) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The same of `rows`: what they themselves say of each position, under "targets", or the tokens that follow."""
    if "targets" in rows:
        return rows["targets"], rows["loss_mask"]
    return targets_of(rows["ids"], rows["loss_mask"])


def token_sums(logits: Float32[Array, "N V"], targets: Int[Array, "N"], counted: Bool[Array, "N"]) -> TokenSums:
    """Cross-entropy sums over the `counted` of N positions."""
    each = token_losses(logits, targets)
    total = lambda x: jnp.sum(jnp.where(counted, x, 0.0))
    return TokenSums(
        total(each.loss),
        total(each.normalizer * each.normalizer),
        total(each.correct.astype(jnp.float32)),
        total(jnp.float32(1)),
    )


class TokenLosses(NamedTuple):
    """Of each position, `[N]`: -log p(target) and log Σ exp(logits) in nats; whether no token exceeds the target."""

    loss: Array
    normalizer: Array
    correct: Array


def token_losses(logits: Float32[Array, "N V"], targets: Int[Array, "N"]) -> TokenLosses:
    """Cross-entropy position by position.

    The target's logit is picked by comparing with an iota: a gather's gradient would be a scatter into [N, V]. To find
    it correct, its logit is compared with the highest: an argmax costs as much as the softmax on a CPU.
    """
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    highest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    return TokenLosses(normalizer - picked, normalizer, jax.lax.stop_gradient(picked) >= highest)


def row_sums(params: Params, rows: Mapping[str, Array], definition: Definition, chunk_tokens: int = 0) -> TokenSums:
    """Loss sums over the targets of packed `rows`; the logits of `chunk_tokens` positions at a time, or of all."""
    places = rows["ids"], rows["segment_ids"], rows["positions"]
    hidden, routing = apply(definition, params, lambda m: m.routed(*places))
    targets, counted = predictions_of(rows)
    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), counted.reshape(-1)

    def sums(flat: Any) -> TokenSums:
        return token_sums(apply(definition, params, lambda m: m.logits(flat[0])), flat[1], flat[2])

    return in_chunks(sums, flat, chunk_tokens)._replace(routing=routing)


def in_chunks(sums: Callable[[Any], TokenSums], flat: Any, chunk_tokens: int) -> TokenSums:
    """The sum of `sums` over arrays of N positions, `chunk_tokens` at a time, made anew for the gradient; or of all."""
    tokens = jax.tree.leaves(flat)[0].shape[0]
    if not chunk_tokens or tokens <= chunk_tokens:
        return sums(flat)
    # Chunk c takes tokens c, c + C, …, so that each is spread over the devices as the batch is.
    chunks = jax.tree.map(lambda x: x.reshape(chunk_tokens, -1, *x.shape[1:]).swapaxes(0, 1), flat)
    return jax.tree.map(jnp.sum, jax.lax.map(jax.checkpoint(sums), chunks))


def as_metrics(sums: TokenSums) -> dict[str, Mean]:
    return {
        "train/loss": Mean(sums.loss, sums.targets),
        "train/z_loss": Mean(sums.squared_normalizer, sums.targets),
        "train/accuracy": Mean(sums.correct, sums.targets),
    }
