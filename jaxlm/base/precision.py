"""Where numbers are bf16 and where they are f32: parameters, softmax, norms and losses f32, products in `compute`."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

Compute = Literal["bfloat16", "float32"]


def dtype(compute: Compute) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if compute == "bfloat16" else jnp.float32)


def matmul(x: jax.Array, w: jax.Array, compute: Compute, wide: bool = False) -> jax.Array:
    """`x[..., D] @ w[D, F]` with factors in the compute type and sums in float32, which `wide` keeps.

    One flat product, [B*S, D] @ [D, F]: on XLA's CPU path a batched einsum takes twice as long.
    """
    kind = dtype(compute)
    out = product("nd,df->nf", x.reshape(-1, x.shape[-1]).astype(kind), w.astype(kind))
    return (out if wide else out.astype(kind)).reshape(*x.shape[:-1], w.shape[-1])


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two arrays with float32 sums and result, whose gradients are products of a's and b's own type too.

    XLA's CPU path multiplies bf16 in its matrix units only for a float32 result ([4096, 384] @ [384, 1024] on two cores
    with AMX, jax 0.10.2: 7 ms, against 45 for a bf16 result), and the gradients that jax derives from that would be
    float32 products. On TPU they are the same instruction.
    """
    result: Any = _product(subscripts, a, b)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32), (a, b)


def _backward(subscripts: str, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    factors, out = subscripts.split("->")
    of_a, of_b = factors.split(",")
    g = g.astype(a.dtype)
    towards_a = jnp.einsum(f"{out},{of_b}->{of_a}", g, b, preferred_element_type=jnp.float32)
    towards_b = jnp.einsum(f"{of_a},{out}->{of_b}", a, g, preferred_element_type=jnp.float32)
    return towards_a.astype(a.dtype), towards_b.astype(b.dtype)


_product.defvjp(_forward, _backward)
