"""The parts of a transformer block: RMSNorm, rotary positions, the gated MLP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Float, Int
from jaxlm.base.sharding import constrain
from jaxlm.model.config import ModelConfig
from jaxlm.model.weights import Constant, Normal, weight

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32; arXiv:1910.07467."""

    def __init__(self, size: int, axis: str, epsilon: float):
        self.scale = weight((size,), (axis,), Constant(1.0))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class Rotation(NamedTuple):
    """Cosine and sine of each position's rotary angles, float32 `[B, S, N/2]`."""

    cos: Array
    sin: Array


def rotary(positions: Int[Array, "B S"], limit: int, size: int, base: float) -> Rotation:
    """The rotary embedding's angles, position * base^(-2i/N), of positions below `limit`; arXiv:2104.09864.

    Looked up in a table of all positions: computed in place, XLA's CPU path would fuse the sines into every layer's
    rotation and take them anew for every head, a tenth of a training step.
    """
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(limit, dtype=jnp.float32)[:, None] * frequencies[None, :]
    return Rotation(jnp.cos(angles)[positions], jnp.sin(angles)[positions])


def rotate(x: Float[Array, "B S H N"], rotation: Rotation) -> Float[Array, "B S H N"]:
    """Turns the pairs (x[i], x[i + N/2]) by their angles, in float32 (the pairing of Llama's checkpoints)."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)); arXiv:2002.05202."""

    def __init__(self, config: ModelConfig):
        D, F = config.width, config.feed_forward
        self.gate = weight((D, F), ("embed", "mlp"), Normal(D**-0.5), matrix=True)
        self.up = weight((D, F), ("embed", "mlp"), Normal(D**-0.5), matrix=True)
        # The two products that end in the residual stream start smaller by sqrt(2L), so that the stream's
        # variance does not grow with depth (GPT-2).
        self.down = weight((F, D), ("mlp", "embed"), Normal((2 * F * config.layers) ** -0.5), matrix=True)
        self.activation = config.activation
        self.compute: precision.Compute = config.compute

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate = precision.matmul(x, self.gate[...], self.compute)
        up = precision.matmul(x, self.up[...], self.compute)
        inner = constrain(ACTIVATIONS[self.activation](gate) * up, "batch", "sequence", "activation_mlp")
        return precision.matmul(inner, self.down[...], self.compute)
