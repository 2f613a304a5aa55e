"""Multi-head latent attention (MLA), as DeepSeek-V2 has it: arXiv:2405.04434, section 2.1.

A token's latent `[R]` gives the keys and values of all heads, but for the part of a key that carries the position,
which is one for all heads. Without a cache, keys and values are made from the latents and attention is as elsewhere.
With one, latents and shared keys are all that it holds, R + rope_size numbers a token and layer: a head's matrix for
keys goes over to its queries, q · (W c) = (Wᵀ q) · c, and that for values to what its query has gathered, so that all
heads attend to the latents themselves, as queries of a single key head do. Both ways give the same but for rounding.
"""

import jax.numpy as jnp

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Float
from jaxlm.model import quantised
from jaxlm.model.attention import Layer, Place, SelfAttention
from jaxlm.model.config import Attention, ModelConfig
from jaxlm.model.layers import RMSNorm, Rotation, project, rotate
from jaxlm.model.weights import Constant, Normal, weight

# Of the norms on latents, whatever the model's other norms add (DeepSeek-V2 and V3's code).
EPSILON = 1e-6


class LatentAttention(SelfAttention):
    """In place of grouped queries; see the config's `LatentConfig`."""

    def __init__(self, config: ModelConfig, kind: Attention):
        D, H, P, R, Q = config.width, config.heads, config.rope_size, config.latent.kv_rank, config.latent.query_rank
        N, M = config.head_size, config.latent.value_size
        if Q:
            self.query_latent = weight((D, Q), ("embed", "norm"), Normal(D**-0.5), matrix=True)
            self.query_norm = RMSNorm(Q, "norm", EPSILON)
            self.query_up = weight((Q, H * N), ("latent", "heads"), Normal(Q**-0.5), matrix=True)
        else:
            self.query = weight((D, H * N), ("embed", "heads"), Normal(D**-0.5), matrix=True)
        self.latent = weight((D, R), ("embed", "norm"), Normal(D**-0.5), matrix=True)
        self.shared_key = weight((D, P), ("embed", "norm"), Normal(D**-0.5), matrix=True)
        self.latent_norm = RMSNorm(R, "norm", EPSILON)
        self.key = weight((R, H * (N - P)), ("latent", "heads"), Normal(R**-0.5), matrix=True)
        self.value = weight((R, H * M), ("latent", "heads"), Normal(R**-0.5), matrix=True)
        self.output = weight((H * M, D), ("heads", "embed"), Normal((2 * H * M * config.layers) ** -0.5), matrix=True)
        sizes = {"latent": R, "shared_key": P} | ({"query_latent": Q} if Q else {}) if "qkv" in config.biases else {}
        for name, size in (sizes | ({"output": D} if "output" in config.biases else {})).items():
            setattr(self, f"{name}_bias", weight((size,), ("norm",), Constant(0.0)))
        self.config = config
        self.window = config.window if kind.startswith("local") else 0

    def __call__(
        self, x: Float[Array, "B S D"], rotation: Rotation | None, place: Place, past: Layer | None
    ) -> tuple[Float[Array, "B S D"], Layer | None]:
        c, (B, S, _) = self.config, x.shape
        if c.latent.query_rank:
            q = project(self, "query_up", self.query_norm(project(self, "query_latent", x, c.compute)), c.compute)
        else:
            q = project(self, "query", x, c.compute)
        own, turned = jnp.split(q.reshape(B, S, c.heads, c.head_size), [c.head_size - c.rope_size], axis=-1)
        latent = self.latent_norm(project(self, "latent", x, c.compute))
        shared = project(self, "shared_key", x, c.compute)[:, :, None, :]
        if rotation is not None:
            turned, shared = (rotate(part, rotation, c.rope_interleaved) for part in (turned, shared))
        if past is None:
            k, v = (project(self, name, latent, c.compute).reshape(B, S, c.heads, -1) for name in ("key", "value"))
            k = jnp.concatenate([k, jnp.broadcast_to(shared, turned.shape)], axis=-1)
            out, past = self.attend(jnp.concatenate([own, turned], axis=-1), k, v, place, past)
        else:
            up, down = (self._whole(name).reshape(c.latent.kv_rank, c.heads, -1) for name in ("key", "value"))
            own = jnp.einsum("bshn,rhn->bshr", own, up, preferred_element_type=jnp.float32).astype(q.dtype)
            q = jnp.concatenate([own, turned], axis=-1)
            out, past = self.attend(q, shared, latent[:, :, None, :], place, past)
            out = jnp.einsum("bshr,rhm->bshm", out, down, preferred_element_type=jnp.float32).astype(q.dtype)
        return project(self, "output", out.reshape(B, S, -1), c.compute), past

    def read(self, past: Layer) -> tuple[Array, Array]:
        """Latent and shared key as one key for all heads, the latent as their value."""
        return jnp.concatenate([precision.swapped(past.value), past.key], axis=2), past.value

    def _whole(self, name: str) -> Float[Array, "R F"]:
        """A matrix in the compute type with what its adapters add."""
        kind = precision.dtype(self.config.compute)
        if not hasattr(self, f"{name}_lora_a"):
            return quantised.kernel(self, name).astype(kind)
        return project(self, name, jnp.eye(self.config.latent.kv_rank, dtype=kind)[None], self.config.compute)[0]
