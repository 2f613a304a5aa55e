"""What a loaded model computes of rows of ids, compiled: logits, a reward model's scores, an encoder's vectors."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.base.arrays import Array, Float32, Int
from jaxlm.base.sharding import constrain
from jaxlm.hub.pooling import Pooling
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.sample.sampler import bucket

# Rows that go through the model together.
SCORE_ROWS = 16


def scoring_windows(tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first token to score) so that tokens 1, 2, … are scored once each; the first has nothing before it.

    >>> list(scoring_windows(10, 4))
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    begin, first = 0, 1
    while first < tokens:
        end = min(begin + context, tokens)
        yield begin, end, first
        begin, first = begin + max(1, context // 2), end


def padded(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, segments, positions), each int32 `[SCORE_ROWS, S]`: padded on the right, S a power of two."""
    S = bucket(max(len(row) for row in rows), 16)
    ids, segments = np.zeros((SCORE_ROWS, S), np.int32), np.zeros((SCORE_ROWS, S), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], segments[number, : len(row)] = row, 1
    return ids, segments, np.broadcast_to(np.arange(S, dtype=np.int32), ids.shape)


@functools.partial(jax.jit, static_argnames=("definition",))
def logits(definition: Definition, params: Params, ids: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)

    def run(model):
        return model.logits(model(ids, segments, positions)[0])

    return apply(definition, params, run)


@functools.partial(jax.jit, static_argnames=("definition",))
def last_scores(
    definition: Definition,
    params: Params,
    ids: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
) -> Float32[Array, "B C"]:
    """A reward model's scores after each row's last token of segment 1."""
    hidden = apply(definition, params, lambda model: model(ids, segments, positions)[0])
    ends = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
    last = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
    return constrain(apply(definition, params, lambda model: model.scores(last)), None, None)


@functools.partial(jax.jit, static_argnames=("definition", "pooling"))
def embeddings(
    definition: Definition,
    params: Params,
    ids: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    *,
    pooling: Pooling,
) -> Float32[Array, "B D"]:
    """One vector of each row's last hidden states, those of segment 1: their mean, the first one, or what the model's
    pooler makes of it."""
    hidden = apply(definition, params, lambda model: model(ids, segments, positions)[0])
    if pooling == "pooler":
        pooled = apply(definition, params, lambda model: model.pooled(hidden)).astype(jnp.float32)
    elif pooling == "first":
        pooled = hidden[:, 0].astype(jnp.float32)
    else:
        inside = segments[:, :, None].astype(jnp.float32)
        pooled = jnp.sum(hidden.astype(jnp.float32) * inside, axis=1) / jnp.maximum(jnp.sum(inside, axis=1), 1)
    return constrain(pooled, None, None)
