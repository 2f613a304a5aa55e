"""Muon beside optax's own, and what it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.muon import orthogonalized

MODEL = ModelConfig(vocab_size=32, layers=2, width=16, heads=2, compute="float32").complete()


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_in_float32_it_is_optax_own(scan):
    definition = define_model(dataclasses.replace(MODEL, scan_layers=scan))
    params = initialize(definition, 0)
    ours = optimizers.make_optimizer(OptimizerConfig(kind="muon", weight_decay=0.0), definition)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    theirs = optax.contrib.muon(
        learning_rate=1.0,
        beta=0.95,
        consistent_rms=0.2,
        adam_b1=0.9,
        adam_b2=0.95,
        eps=1e-8,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=definition.tree(lambda w: numbers if w.matrix else None),
    )
    states = [optimizers.init(each, params) for each in (ours, theirs)]
    for seed in range(3):
        gradients = random_like(params, seed)
        found = [
            optimizers.direction(each, gradients, state, params)
            for each, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in found]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[0][0], found[1][0])


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 16, 24)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_all_directions_come_out_alike(shape, compute):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    found = orthogonalized(x, compute)
    assert found.dtype == jnp.float32
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    exact = orthogonalized(x, "float32")
    cosine = float(jnp.sum(found * exact) / jnp.sqrt(jnp.sum(found**2) * jnp.sum(exact**2)))
    assert cosine > (1 - 1e-6 if compute == "float32" else 0.999)


def test_nothing_stays_nothing():
    assert not np.any(orthogonalized(jnp.zeros((4, 8)), "bfloat16"))
