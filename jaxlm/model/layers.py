"""The parts of a transformer block: norms, rotary positions, the MLP."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Float, Int
from jaxlm.base.sharding import constrain
from jaxlm.model import lora, quantised
from jaxlm.model.config import Activation, ModelConfig, RopeScaling
from jaxlm.model.weights import Constant, Normal, weight

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
}


def project(module: nnx.Module, name: str, x: Float[Array, "B S D"], compute: precision.Compute) -> Array:
    """x times the module's weight of that name, plus what its adapters add, and its `name_bias`, in float32."""
    bias = getattr(module, f"{name}_bias", None)
    product = quantised.times(module, name, x, compute)
    if hasattr(module, f"{name}_lora_a"):
        product += lora.added(module, name, x, product, compute)
    return (product if bias is None else product + bias[...][None, None, :]).astype(precision.dtype(compute))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (or, with `offset`, 1 + scale), in float32; arXiv:1910.07467."""

    def __init__(self, size: int, axis: str, epsilon: float, offset: bool = False):
        self.scale = weight((size,), (axis,), Constant(0.0 if offset else 1.0))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        if self.offset:
            scale = 1 + scale
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32; arXiv:1607.06450."""

    def __init__(self, size: int, axis: str, epsilon: float):
        self.scale = weight((size,), (axis,), Constant(1.0))
        self.bias = weight((size,), (axis,), Constant(0.0))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scale, bias = (w[...].reshape((1,) * (x.ndim - 1) + (-1,)) for w in (self.scale, self.bias))
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.width, "norm", config.norm_epsilon)
    return RMSNorm(config.width, "norm", config.norm_epsilon, config.norm_offset)


class Rotation(NamedTuple):
    """Cosine and sine of each position's rotary angles, float32 `[B, S, N/2]`."""

    cos: Array
    sin: Array


Rotations = dict[str, Rotation | None]
"""Kind of attention → its rotation; None: it turns nothing."""


def rotations(
    config: ModelConfig, positions: Int[Array, "B S"], limit: int, lengths: Int[Array, "B S"] | None = None
) -> Rotations:
    """The rotation of each kind of layer at these positions, all below `limit`; longrope asks for the length of each
    token's text."""
    still: Rotations = {"global": None, "local": None, "global_nope": None, "local_nope": None}
    if config.learned_positions:
        return still
    size = config.rope_size or config.head_size
    turned = rotary(positions, limit, size, config.rope_base, config.rope_scaling, lengths)
    local = rotary(positions, limit, size, config.rope_base_local, RopeScaling()) if config.rope_base_local else turned
    return still | {"global": turned, "local": local}


def rotary(
    positions: Int[Array, "B S"],
    limit: int,
    size: int,
    base: float,
    scaling: RopeScaling,
    lengths: Int[Array, "B S"] | None = None,
) -> Rotation:
    """The rotary embedding's angles, position * base^(-2i/N), of positions below `limit`; arXiv:2104.09864.

    Looked up in a table of all positions: computed in place, XLA's CPU path would fuse the sines into every layer's
    rotation and take them anew for every head, a tenth of a training step.
    """

    def turned(frequencies: Array) -> Rotation:
        angles = jnp.arange(limit, dtype=jnp.float32)[:, None] * frequencies[None, :]
        return Rotation(scaling.sharp * jnp.cos(angles)[positions], scaling.sharp * jnp.sin(angles)[positions])

    if scaling.kind != "longrope":
        return turned(scaled(base, size, scaling))
    assert lengths is not None
    plain, far = scaled(base, size, RopeScaling()), lengths[:, :, None] > scaling.trained_positions
    short, long = (turned(plain / jnp.array(factors)) for factors in (scaling.short_factors, scaling.long_factors))
    return Rotation(*(jnp.where(far, *pair) for pair in zip(long, short, strict=True)))


def scaled(base: float, size: int, scaling: RopeScaling) -> Float[Array, "N"]:
    """base^(-2i/size), for longer texts. llama3: the formula of Llama 3.1's reference code (arXiv:2407.21783, 3.4.2);
    yarn: arXiv:2309.00071, equations 18 to 23, the ramp over i as in its authors' code."""
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        ends = [
            size * math.log(scaling.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.high_frequency, scaling.low_frequency)
        ]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
        low, high = max(low, 0), min(high, size - 1)
        width = high - low or 0.001
        divided = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / width, 0, 1)
        return (1 - divided) * frequencies + divided * frequencies / scaling.factor
    turns = scaling.trained_positions * frequencies / (2 * math.pi)
    share = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = jnp.clip(share, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(x: Float[Array, "B S H N"], rotation: Rotation, interleaved: bool = False) -> Float[Array, "B S H N"]:
    """Turns the pairs (x[i], x[i + N/2]) by their angles, in float32 (the pairing of Llama's checkpoints).

    `interleaved`: the pairs (x[2i], x[2i + 1]), which come out in the order of the others: scores see no difference.
    With a rotation of fewer than N/2 angles, the pairs are those of the head's first numbers, and the rest stays.
    """
    cos, sin = (part[:, :, None, :] for part in rotation)
    size = 2 * cos.shape[-1]
    wide = x[..., :size].astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)


def gated(activation: Activation, gate: Array, up: Array) -> Array:
    """act(gate) * up; of "clamped": (up + 1) * gate * sigmoid(1.702 gate), both cut at 7 (arXiv:2508.10925)."""
    if activation != "clamped":
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * (gate * jax.nn.sigmoid(1.702 * gate))


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), arXiv:2002.05202; without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, feed_forward: int = 0):
        D, F = config.width, feed_forward or config.feed_forward
        if config.gated_mlp:
            self.gate = weight((D, F), ("embed", "mlp"), Normal(D**-0.5), matrix=True)
        self.up = weight((D, F), ("embed", "mlp"), Normal(D**-0.5), matrix=True)
        # The two products that end in the residual stream start smaller by sqrt(2L), so that the stream's
        # variance does not grow with depth (GPT-2).
        self.down = weight((F, D), ("mlp", "embed"), Normal((2 * F * config.layers) ** -0.5), matrix=True)
        if "mlp" in config.biases:
            if config.gated_mlp:
                self.gate_bias = weight((F,), ("mlp",), Constant(0.0))
            self.up_bias = weight((F,), ("mlp",), Constant(0.0))
            self.down_bias = weight((D,), ("norm",), Constant(0.0))
        self.activation: Activation = config.activation
        self.gated = config.gated_mlp
        self.compute: precision.Compute = config.compute

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        inner = project(self, "up", x, self.compute)
        if self.gated:
            inner = gated(self.activation, project(self, "gate", x, self.compute), inner)
        else:
            inner = ACTIVATIONS[self.activation](inner)
        return project(self, "down", constrain(inner, "batch", "sequence", "activation_mlp"), self.compute)


class HeadTransform(nnx.Module):
    """norm(act(dense(x))): what stands before the output matrix in BERT's masked-token head (arXiv:1810.04805)."""

    def __init__(self, config: ModelConfig):
        D = config.width
        self.dense = weight((D, D), ("embed", "norm"), Normal(D**-0.5), matrix=True)
        self.dense_bias = weight((D,), ("norm",), Constant(0.0))
        self.norm = make_norm(config)
        self.activation: Activation = config.activation
        self.compute: precision.Compute = config.compute

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        inner = project(self, "dense", x.reshape(1, -1, x.shape[-1]), self.compute)
        return self.norm(ACTIVATIONS[self.activation](inner)).reshape(x.shape)
