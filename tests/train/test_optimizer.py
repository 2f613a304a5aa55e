"""Each optimizer through the same tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.state import convert_layout

KINDS = ["adamw", "muon", "soap", "lion", "adafactor", "sgd"]
# The others compile for longer.
SOME = [kind if kind in ("adamw", "muon") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
MODEL = ModelConfig(
    vocab_size=40, layers=5, width=16, heads=2, kv_heads=1, pattern=("local", "global"), window=3, compute="float32"
).complete()


def gradients_of(params, seed):
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return jax.tree.unflatten(tree, [jax.random.normal(k, p.shape) for k, p in zip(keys, flat, strict=True)])


def updates(definition, params, gradients, kind, steps=2, **fields):
    return updates_and_state(definition, params, gradients, kind, steps, **fields)[0]


def updates_and_state(definition, params, gradients, kind, steps=2, **fields):
    optimizer = optimizers.make_optimizer(OptimizerConfig(kind=kind, **fields), definition)
    state = optimizers.init(optimizer, params)
    direction = None
    for _ in range(steps):
        direction, state = jax.jit(lambda g, s, p: optimizers.direction(optimizer, g, s, p))(gradients, state, params)
    return direction, state


def test_the_table_names_every_weight_and_unrolled_layers_together():
    definition = define_model(dataclasses.replace(MODEL, scan_layers=False))
    rows = {name: (shape, rule) for name, shape, rule in optimizers.table(definition, OptimizerConfig(kind="muon"))}
    assert set(rows) == {"/".join("*" if part.isdigit() else part for part in path) for path, _ in definition}
    assert rows["layers/*/mlp/up"] == (f"5 of 16 x {MODEL.feed_forward}", "muon, decay 0.1")
    assert rows["final_norm/scale"] == ("16", "adamw")


@pytest.mark.parametrize("kind", SOME)
def test_stacked_layers_are_updated_as_single_ones(kind):
    unrolled = define_model(dataclasses.replace(MODEL, scan_layers=False))
    params = initialize(define_model(MODEL), 0)
    gradients = gradients_of(params, 1)
    stacked, state = updates_and_state(define_model(MODEL), params, gradients, kind, steps=3)
    apart = [convert_layout(tree, MODEL, False) for tree in (params, gradients)]
    single, single_state = updates_and_state(unrolled, *apart, kind, steps=3)
    for a, b in zip(jax.tree.leaves(convert_layout(stacked, MODEL, False)), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    # What is kept for the layers is what each would keep: a checkpoint of the one layout is one of the other.
    converted = convert_layout(state, MODEL, False)
    assert jax.tree.structure(converted) == jax.tree.structure(single_state)
    assert [x.shape for x in jax.tree.leaves(converted)] == [x.shape for x in jax.tree.leaves(single_state)]
    back = jax.tree.map(np.testing.assert_array_equal, convert_layout(converted, MODEL, True), state)
    assert jax.tree.structure(back) == jax.tree.structure(jax.tree.map(lambda _: None, state))


@pytest.mark.parametrize("kind", SOME)
def test_norms_do_not_decay_and_matrices_do(kind):
    definition = define_model(MODEL)
    params = initialize(definition, 0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    direction = updates(definition, params, nothing, kind, steps=1)
    for (path, declared), leaf, value in zip(
        definition, jax.tree.leaves(direction), jax.tree.leaves(params), strict=True
    ):
        expected = -0.1 * value if optimizers.decays(declared) else jnp.zeros_like(value)
        np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg="/".join(path))


def test_muon_takes_every_inner_matrix_and_nothing_else():
    definition = define_model(MODEL)
    rules = {path: optimizers.rule(declared, OptimizerConfig(kind="muon")) for path, declared in definition}
    muon = {path[-1] for path, kind in rules.items() if kind == "muon"}
    assert muon == {"query", "key", "value", "output", "gate", "up", "down"}
    # Orthogonal: the singular values of an update are near one another, whatever the gradient's are.
    params = initialize(definition, 0)
    direction = updates(definition, params, gradients_of(params, 3), "muon", steps=1)
    decayed = direction["stack"]["0"]["mlp"]["up"] + 0.1 * params["stack"]["0"]["mlp"]["up"]
    singular = jnp.linalg.svd(decayed, compute_uv=False)
    assert singular.shape[0] == 2
    assert float((singular.max(axis=1) / singular.min(axis=1)).max()) < 2.0


def test_adamw_first_step_by_hand():
    # After one step Adam's direction is -sign(g) (bias correction cancels), and decay adds -0.1 p.
    definition = define_model(MODEL)
    params = initialize(definition, 0)
    gradients = gradients_of(params, 2)
    direction = updates(definition, params, gradients, "adamw", steps=1)
    expected = -jnp.sign(gradients["embedding"]) - 0.1 * params["embedding"]
    np.testing.assert_allclose(direction["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("kind", SOME)
def test_the_embedding_has_a_rate_of_its_own_and_the_common_decay(kind):
    definition = define_model(MODEL)
    params = initialize(definition, 0)
    gradients = gradients_of(params, 2)
    common = updates(definition, params, gradients, kind)
    faster = updates(definition, params, gradients, kind, embedding_rate=8.0)
    decay = 0.1 * params["embedding"]
    np.testing.assert_allclose(faster["embedding"] + decay, 8 * (common["embedding"] + decay), atol=1e-5)
    for name in set(params) - {"embedding"}:
        jax.tree.map(np.testing.assert_array_equal, faster[name], common[name])


def test_a_tied_embedding_has_no_rate_of_its_own():
    tied = define_model(dataclasses.replace(MODEL, tied_embeddings=True))
    with pytest.raises(ConfigError, match="embedding_rate"):
        optimizers.make_optimizer(OptimizerConfig(embedding_rate=2.0), tied)


def test_clip_scales_to_the_limit_and_leaves_small_gradients_alone():
    tree = {"a": jnp.array([3.0, 4.0])}
    norm = optimizers.global_norm(tree)
    assert float(norm) == 5.0
    np.testing.assert_allclose(optimizers.clip(tree, norm, 1.0)["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(optimizers.clip(tree, norm, 10.0)["a"], tree["a"])
    np.testing.assert_array_equal(optimizers.clip(tree, norm, 0.0)["a"], tree["a"])
