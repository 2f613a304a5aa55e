"""Attention: who sees whom, the plain path, the TPU's splash kernel, and the block's attention part."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Bool, Float, Int
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import constrain, spec
from jaxlm.model.config import Attention, ModelConfig
from jaxlm.model.layers import RMSNorm, Rotation, project, rotate
from jaxlm.model.weights import Constant, Normal, weight

# Below the smallest score that a float32 softmax tells from nothing; finite, so that a row of padding has no NaN.
MASKED = -2.0e38

# The splash kernel works on blocks of so many queries and keys, the largest that divides the row; the smallest one is
# the least that it takes, larger ones keep the matrix units busy for longer.
SPLASH_BLOCK = 128
SPLASH_BLOCKS = (512, 256, SPLASH_BLOCK)


def kernel(config: ModelConfig, platform: str) -> Literal["plain", "splash"]:
    """What attention="auto" is on a platform."""
    if config.attention == "auto":
        return "splash" if platform == "tpu" and not config.attention_sinks else "plain"
    return config.attention


def fitting_length(config: ModelConfig, platform: str, tokens: int) -> int:
    """The shortest length of rows, `tokens` or more, that the platform's attention takes."""
    block = SPLASH_BLOCK if kernel(config, platform) == "splash" else 1
    return -(-tokens // block) * block


def chosen(config: ModelConfig, platform: str, row_length: int) -> ModelConfig:
    """The config with attention="auto" decided for a platform. Raises ConfigError for rows that splash cannot take."""
    kind = kernel(config, platform)
    if kind == "splash" and row_length % SPLASH_BLOCK:
        raise ConfigError(
            "model.attention",
            f"the splash kernel takes rows of a multiple of {SPLASH_BLOCK} tokens, these have {row_length}; "
            "pack again, or set model.attention=plain",
        )
    return dataclasses.replace(config, attention=kind)


class Layer(NamedTuple):
    """What a layer's keys and values were in the past, each as its product takes it without turning it."""

    key: Array
    """`[B, K, N, T]`; of latent attention the shared keys `[B, 1, rope_size, T]`"""
    value: Array
    """`[B, K, T, N]`; of latent attention the latents `[B, 1, T, R]`"""


class Place(NamedTuple):
    """Where queries and keys stand: segments (0: nothing there), positions; and, with a cache, the slot to write."""

    query_segments: Array
    """int32 `[B, S]`"""
    query_positions: Array
    """int32 `[B, S]`"""
    key_segments: Array
    """int32 `[B, T]`"""
    key_positions: Array
    """int32 `[B, T]`"""
    slot: Array | None = None
    """int32 `[]`: where in the cache the new keys go; None without a cache."""


def visible(place: Place, window: int, causal: bool = True) -> Bool[Array, "B S T"]:
    """A query sees keys of its own segment, not after it, and less than `window` before it (0: any).

    Two documents of 2 and 1 tokens and a pad, as ones and zeros; and where attention is not `causal`:

        1 0 0 0    1 1 0 0
        1 1 0 0    1 1 0 0
        0 0 1 0    0 0 1 0
        0 0 0 0    0 0 0 0
    """
    query, key = place.query_positions[:, :, None], place.key_positions[:, None, :]
    same = place.query_segments[:, :, None] == place.key_segments[:, None, :]
    real = place.key_segments[:, None, :] > 0
    seen = same & real & (key <= query) if causal else same & real
    return seen & (query - key < window) if window else seen


def plain_attention(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B K N T"],
    v: Float[Array, "B K T M"],
    mask: Bool[Array, "B S T"],
    soft_cap: float,
    scale: float = 0.0,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B S H M"]:
    """softmax(scale q k) v, softmax in float32; query head h reads key head h // G; scale 0 stands for 1 / sqrt(N).

    `sinks` are one more score a head in the softmax's sum, with no value.
    """
    B, S, H, N = q.shape
    K, T = v.shape[1:3]
    G = H // K
    # A key head's G queries lie one after the other: every product is then one of plain matrices, `[G*S, N]`.
    grouped = q.reshape(B, S, K, G, N).transpose(0, 2, 3, 1, 4).reshape(B, K, G * S, N).astype(k.dtype)
    scores = precision.product(grouped, k) * (scale or N**-0.5)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, None, None, :, :], scores.reshape(B, K, G, S, T), MASKED).reshape(B, K, G * S, T)
    # The softmax's division comes after the product, on [.., N] instead of [.., T], and so does its gradient's sum.
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is None:
        weights = jnp.exp(scores - jax.lax.stop_gradient(highest))
        total = jnp.sum(weights, axis=-1, keepdims=True)
    else:
        each = jnp.broadcast_to(sinks.reshape(1, K, G, 1), (B, K, G, S)).reshape(B, K, G * S, 1)
        highest = jax.lax.stop_gradient(jnp.maximum(highest, each))
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(each - highest)
    mixed = precision.product(weights.astype(v.dtype), v) / total
    return mixed.reshape(B, K, G, S, -1).transpose(0, 3, 1, 2, 4).reshape(B, S, H, -1).astype(q.dtype)


def splash_attention(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B S K N"],
    v: Float[Array, "B S K M"],
    segments: Int[Array, "B S"],
    window: int,
    soft_cap: float,
    scale: float = 0.0,
    causal: bool = True,
) -> Float[Array, "B S H M"]:
    """The same by jax's Pallas kernel for TPU, which never makes the scores: O(S) memory, skipped blocks.

    Within a packed row, positions grow with the index inside a segment, so causality and window by index are
    those by position; the segments do the rest.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    S, groups = q.shape[1], q.shape[2] // k.shape[2]
    size = next(size for size in SPLASH_BLOCKS if S % size == 0)
    blocks = kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        one = masks.LocalMask((S, S), (window - 1, 0), 0) if window else masks.CausalMask((S, S))
        one = one if causal else masks.FullMask((S, S))
        attend = kernel.make_splash_mqa_single_device(
            masks.MultiHeadMask([one] * groups), block_sizes=blocks, attn_logits_soft_cap=soft_cap or None
        )
        B, _, H, N = q.shape
        grouped = (q * q.dtype.type(scale or N**-0.5)).reshape(B, S, H // groups, groups, N).transpose(0, 2, 3, 1, 4)
        over_kv_heads = jax.vmap(attend, in_axes=(0, 0, 0, None))
        ids = kernel.SegmentIds(segments, segments)
        out: Any = jax.vmap(over_kv_heads)(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), ids)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, -1)

    # A kernel is opaque to the partitioner: each device runs it on its own rows and heads.
    heads = spec(("batch", None, "activation_heads", None))
    sharded = jax.shard_map(
        local, in_specs=(heads, heads, heads, spec(("batch", None))), out_specs=heads, check_vma=False
    )
    return sharded(q, k, v, segments)


class SelfAttention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions and optional norms on queries and keys."""

    def __init__(self, config: ModelConfig, kind: Attention):
        D, H, K, N = config.width, config.heads, config.kv_heads, config.head_size
        self.query = weight((D, H * N), ("embed", "heads"), Normal(D**-0.5), matrix=True)
        self.key = weight((D, K * N), ("embed", "kv_heads"), Normal(D**-0.5), matrix=True)
        self.value = weight((D, K * N), ("embed", "kv_heads"), Normal(D**-0.5), matrix=True)
        self.output = weight((H * N, D), ("heads", "embed"), Normal((2 * H * N * config.layers) ** -0.5), matrix=True)
        if "qkv" in config.biases:
            self.query_bias = weight((H * N,), ("heads",), Constant(0.0))
            self.key_bias = weight((K * N,), ("kv_heads",), Constant(0.0))
            self.value_bias = weight((K * N,), ("kv_heads",), Constant(0.0))
        if "output" in config.biases:
            self.output_bias = weight((D,), ("norm",), Constant(0.0))
        if config.qk_norm:
            sizes = (N, N) if config.qk_norm_over == "head" else (H * N, K * N)
            self.query_norm = RMSNorm(sizes[0], "norm", config.norm_epsilon, config.norm_offset)
            self.key_norm = RMSNorm(sizes[1], "norm", config.norm_epsilon, config.norm_offset)
        if config.attention_sinks:
            self.sinks = weight((H,), ("heads",), Constant(0.0))
        self.config = config
        self.window = config.window if kind.startswith("local") else 0

    def __call__(
        self, x: Float[Array, "B S D"], rotation: Rotation | None, place: Place, past: Layer | None
    ) -> tuple[Float[Array, "B S D"], Layer | None]:
        c = self.config
        B, S, _ = x.shape
        q, k, v = (project(self, name, x, c.compute) for name in ("query", "key", "value"))
        if c.qk_norm and c.qk_norm_over == "all":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.reshape(B, S, -1, c.head_size) for part in (q, k, v))
        if c.qk_norm and c.qk_norm_over == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = (rotate(part, rotation, c.rope_interleaved) for part in (q, k))
        out, past = self.attend(q, k, v, place, past)
        return project(self, "output", out.reshape(B, S, -1), c.compute), past

    def attend(self, q: Array, k: Array, v: Array, place: Place, past: Layer | None) -> tuple[Array, Layer | None]:
        """What `[B, S, H, M]` the queries gather of these keys and values, and of those of the past."""
        c = self.config
        q, k, v = (constrain(part, "batch", "sequence", "activation_heads", None) for part in (q, k, v))
        if c.attention == "splash" and past is None:
            given = place.query_segments, self.window, c.attention_soft_cap, c.score_scale, c.causal
            out = splash_attention(q, k, v, *given)
        else:
            k, v = precision.swapped(k.swapaxes(1, 2)), precision.held(v.swapaxes(1, 2))
            if past is not None:
                assert place.slot is not None
                k = jax.lax.dynamic_update_slice_in_dim(past.key, k.astype(past.key.dtype), place.slot, 3)
                v = jax.lax.dynamic_update_slice_in_dim(past.value, v.astype(past.value.dtype), place.slot, 2)
                past = Layer(k, v)
                k, v = self.read(past)
            sinks = self.sinks[...] if c.attention_sinks else None
            mask = visible(place, self.window, c.causal)
            out = plain_attention(q, k, v, mask, c.attention_soft_cap, c.score_scale, sinks)
        return constrain(out, "batch", "sequence", "activation_heads", None), past

    def read(self, past: Layer) -> tuple[Array, Array]:
        """The keys `[B, K, N, T]` and values `[B, K, T, M]` of what is cached."""
        return past.key, past.value
