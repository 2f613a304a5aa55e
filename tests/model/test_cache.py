"""Decoding through the cache gives what the full forward pass gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.config import LatentConfig, ModelConfig, RopeScaling
from jaxlm.model.transformer import apply, define_model, empty_cache, for_inference
from jaxlm.model.weights import initialize
from jaxlm.sample.decoding import prepare

BASE = {"vocab_size": 50, "layers": 2, "width": 32, "heads": 4, "compute": "float32"}
VARIANTS = {
    "plain": ModelConfig(**BASE),
    "one key head, tied, scaled": ModelConfig(**BASE, kv_heads=1, tied_embeddings=True, scale_embeddings=True),
    "grouped queries, local and global, norms, soft caps": ModelConfig(
        **BASE,
        kv_heads=2,
        pattern=("local", "global"),
        window=3,
        qk_norm=True,
        logit_soft_cap=2.0,
        attention_soft_cap=1.5,
    ),
    # As the families of jaxlm/hub/families.py have them: GPT-2, GPT-NeoX, Gemma 3, OLMo 2, SmolLM 3.
    "layer norms, learned positions, biases": ModelConfig(
        **BASE, norm="layer", learned_positions=16, biases=("qkv", "output", "mlp"), gated_mlp=False, activation="gelu"
    ),
    "parallel, partly turned": ModelConfig(
        **BASE, norm="layer", parallel_mlp=True, rope_size=4, biases=("mlp",), activation="gelu_exact"
    ),
    "norms on both sides, two bases, scaled": ModelConfig(
        **BASE,
        norm_place="both",
        norm_offset=True,
        pattern=("local", "global"),
        window=3,
        rope_base_local=100.0,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
        query_scalar=5.0,
    ),
    "norms after, over all heads": ModelConfig(
        **BASE, kv_heads=2, norm_place="after", qk_norm=True, qk_norm_over="all", biases=("output",)
    ),
    "some layers without positions, llama3": ModelConfig(
        **BASE,
        pattern=("global", "local_nope"),
        window=4,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, trained_positions=8),
        biases=("qkv",),
    ),
    "latents": ModelConfig(**BASE, head_size=10, rope_size=4, latent=LatentConfig(kv_rank=12)),
    "latents, of queries too, windows, yarn, values of another size": ModelConfig(
        **BASE,
        head_size=10,
        rope_size=4,
        rope_interleaved=True,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, trained_positions=8, mscale_all_dim=0.7),
        latent=LatentConfig(kv_rank=12, query_rank=14, value_size=8),
        biases=("qkv", "output"),
        pattern=("global", "local_nope"),
        window=4,
        attention_soft_cap=3.0,
    ),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_cached_decode_is_the_full_forward_for_ragged_prompts(config):
    config = config.complete()
    params = prepare(config, jax.jit(functools.partial(initialize, define_model(config), 0))())
    unrolled, model = for_inference(config)
    lengths, slots, new = np.array([7, 1, 4]), 8, 5
    ids = np.random.default_rng(0).integers(0, 50, (3, 12)).astype(np.int32)

    @jax.jit
    def logits_after(ids, segments, positions, cache=None):
        def run(m):
            hidden, after = m(ids, segments, positions, cache)
            return m.logits(hidden), after

        return apply(model, params, run)

    # The prompt in one piece, right-padded with other tokens, then token by token.
    inside = np.arange(slots)[None] < lengths[:, None]
    prompt = np.where(inside, ids[:, :slots], 49).astype(np.int32)
    places = np.broadcast_to(np.arange(slots, dtype=np.int32), prompt.shape)
    cache = empty_cache(unrolled, 3, slots + new)
    logits, cache = logits_after(prompt, inside.astype(np.int32), places, cache)
    cached = [logits[np.arange(3), lengths - 1]]
    for t in range(new):
        at = (lengths + t)[:, None].astype(np.int32)
        logits, cache = logits_after(np.take_along_axis(ids, at, 1), np.ones((3, 1), np.int32), at, cache)
        cached.append(logits[:, 0])

    every = np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape)
    full, _ = logits_after(ids, np.ones_like(ids), every)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            jnp.stack(cached)[:, row], full[row, length - 1 : length + new], rtol=1e-5, atol=1e-5
        )
