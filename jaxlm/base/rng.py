"""Randomness by name: a key is a function of the seed and of what it is for, never of what ran before.

    key = rng.key(seed, "init", "layers/attention/query", layer)

No key is split from another in a chain, so adding a consumer, a host or a layer changes nobody else's random numbers.
"""

import zlib

import jax
import jax.numpy as jnp


def key(seed: int | jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """A typed threefry key for `(seed, *names)`; names are strings, integers, or traced integers."""
    made = jax.random.key(seed, impl="threefry2x32")
    for name in names:
        if isinstance(name, str):
            # The highest bit keeps strings apart from small integers such as steps and layers.
            made = jax.random.fold_in(made, zlib.crc32(name.encode()) | 1 << 31)
        else:
            made = jax.random.fold_in(made, jnp.asarray(name, jnp.uint32))
    return made
