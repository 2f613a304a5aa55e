"""Where numbers are bf16 and where they are f32: parameters, softmax, norms and losses f32, products in `compute`."""

from typing import Literal

import jax
import jax.numpy as jnp

Compute = Literal["bfloat16", "float32"]


def dtype(compute: Compute) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if compute == "bfloat16" else jnp.float32)


def matmul(x: jax.Array, w: jax.Array, compute: Compute, wide: bool = False) -> jax.Array:
    """`x[..., D] @ w[D, F]` in the compute type, as one flat product: [B*S, D] @ [D, F]; `wide` keeps float32 sums.

    On XLA's CPU the flat product takes its fast matrix path, a batched einsum does not (twice the step time).
    """
    kind = dtype(compute)
    out = jnp.float32 if wide else kind
    flat = jnp.dot(x.reshape(-1, x.shape[-1]).astype(kind), w.astype(kind), preferred_element_type=out)
    return flat.reshape(*x.shape[:-1], w.shape[-1])
