"""Log-probabilities of texts that are given: the learner's own forward pass, token by token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Int
from jaxlm.base.sharding import constrain
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.train.losses import token_losses

# Positions whose logits are made at a time: 128 MB of float32 at a vocabulary of 8192.
CHUNK_TOKENS = 4096


class TokenScores(NamedTuple):
    """Of each token given those before it in its segment; the first token of a segment has no such score: 0, False."""

    logprobs: Array
    """float32 `[B, S]`, nats"""
    correct: Array
    """bool `[B, S]`: it is the most likely one"""


@functools.partial(jax.jit, static_argnames=("definition",))
def token_scores(
    definition: Definition,
    params: Params,
    ids: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
) -> TokenScores:
    """Scores of packed or right-padded rows (segment 0 is padding). Compiles once for each [B, S]."""
    B, S = ids.shape
    hidden = apply(definition, params, lambda model: model(ids, segments, positions)[0])
    targets = jnp.roll(ids, -1, axis=1)
    length = max(1, min(S, CHUNK_TOKENS // B))

    def chunk(first: int) -> TokenScores:
        part = hidden[:, first : first + length]
        flat = part.reshape(-1, part.shape[-1])
        logits = apply(definition, params, lambda model: model.logits(flat))
        each = token_losses(logits, targets[:, first : first + length].reshape(-1))
        return TokenScores(-each.loss.reshape(B, -1), each.correct.reshape(B, -1))

    chunks = [chunk(first) for first in range(0, S, length)]
    joined = jax.tree.map(lambda *parts: jnp.roll(jnp.concatenate(parts, axis=1), 1, axis=1), *chunks)
    scored = (positions > 0) & (segments > 0)
    return TokenScores(
        constrain(jnp.where(scored, joined.logprobs, 0.0), None, None), constrain(joined.correct & scored, None, None)
    )
