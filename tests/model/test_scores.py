"""Scalar heads in place of the output head: what a reward model is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.model import layout
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import apply, define_model, for_inference
from jaxlm.model.weights import initialize
from jaxlm.plan.flops import flops_per_token
from jaxlm.train import optimizer
from jaxlm.train.config import OptimizerConfig

BASE = ModelConfig(vocab_size=50, layers=3, width=32, heads=4, feed_forward=48, compute="float32").complete()
REWARD = dataclasses.replace(BASE, criteria=("overall", "truthful", "harmless"))


def scored(config, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    hidden = lambda m: m(ids, jnp.ones_like(ids), positions)[0]
    return apply(define_model(config), params, lambda m: m.scores(hidden(m)))


def tokens(batch, length):
    return jax.random.randint(jax.random.key(0), (batch, length), 0, 50, jnp.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_models_weights_are_a_reward_models_all_but_the_head(tied):
    base = dataclasses.replace(BASE, tied_embeddings=tied)
    reward = dataclasses.replace(REWARD, tied_embeddings=tied)
    trunk, whole = initialize(define_model(base), 0), initialize(define_model(reward), 0)
    trunk.pop("head", None)
    heads = {name: whole.pop(name) for name in ("score", "score_bias")}
    jax.tree.map(np.testing.assert_array_equal, trunk, whole)
    assert {name: x.shape for name, x in heads.items()} == {"score": (32, 3), "score_bias": (3,)}


def test_the_heads_begin_as_in_the_literature():
    wide = dataclasses.replace(REWARD, layers=1, width=1024)
    params = initialize(define_model(wide), 0)
    assert float(jnp.std(params["score"])) == pytest.approx(1025**-0.5, rel=0.05)
    np.testing.assert_array_equal(params["score_bias"], 0)
    # The hidden state leaves a norm with a mean square of 1, so a score has a variance of about 1.
    assert 0.2 < float(jnp.std(scored(wide, params, tokens(8, 16)))) < 2


def test_scores_are_a_product_in_float32():
    params = initialize(define_model(REWARD), 1) | {"score_bias": jnp.array([1.0, -2.0, 0.5])}
    for compute in ("float32", "bfloat16"):
        config = dataclasses.replace(REWARD, compute=compute)
        hidden = jax.random.normal(jax.random.key(2), (2, 5, 32)).astype(compute)
        got = apply(define_model(config), params, lambda m, hidden=hidden: m.scores(hidden))
        assert (got.shape, got.dtype) == ((2, 5, 3), jnp.float32)
        wide = np.asarray(hidden.astype(jnp.float32), np.float64)
        expected = wide @ np.asarray(params["score"], np.float64) + np.asarray(params["score_bias"])
        np.testing.assert_allclose(got, expected, atol=1e-6)
        one = apply(define_model(config), params, lambda m, hidden=hidden: m.scores(hidden[1, 2]))
        np.testing.assert_allclose(one, got[1, 2], atol=1e-6)


@pytest.mark.slow
def test_unrolled_equals_scanned():
    params = initialize(define_model(REWARD), 1)
    unrolled = dataclasses.replace(REWARD, scan_layers=False)
    other = layout.unroll(params, REWARD)
    jax.tree.map(np.testing.assert_array_equal, other, initialize(define_model(unrolled), 1))
    jax.tree.map(np.testing.assert_array_equal, layout.stack(other, REWARD), params)
    ids = tokens(2, 7)
    np.testing.assert_allclose(scored(REWARD, params, ids), scored(unrolled, other, ids), atol=1e-5)


def test_heads_are_no_matrices_to_muon_and_do_not_decay():
    declared = {path[-1]: weight for path, weight in define_model(REWARD) if path[0].startswith("score")}
    assert {name: weight.axes for name, weight in declared.items()} == {
        "score": ("embed", "criteria"),
        "score_bias": ("criteria",),
    }
    for weight in declared.values():
        assert optimizer.rule(weight, OptimizerConfig(kind="muon")) == "adamw"
        assert not optimizer.decays(weight)


def test_heads_stay_in_float32_for_inference_and_lie_on_a_mesh():
    config, definition = for_inference(dataclasses.replace(REWARD, compute="bfloat16"))
    assert config.criteria == REWARD.criteria
    assert {path[0]: w.dtype.name for path, w in definition if path[0] in ("score", "embedding")} == {
        "score": "float32",
        "embedding": "bfloat16",
    }
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = define_model(REWARD).shardings(mesh)
    assert placed["score"].shard_shape((32, 3)) == (8, 3)
    assert placed["score_bias"].is_fully_replicated


def test_a_head_costs_as_many_products_as_it_has_scores():
    assert flops_per_token(BASE, 16) - flops_per_token(REWARD, 16) == 6 * 32 * (50 - 3)


def test_the_wrong_head_is_refused():
    for config, wrong, message in ((REWARD, "logits", "has no logits"), (BASE, "scores", "has no scores")):
        params = initialize(define_model(config), 0)
        with pytest.raises(ValueError, match=message):
            apply(define_model(config), params, lambda m, wrong=wrong: getattr(m, wrong)(jnp.zeros((1, 32))))


@pytest.mark.parametrize("criteria", [("overall", "overall"), ("overall", "")])
def test_criteria_are_names_each_once(criteria):
    with pytest.raises(ConfigError, match="criteria: got"):
        dataclasses.replace(BASE, criteria=criteria)
