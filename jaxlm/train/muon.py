"""Muon: the momentum of a matrix, made orthogonal, so that all its directions move alike.

Optax has the same rule (`optax.contrib.muon`, which the tests compare with), in the momentum's float32 and as batched
products: on two CPU cores these took a third of the demo's training step. Here the products have the model's compute
type, as in the rule's first publication (K. Jordan, kellerjordan.github.io/posts/muon), their sums are float32, and
matrices that lie alone are multiplied alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.base.arrays import Array, Float
from jaxlm.base.precision import Compute, dtype, product, swapped

# Of the quintic whose slope at 0 is as large as convergence into [0.7, 1.2] allows (Jordan).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-8


class MuonState(NamedTuple):
    steps: jax.Array
    mu: Any
    """momenta, float32"""


def scale_by_muon(momentum: float, update_rms: float, compute: Compute) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal; of matrices `[..., M, N]`, leading axes being layers.

    The root mean square of an update is about `update_rms` for any shape (arXiv:2502.16982, equation 4).
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        steps = state.steps + 1
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, gradients)
        # The momentum as of the step after this one; both parts without their bias towards 0.
        ahead, now = (1 - jnp.float32(momentum) ** (steps + more) for more in (1, 0))

        def step(m: Array, g: Array) -> Array:
            scale = update_rms * max(m.shape[-2:]) ** 0.5
            return scale * orthogonalized(momentum * m / ahead + (1 - momentum) * g / now, compute)

        return jax.tree.map(step, mu, gradients), MuonState(steps, mu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def orthogonalized(x: Float[Array, "*L M N"], compute: Compute) -> Float[Array, "*L M N"]:
    """Nearly U Vᵀ of x = U S Vᵀ: singular values of about 0.7 to 1.2, by five Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    kind = dtype(compute)
    tall = x.shape[-2] > x.shape[-1]
    x = swapped(x) if tall else x
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + EPSILON)
    for _ in range(STEPS):
        factor = x.astype(kind)
        square = product(factor, swapped(factor))
        narrow = square.astype(kind)
        x = a * x + product((b * square + c * product(narrow, narrow)).astype(kind), factor)
    return swapped(x) if tall else x
