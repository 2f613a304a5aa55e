"""Adapters in the model: their product, their gradients, their names; nothing of what is frozen is touched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters import weights
from jaxlm.base.errors import ConfigError
from jaxlm.model import layout, lora
from jaxlm.model.config import ExpertsConfig, LoRAConfig, ModelConfig, adapted
from jaxlm.model.transformer import define_model, for_inference
from jaxlm.model.weights import apply, initialize

SHAPE = ModelConfig(
    vocab_size=37,
    layers=3,
    width=16,
    heads=4,
    kv_heads=2,
    feed_forward=24,
    biases=("qkv",),
    pattern=("global", "local"),
    window=4,
    compute="float32",
).complete()
IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, 37)
# A first dense layer, two with four experts and a shared one.
MIXTURE = dataclasses.replace(
    SHAPE,
    biases=("qkv", "mlp"),
    pattern=("global",),
    experts=ExpertsConfig(count=4, chosen=2, feed_forward=8, shared=1, first_dense=1),
).complete()
KINDS = {
    "lora": (SHAPE, LoRAConfig(rank=3, alpha=7.0)),
    "dora": (SHAPE, LoRAConfig(rank=3, alpha=7.0, dora=True)),
    "stabilised": (SHAPE, LoRAConfig(rank=3, alpha=7.0, rank_stabilised=True, targets=("query", "layers/mlp/*"))),
    "experts": (MIXTURE, LoRAConfig(rank=3, alpha=7.0, dora=True)),
    "experts, up": (MIXTURE, LoRAConfig(rank=3, alpha=7.0, targets=("layers/experts/up", "value"))),
}


@functools.partial(jax.jit, static_argnums=0)
def hidden(definition, params, ids=IDS):
    ones = jnp.ones_like(ids)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return apply(definition, params, lambda m: m(ids, ones, places)[0])


@functools.partial(jax.jit, static_argnums=0)
def loss(definition, params):
    return jnp.sum(jnp.sin(hidden(definition, params)))


def moved(definition, base):
    """Adapters that are not what they begin as, B and the magnitudes among them."""
    params = weights.with_magnitudes(initialize(definition.part(lora.is_adapter), 1), base)
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
    return jax.tree_util.tree_map_with_path(noise, params)


SLOW = ("stabilised", "experts, up")


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def made(request):
    shape, config = KINDS[request.param]
    definition = define_model(adapted(shape, config))
    base = initialize(define_model(shape), 1)
    return shape, config, definition, base, moved(definition, base)


def test_adapters_begin_as_nothing_and_leave_the_base_its_numbers(made):
    shape, config, definition, base, _ = made
    every = initialize(definition, 1)
    jax.tree.map(np.testing.assert_array_equal, lora.part_of(define_model(shape), every), base)
    begun = lora.joined(every, weights.with_magnitudes(lora.part_of(definition.part(lora.is_adapter), every), base))
    plain = hidden(define_model(shape), base)
    if config.dora:  # m and |W| are the same sum, rounded by two programs
        np.testing.assert_allclose(hidden(definition, begun), plain, atol=1e-5)
    else:
        np.testing.assert_array_equal(hidden(definition, begun), plain)


def test_merged_is_unmerged(made):
    shape, config, definition, base, params = made
    both = lora.joined(base, params)
    merged = weights.merged(both, config)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(hidden(define_model(shape), merged), hidden(definition, both), atol=1e-5)
    assert np.abs(hidden(definition, both) - hidden(define_model(shape), base)).max() > 0.05


def plain_matrix(config, kernel, a, b, magnitude):
    """W' as the papers write it, its norm a constant."""
    whole = kernel + config.alpha / (config.rank**0.5 if config.rank_stabilised else config.rank) * jnp.matmul(a, b)
    if magnitude is None:
        return whole
    return whole / jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=-2, keepdims=True)) * magnitude[..., None, :]


def test_gradients_are_those_of_the_plain_formula(made):
    shape, config, definition, base, params = made

    def written_out(params, node=None):
        node = base if node is None else node
        put = {}
        for name, value in node.items():
            if isinstance(value, dict):
                put[name] = written_out(params.get(name, {}), value)
            elif f"{name}_lora_a" in params:
                parts = (params.get(f"{name}_lora_{part}") for part in ("a", "b", "magnitude"))
                put[name] = plain_matrix(config, value, *parts)
            else:
                put[name] = value
        return put

    gradients = jax.grad(lambda p: loss(definition, lora.joined(base, p)))(params)
    plain = jax.grad(lambda p: loss(define_model(shape), written_out(p)))(params)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradients, plain)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


def test_stacked_is_unrolled(made):
    shape, config, definition, base, params = made
    both = lora.joined(base, params)
    flat = dataclasses.replace(shape, scan_layers=False)
    single = define_model(adapted(flat, config))
    np.testing.assert_allclose(hidden(single, layout.unroll(both, shape)), hidden(definition, both), atol=1e-5)
    assert jax.tree.structure(layout.stack(layout.unroll(params, shape), shape)) == jax.tree.structure(params)


def test_cached_decoding_is_the_full_forward(made):
    from jaxlm.model.transformer import empty_cache

    shape, config, definition, base, params = made
    inference, single = for_inference(adapted(shape, config))
    both = layout.unroll(lora.joined(base, params), shape)
    cache, steps = empty_cache(inference, 2, 9), []
    step = jax.jit(lambda c, t, p: apply(single, both, lambda m: m(t, jnp.ones_like(p), p, c)))
    for at in range(9):
        put = jnp.full((2, 1), at, jnp.int32)
        state, cache = step(cache, IDS[:, at : at + 1], put)
        steps.append(state)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), hidden(definition, lora.joined(base, params)), atol=1e-5)


def test_dropped_inputs_are_named_by_seed_step_and_layer():
    config = LoRAConfig(rank=3, dropout=0.5)
    base = initialize(define_model(SHAPE), 1)
    definition = define_model(adapted(SHAPE, config))
    quiet = define_model(adapted(SHAPE, dataclasses.replace(config, dropout=0.0)))
    both = lora.joined(base, moved(quiet, base))

    def at(step, piece=0, seed=5, definition=definition, both=both):
        keys = weights.dropout_keys(definition, seed, jnp.int32(step), jnp.uint32(piece))
        return hidden(definition, lora.joined(both, keys))

    np.testing.assert_array_equal(at(3), at(3))
    assert all(np.abs(at(3) - other).max() > 1e-3 for other in (at(4), at(3, piece=1), at(3, seed=6)))
    flat = define_model(adapted(dataclasses.replace(SHAPE, scan_layers=False), config))
    np.testing.assert_allclose(at(3, definition=flat, both=layout.unroll(both, SHAPE)), at(3), atol=1e-5)
    # Its mean over many masks is the product without one, to first order of B.
    small = jax.tree_util.tree_map_with_path(lambda p, x: x * 1e-2 if "_lora_b" in p[-1].key else x, both)
    drawn = jax.vmap(
        lambda n: hidden(definition, lora.joined(small, weights.dropout_keys(definition, 0, n, jnp.uint32(0))))
    )
    mean = jnp.mean(drawn(jnp.arange(100)), axis=0)
    change = hidden(quiet, small) - hidden(define_model(SHAPE), base)
    got = mean - hidden(define_model(SHAPE), base)
    assert np.sum(got * change) / np.sum(change * change) == pytest.approx(1, abs=0.1)


def test_targets_that_match_nothing_are_named():
    definition = define_model(SHAPE)
    with pytest.raises(ConfigError, match=r"lora.targets: 'quary' is no matrix.*did you mean 'query'"):
        weights.require_targets(definition, LoRAConfig(targets=("up", "quary")))
    with pytest.raises(ConfigError, match=r"'embedding' is no matrix of the layers"):
        weights.require_targets(definition, LoRAConfig(targets=("embedding",)))
    mixture = define_model(MIXTURE)
    with pytest.raises(ConfigError, match=r"lora.targets: 'rout\*' names routers alone, which stay frozen"):
        weights.require_targets(mixture, LoRAConfig(targets=("query", "rout*")))
    with pytest.raises(
        ConfigError, match=r"lora.dropout: adapters of experts \(layers/experts/gate\) take none; set 0"
    ):
        define_model(adapted(MIXTURE, LoRAConfig(dropout=0.1)))
    attention_alone = LoRAConfig(dropout=0.1, targets=("layers/attention/*", "layers/experts/shared/*"))
    weights.require_targets(mixture, attention_alone)
    with pytest.raises(ConfigError, match="rank: got 0; 1 or more is needed"):
        LoRAConfig(rank=0)
    weights.require_targets(definition, LoRAConfig(targets=("layers/attention/*", "u?")))
    names = {w.name for _, w in define_model(adapted(SHAPE, LoRAConfig(targets=("value",)))) if lora.is_adapter(w)}
    assert names == {"layers/attention/value_lora_a", "layers/attention/value_lora_b"}
    experts = {
        w.name for _, w in define_model(adapted(MIXTURE, LoRAConfig())) if lora.is_adapter(w) and "exp" in w.name
    }
    matrices = ("gate", "up", "down", "shared/gate", "shared/up", "shared/down")
    assert experts == {f"layers/experts/{name}_lora_{part}" for name in matrices for part in "ab"}
    assert {w.name for _, w in define_model(adapted(MIXTURE, attention_alone)) if w.name.endswith("key")} == {
        *(f"layers/attention/{name}_lora_key" for name in ("query", "key", "value", "output")),
        *(f"layers/experts/shared/{name}_lora_key" for name in ("gate", "up", "down")),
        "layers/attention/key",
    }
