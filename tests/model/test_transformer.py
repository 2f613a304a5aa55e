"""Invariants of the transformer, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.model import layout
from jaxlm.model.attention import Place, plain_attention, splash_attention, visible
from jaxlm.model.config import LatentConfig, ModelConfig, RopeScaling
from jaxlm.model.transformer import apply, define_model
from jaxlm.model.weights import initialize
from jaxlm.plan.depth import matrix_parameters
from jaxlm.plan.flops import flops_per_token

BASE = ModelConfig(vocab_size=50, layers=5, width=32, heads=4, kv_heads=2, feed_forward=48, compute="float32")
VARIANTS = {
    "plain": BASE,
    "qk-norm, tied": dataclasses.replace(BASE, qk_norm=True, tied_embeddings=True, scale_embeddings=True),
    "local and global": dataclasses.replace(BASE, pattern=("local", "local", "global"), window=4),
    "soft caps, gelu": dataclasses.replace(BASE, logit_soft_cap=5.0, attention_soft_cap=3.0, activation="gelu"),
    "one kv head, head size of its own": dataclasses.replace(BASE, kv_heads=1, head_size=20),
    "GPT-2's and GPT-NeoX's parts": dataclasses.replace(
        BASE,
        norm="layer",
        biases=("qkv", "output", "mlp"),
        gated_mlp=False,
        parallel_mlp=True,
        learned_positions=16,
        activation="gelu_exact",
    ),
    "BERT's parts": dataclasses.replace(
        BASE,
        causal=False,
        norm="layer",
        norm_place="sum",
        biases=("qkv", "output", "mlp"),
        gated_mlp=False,
        learned_positions=16,
        token_types=2,
        activation="gelu_exact",
        head="transform",
        tied_embeddings=True,
    ),
    "an encoder with RoPE": dataclasses.replace(BASE, causal=False, norm_place="sum"),
    "Gemma's, OLMo's and SmolLM's parts": dataclasses.replace(
        BASE,
        norm_place="both",
        norm_offset=True,
        qk_norm=True,
        qk_norm_over="all",
        query_scalar=5.0,
        pattern=("local", "global_nope"),
        window=4,
        rope_base_local=50.0,
        rope_size=4,
    ),
    "LongRoPE": dataclasses.replace(
        BASE,
        rope_scaling=RopeScaling(
            kind="longrope",
            factor=4.0,
            trained_positions=5,
            short_factors=(1.0,) * 4,
            long_factors=(1.0, 1.5, 3.0, 8.0),
        ),
    ),
    "DeepSeek's parts": dataclasses.replace(
        BASE,
        kv_heads=4,
        head_size=12,
        rope_size=4,
        rope_interleaved=True,
        latent=LatentConfig(kv_rank=16, query_rank=20, value_size=6),
    ),
}
variants = pytest.mark.parametrize("config", [c.complete() for c in VARIANTS.values()], ids=list(VARIANTS))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids, segments=None, positions=None):
    segments = jnp.ones_like(ids) if segments is None else segments
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    return apply(define_model(config), params, lambda m: m.logits(m(ids, segments, positions)[0]))


def tokens(seed, batch, length):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 50, jnp.int32)


@variants
def test_unrolled_equals_scanned(config):
    params = initialize(define_model(config), 1)
    unrolled = dataclasses.replace(config, scan_layers=False)
    other = initialize(define_model(unrolled), 1)
    jax.tree.map(np.testing.assert_array_equal, layout.unroll(params, config), other)
    jax.tree.map(np.testing.assert_array_equal, layout.stack(other, config), params)
    ids = tokens(0, 2, 11)
    np.testing.assert_allclose(forward(config, params, ids), forward(unrolled, other, ids), atol=1e-5)


@variants
def test_packed_equals_unpacked(config):
    params = initialize(define_model(config), 1)
    first, second = tokens(0, 1, 5), tokens(1, 1, 7)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2], jnp.int32)
    positions = jnp.array([[*range(5), *range(7), 0, 0]], jnp.int32)
    got = forward(config, params, packed, segments, positions)
    np.testing.assert_allclose(got[:, :5], forward(config, params, first), atol=1e-5)
    np.testing.assert_allclose(got[:, 5:12], forward(config, params, second), atol=1e-5)


@variants
def test_the_future_and_padding_do_not_matter(config):
    params = initialize(define_model(config), 1)
    ids = tokens(0, 1, 9)
    changed = ids.at[0, 6:].set((ids[0, 6:] + 1) % 50)
    before, after = forward(config, params, ids)[0, :6], forward(config, params, changed)[0, :6]
    assert bool(jnp.array_equal(before, after)) == config.causal  # an encoder's every token sees all of its text
    assert config.causal or bool(jnp.all(jnp.any(before != after, axis=-1)))
    segments = jnp.array([[1] * 6 + [0] * 3], jnp.int32)
    a, b = forward(config, params, ids, segments), forward(config, params, changed, segments)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert bool(jnp.isfinite(a).all())


def test_a_documents_gradient_does_not_reach_another():
    config = VARIANTS["local and global"].complete()
    params = initialize(define_model(config), 1)
    ids = jnp.concatenate([tokens(0, 1, 5) % 25, 25 + tokens(1, 1, 5) % 25], axis=1)  # disjoint vocabularies
    segments = jnp.array([[1] * 5 + [2] * 5], jnp.int32)
    positions = jnp.array([[*range(5), *range(5)]], jnp.int32)

    def second_only(table):
        return jnp.sum(forward(config, params | {"embedding": table}, ids, segments, positions)[:, 5:] ** 2)

    gradient = jax.grad(second_only)(params["embedding"])
    np.testing.assert_array_equal(gradient[:25], 0)
    assert float(jnp.abs(gradient[25:]).max()) > 0


@pytest.mark.parametrize(
    ("variant", "scanned"), [("soft caps, gelu", True), ("one kv head, head size of its own", False)]
)
def test_gradients_in_bfloat16_follow_those_in_float32(variant, scanned):
    """Every layout that the products meet in a step, forward and backward, runs, and is as near as 8 bits can be."""
    config = dataclasses.replace(VARIANTS[variant], scan_layers=scanned, layers=2).complete()
    params = initialize(define_model(config), 1)
    ids = tokens(0, 2, 16)

    def gradient(compute):
        loss = lambda params: jnp.mean(forward(dataclasses.replace(config, compute=compute), params, ids) ** 2)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])

    narrow, wide = gradient("bfloat16"), gradient("float32")
    assert float(jnp.linalg.norm(narrow - wide)) < 0.03 * float(jnp.linalg.norm(wide))


def test_who_sees_whom():
    def picture(window, causal=True):
        place = Place(*(jnp.array([x], jnp.int32) for x in ([1, 1, 1, 2, 2, 0], [0, 1, 2, 0, 1, 0]) * 2))
        return ["".join("01"[int(seen)] for seen in row) for row in visible(place, window, causal)[0]]

    assert picture(0) == ["100000", "110000", "111000", "000100", "000110", "000000"]
    assert picture(2) == ["100000", "110000", "011000", "000100", "000110", "000000"]
    assert picture(0, causal=False) == ["111000", "111000", "111000", "000110", "000110", "000000"]


@pytest.mark.parametrize("causal", [True, False])
def test_the_tpus_kernel_sees_the_same(causal, monkeypatch):
    """Interpreted on the CPU: two documents and padding, with and without the future."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    interpreted = functools.partial(kernel.make_splash_mqa_single_device, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mqa_single_device", interpreted)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 128, n, 8)).astype(np.float32)) for n in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2, 0], [50, 70, 8])[None].astype(np.int32))
    positions = jnp.asarray(np.concatenate([np.arange(50), np.arange(70), np.zeros(8)])[None].astype(np.int32))
    mask = visible(Place(segments, positions, segments, positions), 0, causal)
    plain = plain_attention(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, 0.0)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        splash = jax.jit(lambda *x: splash_attention(*x, 0, 0.0, causal=causal))(q, k, v, segments)
    np.testing.assert_allclose(splash[:, :120], plain[:, :120], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"causal": False, "pattern": ("local",), "window": 4}, "pattern: local layers look back only"),
        ({"causal": False, "criteria": ("overall",)}, "causal: is off, but criteria are read at a text's last token"),
        ({"head": "pooler", "criteria": ("overall",)}, "head: is pooler, but criteria take its place"),
        ({"norm_place": "sum", "parallel_mlp": True}, "parallel_mlp: adds both at once"),
        ({"head_size": 5}, "head_size: got 5; RoPE turns pairs"),
        ({"activation": "clamped", "head": "transform"}, "activation: clamped is of gated MLPs only"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused(fields, problem):
    with pytest.raises(ConfigError, match=problem):
        dataclasses.replace(BASE, **fields)


def test_attention_by_hand():
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, 3, n, 4)).astype(np.float32) for n in (4, 2, 2))
    mask = np.tril(np.ones((1, 3, 3), bool))
    got = plain_attention(*(jnp.asarray(x) for x in (q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)), 0.0)
    for head in range(4):
        scores = q[0, :, head] @ k[0, :, head // 2].T / 2.0
        scores = np.where(mask[0], scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(got[0, :, head], weights @ v[0, :, head // 2], atol=1e-5)


def test_soft_caps_bound():
    config = VARIANTS["soft caps, gelu"].complete()
    params = jax.tree.map(lambda x: 20 * x, initialize(define_model(config), 1))
    assert float(jnp.abs(forward(config, params, tokens(0, 1, 8))).max()) <= 5.0


def test_initial_values_do_not_depend_on_depth_around_them():
    shallow = BASE.complete()
    deep = dataclasses.replace(BASE, layers=7).complete()
    a = layout.unroll(initialize(define_model(shallow), 3), shallow)["layers"]["4"]["mlp"]["up"]
    b = layout.unroll(initialize(define_model(deep), 3), deep)["layers"]["4"]["mlp"]["up"]
    np.testing.assert_array_equal(a, b)


def test_first_loss_is_near_uniform():
    config = BASE.complete()
    logits = forward(config, initialize(define_model(config), 0), tokens(0, 4, 16))
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1).mean()
    assert abs(float(entropy) - np.log(50)) < 0.6


def test_apply_refuses_what_does_not_fit():
    config = BASE.complete()
    model = define_model(config)
    params = initialize(model, 0)
    renamed = {name if name != "head" else "haed": value for name, value in params.items()}
    with pytest.raises(ValueError, match="missing: head\n  unknown: haed"):
        apply(model, renamed, lambda m: m)
    with pytest.raises(ValueError, match=r"embedding: got float32\(32, 50\), declared float32\(50, 32\)"):
        apply(model, params | {"embedding": params["embedding"].T}, lambda m: m)
    with pytest.raises(ValueError, match="embedding: got bfloat16"):
        apply(model, params | {"embedding": params["embedding"].astype(jnp.bfloat16)}, lambda m: m)


def test_more_than_ten_layers_keep_their_order():
    config = dataclasses.replace(BASE, layers=12, scan_layers=False).complete()
    params = initialize(define_model(config), 0)
    stacked = layout.stack(params, config)
    scanned = dataclasses.replace(config, scan_layers=True)
    ids = tokens(0, 1, 6)
    np.testing.assert_allclose(forward(config, params, ids), forward(scanned, stacked, ids), atol=1e-5)


def test_flops_of_a_model_counted_by_hand():
    config = BASE.complete()
    attention = 2 * (32 * 32) + 2 * (32 * 16)  # q, o and k, v
    weights = 5 * (attention + 3 * 32 * 48) + 32 * 50
    seen = (16 + 1) / 2
    assert flops_per_token(config, 16) == pytest.approx(6 * weights + 12 * 4 * 8 * seen * 5)
    both_ways = dataclasses.replace(config, causal=False)
    assert flops_per_token(both_ways, 16) == pytest.approx(6 * weights + 12 * 4 * 8 * 16 * 5)
    local = dataclasses.replace(config, pattern=("local",), window=4)
    assert flops_per_token(local, 16) == pytest.approx(6 * weights + 12 * 4 * 8 * 5 * (1 + 2 + 3 + 4 * 13) / 16)
    # Queries through 20 numbers, keys and values through 12, besides 4 of a key for all heads; heads of 10 and 6.
    latent = LatentConfig(kv_rank=12, query_rank=20, value_size=6)
    config = dataclasses.replace(config, kv_heads=4, head_size=10, rope_size=4, latent=latent)
    attention = 32 * 20 + 20 * 4 * 10 + 32 * (12 + 4) + 12 * 4 * (6 + 6) + 4 * 6 * 32
    weights = 5 * (attention + 3 * 32 * 48) + 32 * 50
    assert flops_per_token(config, 16) == pytest.approx(6 * weights + 6 * 4 * (10 + 6) * seen * 5)
    assert matrix_parameters(config) == weights
