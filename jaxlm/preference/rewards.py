"""Rewards of answers: packed side by side in a batch of rankings, or each a row of its own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.base.arrays import Float32, Int
from jaxlm.base.errors import ConfigError, JaxlmError
from jaxlm.base.metrics import Mean
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params, apply, initialize
from jaxlm.reward import losses
from jaxlm.reward.config import RewardConfig
from jaxlm.train import model_directory
from jaxlm.train.model_directory import ModelDirectory


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


def centred(
    params: Params, config: RewardConfig, definition: Definition, answers: Sequence[np.ndarray]
) -> tuple[Params, list[float]]:
    """Parameters whose mean reward over the reference answers is 0, by their bias; and what it was before."""
    before = mean_rewards(definition, params, answers, config.row_length, config.batch_rows)
    bias = params["score_bias"]
    moved = jax.device_put(np.asarray(bias) - before.astype(np.float32), bias.sharding)
    return params | {"score_bias": moved}, before.tolist()


def require_centred(config: RewardConfig, definition: Definition, answers: Sequence[np.ndarray], mesh: Mesh) -> None:
    """Reads the model back and measures; Raises JaxlmError where the mean is not 0."""
    stored = model_directory.read(f"{config.workdir}/model")
    with jax.set_mesh(mesh):
        params = stored.load_params(definition, definition.shardings(mesh))
        mean = mean_rewards(definition, params, answers, config.row_length, config.batch_rows)
    # The hidden states are computed in the compute type, alike before and after; the bias is added in float32.
    if np.abs(mean).max() > 1e-3:
        raise JaxlmError(f"{stored.folder}: the mean reward of the reference answers is {mean}, not 0, after reading")


def as_metrics(sums: losses.RankingSums, prompts: jax.Array) -> dict[str, Mean]:
    weight = jnp.sum(sums.weight)
    return {
        "reward/loss": Mean(jnp.sum(sums.loss), prompts),
        "reward/accuracy": Mean(jnp.sum(sums.correct), weight),
        "reward/difference": Mean(jnp.sum(sums.difference), weight),
        "reward/level": Mean(jnp.sum(sums.level), weight),
    }


def first_params(config: RewardConfig, model: ModelDirectory, definition: Definition, placed: Any) -> Params:
    """The model's own weights with new heads; all of a reward model's of the same criteria."""
    if model.config.criteria:
        return model.load_params(definition, placed)
    shape = dataclasses.replace(model.config, scan_layers=_stacks(definition))
    trunk = model.load_params(define_model(shape))
    heads = jax.jit(lambda: {n: p for n, p in initialize(definition, config.seed).items() if n.startswith("score")})()
    return jax.device_put({n: p for n, p in trunk.items() if n != "head"} | heads, placed)


def _stacks(definition: Definition) -> bool:
    return all(path[0] != "layers" for path, _ in definition)


def reward_shape(config: RewardConfig, model: ModelDirectory) -> Any:
    if model.config.criteria not in ((), config.criteria):
        raise ConfigError("criteria", f"the model scores {model.config.criteria}; take these, or a language model")
    return dataclasses.replace(model.config, criteria=config.criteria)
