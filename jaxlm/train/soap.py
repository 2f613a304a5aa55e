"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners (arXiv:2409.11321, algorithms 3 and 4); Optax has none.

A matrix's gradient G [in, out] has running averages L of G Gᵀ and R of Gᵀ G, whose eigenvectors are Q_L and Q_R:

    second moment of  Q_Lᵀ G Q_R,   first moment M of G,   direction = Q_L (Q_Lᵀ M Q_R / (√second + ε)) Q_Rᵀ

Layers stacked along a leading axis are so many matrices: every product and decomposition here is batched over them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.base.arrays import Array, Float


class Side(NamedTuple):
    """Of one side of a matrix, n its length."""

    average: Array
    """`[..., n, n]`: of G Gᵀ (Gᵀ G)"""
    basis: Array
    """`[..., n, n]`: its eigenvectors in columns, those of the largest eigenvalues first"""


class MatrixState(NamedTuple):
    first: Array
    """`[..., in, out]`: running average of the gradient, as it came"""
    second: Array
    """`[..., in, out]`: of its squares in the eigenbasis"""
    left: Side | None
    """None: the side is too long and keeps its own basis"""
    right: Side | None


class SoapState(NamedTuple):
    seen: Array
    """int32 `[]`: gradients so far"""
    matrices: Any
    """a `MatrixState` for each matrix"""


def scale_by_soap(
    b1: float, b2: float, epsilon: float, refresh_steps: int, largest_side: int
) -> optax.GradientTransformation:
    """The direction, of the sign of the gradient, for trees of matrices `[..., in, out]`.

    The first gradient only makes the first basis, by `eigh`, and moves nothing: measured in its own eigenbasis it would
    look the same in all directions (the authors' code does so too). Every `refresh_steps` afterwards, a step of
    orthogonal iteration (L Q, then QR) turns the basis. A side longer than `largest_side` is not turned (section 7.1).
    """

    def init(params: Any) -> SoapState:
        return SoapState(jnp.int32(0), jax.tree.map(lambda x: _nothing(x, largest_side), params))

    def update(gradients: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        flat, tree = jax.tree.flatten(gradients)
        before = tree.flatten_up_to(state.matrices)
        moved = [_moments(g, matrix, state.seen, b1, b2) for g, matrix in zip(flat, before, strict=True)]
        directions = [_direction(matrix, state.seen, b1, b2, epsilon) for matrix in moved]
        averaged = [_averages(g, matrix, b2) for g, matrix in zip(flat, moved, strict=True)]
        due = jnp.where(state.seen % refresh_steps == 0, 1, 0) + jnp.where(state.seen == 0, 1, 0)
        refreshed = jax.lax.switch(
            due,
            (
                lambda matrices: matrices,
                lambda matrices: [_iterated(matrix) for matrix in matrices],
                lambda matrices: [_decomposed(matrix) for matrix in matrices],
            ),
            averaged,
        )
        return tree.unflatten(directions), SoapState(state.seen + 1, tree.unflatten(refreshed))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def product(formula: str, *of: Array) -> Array:
    """A TPU would round the factors to bf16: eigenvectors would no longer be orthogonal."""
    return jnp.einsum(formula, *of, precision=jax.lax.Precision.HIGHEST)


def _nothing(x: Float[Array, "..."], largest: int) -> MatrixState:
    def side(n: int) -> Side | None:
        shape = (*x.shape[:-2], n, n)
        return Side(jnp.zeros(shape, x.dtype), jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), shape))

    left, right = (side(n) if n <= largest else None for n in x.shape[-2:])
    return MatrixState(jnp.zeros_like(x), jnp.zeros_like(x), left, right)


def _rotated(x: Array, state: MatrixState) -> Array:
    """Qᵀ_L x Q_R."""
    x = x if state.left is None else product("...ia,...io->...ao", state.left.basis, x)
    return x if state.right is None else product("...ao,...ob->...ab", x, state.right.basis)


def _rotated_back(x: Array, state: MatrixState) -> Array:
    x = x if state.left is None else product("...ia,...ab->...ib", state.left.basis, x)
    return x if state.right is None else product("...ib,...ob->...io", x, state.right.basis)


def _moments(gradient: Array, state: MatrixState, count: Array, b1: float, b2: float) -> MatrixState:
    first = b1 * state.first + (1 - b1) * gradient
    second = b2 * state.second + (1 - b2) * jnp.square(_rotated(gradient, state))
    moving = count > 0
    return state._replace(first=jnp.where(moving, first, state.first), second=jnp.where(moving, second, state.second))


def _direction(state: MatrixState, count: Array, b1: float, b2: float, epsilon: float) -> Array:
    """With Adam's correction of the moments' bias; they have seen one gradient less than `count` + 1."""
    seen = jnp.maximum(count, 1).astype(state.first.dtype)
    first = _rotated(state.first, state) / (1 - b1**seen)
    second = state.second / (1 - b2**seen)
    return _rotated_back(first / (jnp.sqrt(second) + epsilon), state)


def _averages(gradient: Array, state: MatrixState, b2: float) -> MatrixState:
    def side(before: Side | None, formula: str) -> Side | None:
        if before is None:
            return None
        return before._replace(average=b2 * before.average + (1 - b2) * product(formula, gradient, gradient))

    left, right = side(state.left, "...io,...jo->...ij"), side(state.right, "...io,...ip->...op")
    return state._replace(left=left, right=right)


def _decomposed(state: MatrixState) -> MatrixState:
    """The first bases. One gradient has min(in, out) directions; those that a longer side has besides are completed by
    Householder reflections: in `eigh` they would be a matter of rounding, and each mesh would go a way of its own."""
    known = min(state.first.shape[-2:])

    def side(before: Side | None) -> Side | None:
        if before is None:
            return None
        basis = jnp.linalg.eigh(before.average)[1][..., ::-1]
        if known < basis.shape[-1]:
            basis = jnp.linalg.qr(basis[..., :known], mode="complete")[0]
        return before._replace(basis=basis)

    return state._replace(left=side(state.left), right=side(state.right))


def _iterated(state: MatrixState) -> MatrixState:
    """One orthogonal iteration a side, from columns in the order of their eigenvalues now, as they converge to it; the
    second moment keeps to its columns."""

    def side(before: Side | None) -> tuple[Side | None, Array | None]:
        if before is None:
            return None, None
        turned = product("...ij,...ja->...ia", before.average, before.basis)
        order = jnp.argsort(-jnp.sum(before.basis * turned, axis=-2), axis=-1)
        turned = jnp.take_along_axis(turned, order[..., None, :], axis=-1)
        return before._replace(basis=jnp.linalg.qr(turned)[0]), order

    (left, rows), (right, columns) = side(state.left), side(state.right)
    second = state.second
    second = second if rows is None else jnp.take_along_axis(second, rows[..., :, None], axis=-2)
    second = second if columns is None else jnp.take_along_axis(second, columns[..., None, :], axis=-1)
    return state._replace(second=second, left=left, right=right)
