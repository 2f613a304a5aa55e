"""Rewards of answers: packed side by side in a batch of rankings, or each a row of its own."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.base.arrays import Float32, Int
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.reward import losses


@functools.partial(jax.jit, static_argnames=("definition",))
def rewards(
    definition: Definition, params: Params, ids: Int[jax.Array, "B S"], lengths: Int[jax.Array, "B"]
) -> Float32[jax.Array, "B C"]:
    """Scores of right-padded conversations, read at each one's last real token; whole on every device."""
    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    segments = (places < lengths[:, None]).astype(jnp.int32)
    hidden = apply(definition, params, lambda model: model(ids, segments, places)[0])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return sharding.constrain(apply(definition, params, lambda model: model.scores(last)), None, None)


def mean_rewards(
    definition: Definition, params: Params, answers: Sequence[np.ndarray], row_length: int, batch_rows: int
) -> np.ndarray:
    """float64 `[C]`: the mean over answers (token ids of whole conversations), `batch_rows` of them at a time."""
    total = np.zeros(0)
    for at in range(0, len(answers), batch_rows):
        some = answers[at : at + batch_rows]
        ids, lengths = np.zeros((batch_rows, row_length), np.int32), np.ones(batch_rows, np.int32)
        for row, answer in enumerate(some):
            ids[row, : len(answer)], lengths[row] = answer, len(answer)
        found = np.asarray(rewards(definition, params, jnp.asarray(ids), jnp.asarray(lengths)), np.float64)
        total = found[: len(some)].sum(axis=0) + (total if at else 0.0)
    return total / len(answers)


def scores_of(params: Params, rows: dict[str, jax.Array], definition: Definition) -> jax.Array:
    """float32 `[B * S, C]`: the reward at every position; those that count are an answer's last."""
    hidden = apply(definition, params, lambda m: m(rows["ids"], rows["segment_ids"], rows["positions"])[0])
    scores = apply(definition, params, lambda m: m.scores(hidden))
    return scores.reshape(-1, scores.shape[-1])


def piece_sums(
    params: Params, piece: dict[str, jax.Array], definition: Definition, centring: float
) -> losses.RankingSums:
    pair = {name: piece[name] for name in ("better", "worse", "criterion", "weight", "margin")}
    return losses.ranking_sums(scores_of(params, piece, definition), **pair, centring=centring)


ROWS = ("ids", "segment_ids", "positions")


def placed_batch(mesh: Mesh, batch: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
    """A batch of `RankingBatches` on the mesh: what is `[B, S]` divided by rows, pairs whole everywhere."""
    whole = sharding.replicated(mesh)
    put = lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index])
    divided = sharding.global_batch(mesh, {name: x for name, x in batch.items() if x.ndim == 2}, rows)
    return divided | {name: put(np.asarray(x)) for name, x in batch.items() if x.ndim < 2}
