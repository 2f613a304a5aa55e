"""Checksums of arrays, computed where the arrays lie, equal on every mesh.

A checksum is two uint32 lanes over the bits b[i] of the elements:

    lane 0 = Σ b[i]                       mod 2³²
    lane 1 = Σ mix(b[i] xor position[i])  mod 2³²     position[i]: a hash of the element's global coordinates

Sums modulo 2³² have no order, so shards may be summed anywhere. `mix` permutes the uint32s, so that any change of one
element changes both lanes. A weighted sum Σ b[i]·w[i] with odd w would not do for lane 1: x and -x differ by 2³¹ alone,
and swapping them changes it by 2³¹·(w[i] - w[j]) = 0.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.base.arrays import Array, UInt32


def checksums(tree):
    """A tree of arrays → the same tree of uint32[2]. To be called inside `jit`; reads each element once.

    >>> jax.jit(checksums)({"step": jnp.int32(7)})
    {'step': Array([        7, 415870660], dtype=uint32)}
    """
    return jax.tree.map(_checksum, tree)


def finite(tree):
    """A tree of arrays → the same tree of bool[]: no NaN and no infinity in it. To be called inside `jit`."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else True, tree)


def examine(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(checksum of each array, names of the arrays that are not finite), on the host of every process."""
    meshes = {x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)}
    sums, is_finite = jax.device_get(_examine(meshes.pop() if meshes else None)(dict(arrays)))
    lanes = {name: (int(value[0]), int(value[1])) for name, value in sums.items()}
    return lanes, [name for name, fine in is_finite.items() if not fine]


@functools.cache
def _examine(mesh):
    # Replicated results: every process can read them.
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    return jax.jit(lambda arrays: (checksums(arrays), finite(arrays)), out_shardings=everywhere)


def _checksum(x: Array) -> UInt32[Array, "2"]:
    bits = _bits(x)
    terms = (bits, _mix(bits ^ _positions(bits.shape)))
    # One reduction of both lanes fuses into one pass without a temporary array; two jnp.sum need twice the array's
    # size and, on a CPU, eight times as long.
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce(terms, (jnp.uint32(0), jnp.uint32(0)), add, tuple(range(bits.ndim))))


def _bits(x: Array) -> UInt32[Array, "..."]:
    """The elements' bits; 64-bit elements as two along a last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """A hash of each element's coordinates. Axis by axis, since a linear index would overflow at 2³² elements."""
    hashed = jnp.uint32(len(shape))
    for axis, size in enumerate(shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (size,), axis)
        hashed = _mix(hashed[..., None] + index + jnp.uint32(0x9E3779B9))
    return hashed


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer: a permutation of the uint32s; each input bit moves about half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
