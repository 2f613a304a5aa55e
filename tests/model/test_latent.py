"""Latent attention: what is cached, adapters on its matrices, other meshes, optimizer rules, what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters.weights import merged
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.model import layout, lora
from jaxlm.model.config import ExpertsConfig, LatentConfig, LoRAConfig, ModelConfig, adapted
from jaxlm.model.transformer import define_model, empty_cache, for_inference
from jaxlm.model.weights import apply, initialize
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig

CONFIG = ModelConfig(
    vocab_size=48,
    layers=3,
    width=16,
    heads=4,
    head_size=10,
    rope_size=4,
    rope_interleaved=True,
    latent=LatentConfig(kv_rank=8, query_rank=12, value_size=6),
    experts=ExpertsConfig(count=8, chosen=3, feed_forward=8, shared=1, first_dense=1, groups=4, chosen_groups=2),
    compute="float32",
).complete()
IDS = jax.random.randint(jax.random.key(0), (8, 8), 0, 48)
ONES = jnp.ones_like(IDS)
PLACES = jnp.broadcast_to(jnp.arange(8), IDS.shape)


@functools.partial(jax.jit, static_argnums=0)
def hidden(definition, params):
    return apply(definition, params, lambda m: m(IDS, ONES, PLACES)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def cached(config, definition, params):
    read = lambda m, part, cache: m(IDS[:, part], ONES[:, part], PLACES[:, part], cache)

    def run(m):
        first, cache = read(m, slice(0, 5), empty_cache(config, 8, 8))
        second, _ = read(m, slice(5, 8), cache)
        return jnp.concatenate([first, second], axis=1)

    return apply(definition, params, run)


def test_a_token_costs_the_cache_its_latent_and_one_key():
    cache = jax.eval_shape(lambda: empty_cache(CONFIG, 2, 5))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(cache.layers)) == 3 * 2 * 5 * (8 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_all_matrices_cached_and_merged(dora):
    config = LoRAConfig(rank=3, alpha=7.0, dora=dora)
    whole = define_model(adapted(CONFIG, config))
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
    params = jax.tree_util.tree_map_with_path(noise, initialize(whole, 1))
    names = {w.name.split("/")[-1] for _, w in whole if lora.is_adapter(w) and "attention" in w.name}
    targets = ("query_latent", "query_up", "latent", "shared_key", "key", "value", "output")
    assert {f"{name}_lora_a" for name in targets} <= names
    expected = hidden(whole, params)
    inference, definition = for_inference(adapted(CONFIG, config))
    np.testing.assert_allclose(cached(inference, definition, layout.unroll(params, CONFIG)), expected, atol=2e-5)
    np.testing.assert_allclose(hidden(define_model(CONFIG), merged(params, config)), expected, atol=2e-5)


@pytest.mark.parametrize("base", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_quantised_base_cached_beside_adapters_elsewhere(base):
    """Keys and values are made of the latents by matrices that no adapter lies beside."""
    shape = adapted(CONFIG, LoRAConfig(rank=3, targets=("output",), base=base))
    begun = initialize(define_model(shape), 1)
    codes = lambda path, x: jax.random.bits(jax.random.key(len(str(path))), x.shape, jnp.uint8).astype(x.dtype)
    fill = lambda path, x: codes(path, x) if x.dtype.itemsize == 1 else x * (0.002 if "_scale" in str(path) else 1)
    params = jax.tree_util.tree_map_with_path(fill, begun)
    inference, definition = for_inference(shape)
    expected = hidden(define_model(shape), params)
    np.testing.assert_allclose(cached(inference, definition, layout.unroll(params, CONFIG)), expected, atol=2e-5)


@pytest.mark.parametrize(
    "axes",
    [
        *(pytest.param(axes, marks=pytest.mark.slow) for axes in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2})),
        {"expert": 2, "tensor": 4},
    ],
    ids=str,
)
def test_eight_devices_equal_one(axes):
    definition = define_model(CONFIG)
    params = initialize(definition, 0)
    mesh = make_mesh(MeshConfig(**axes))
    config, single = for_inference(CONFIG)
    flat = layout.unroll(params, CONFIG)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, definition.shardings(mesh))
        np.testing.assert_allclose(hidden(definition, spread), hidden(definition, params), atol=1e-5)
        placed = jax.device_put(flat, single.shardings(mesh))
        np.testing.assert_allclose(cached(config, single, placed), hidden(definition, params), atol=1e-5)


def test_muon_takes_the_matrices_and_leaves_the_norms():
    definition = define_model(CONFIG)
    config = OptimizerConfig(kind="muon")
    found = {w.name.split("/", 2)[-1]: (optimizers.rule(w, config), optimizers.decays(w)) for _, w in definition}
    for name in ("query_latent", "query_up", "latent", "shared_key", "key", "value", "output"):
        assert found[name] == ("muon", True)
    for name in ("query_norm/scale", "latent_norm/scale"):
        assert found[name] == ("adamw", False)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_size": 0}, "rope_size"),
        ({"rope_size": 10}, "rope_size"),
        ({"kv_heads": 2}, "latent"),
        ({"qk_norm": True}, "latent"),
        ({"attention_sinks": True}, "latent"),
        ({"latent": LatentConfig(kv_rank=-1)}, "latent"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, field):
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(CONFIG, **changes)
    assert refused.value.path == field


@pytest.mark.parametrize(
    "fields", [{"groups": 3}, {"groups": 4, "chosen": 3}, {"groups": 4, "chosen_groups": 5}, {"group_best": 9}], ids=str
)
def test_groups_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match="groups"):
        ExpertsConfig(**{"count": 8, "chosen": 2} | fields)
