"""Frozen matrices in 8 or 4 bits, made whole layer by layer as they are used: the base of QLoRA (arXiv:2305.14314).

In place of a matrix W [in, out] its module has codes under the same name and float32 scales, weights like others:

    int8    query int8 [in, out], query_scale [1, out]: W = scale · code, the largest of a column at ±127
    nf4     query uint8 [in / 2, out], the codes of rows 2i and 2i + 1 in the low and the high half of a byte;
            query_scale [in / 64 rounded up, out]: W = scale · LEVELS[code], the largest of 64 rows of a column at ±1

Those of experts have their axis in front. A whole matrix lives while its layer runs, forward and backward; libraries
that quantise a finished tree of parameters make all layers' before the scan over them begins. Scales are not quantised
a second time: nf4 takes 4.5 bits a number.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array
from jaxlm.base.errors import ConfigError
from jaxlm.model.config import Base
from jaxlm.model.weights import Constant, weight

BLOCK = 64
# Of NF4, exactly (appendix E of the paper): quantiles of a normal distribution, 0 and both ends among them.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def declare(part: nnx.Module, base: Base) -> None:
    """Declares codes and scales in place of a part's matrices, those of experts each by itself; adapters stay."""
    for name, value in list(vars(part).items()):
        kept = base == "compute" or "_lora_" in name or name == "router"  # whose products are float32
        if kept or not isinstance(value, nnx.Param) or not value.get_metadata()["matrix"]:
            continue
        (*E, D, F), (*e, rows, columns) = value.get_value().shape, value.get_metadata()["axes"]
        if base == "nf4" and D % 2:
            raise ConfigError("lora.base", f"nf4 keeps two rows in a byte, and {name} has {D}; take int8")
        kind, stored, blocks = (jnp.int8, D, 1) if base == "int8" else (jnp.uint8, D // 2, -(-D // BLOCK))
        setattr(part, name, weight((*E, stored, F), (*e, rows, columns), Constant(0), kind=kind))
        setattr(part, f"{name}_scale", weight((*E, blocks, F), (*e, f"{rows}_blocks", columns), Constant(1.0)))


def dequantised(codes: Array, scale: Array, first: int | Array = 0) -> Array:
    """The matrix, float32 `[..., in, out]`; or of one with these scales, the rows from the `first` that have codes."""
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * scale
    each = jnp.stack([codes & 15, codes >> 4], axis=-2).reshape(*codes.shape[:-2], -1, codes.shape[-1])
    found = jnp.full(each.shape, LEVELS[0], jnp.float32)
    for code, level in enumerate(LEVELS[1:], 1):  # elementwise, where a look-up would be a gather
        found = jnp.where(each >= code, level, found)
    rows, blocks = each.shape[-2], scale.shape[-2]
    few = min(rows // BLOCK + 2, blocks)
    begin = jnp.minimum(first // BLOCK, blocks - few)
    wide = jnp.repeat(jax.lax.dynamic_slice_in_dim(scale, begin, few, axis=-2), BLOCK, axis=-2)
    return found * jax.lax.dynamic_slice_in_dim(wide, first - begin * BLOCK, rows, axis=-2)


def matrix(held: Mapping[str, Any], name: str) -> Array:
    """The matrix of that name among a part's arrays, made whole where it is quantised."""
    scale = held.get(f"{name}_scale")
    return held[name] if scale is None else dequantised(held[name], scale, held.get(f"{name}_first", 0))


def kernel(module: nnx.Module, name: str) -> Array:
    """The same of a module."""
    return matrix({part: getattr(module, part)[...] for part in (name, f"{name}_scale") if hasattr(module, part)}, name)


def times(module: nnx.Module, name: str, x: Array, compute: precision.Compute) -> Any:
    """x times the module's matrix of that name, float32."""
    held, scale = getattr(module, name)[...], getattr(module, f"{name}_scale", None)
    if scale is None:
        return precision.matmul(x, held, compute, wide=True)
    return product(x.astype(precision.dtype(compute)), held, scale[...], compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: Array, codes: Array, scale: Array, compute: precision.Compute) -> Array:
    """`x[..., in] @ W`, float32; x of the compute type. For its gradient, codes and scales are kept, and not W."""
    return precision.matmul(x, dequantised(codes, scale), compute, wide=True)


def _forward(x: Array, codes: Array, scale: Array, compute: precision.Compute) -> Any:
    return product(x, codes, scale, compute), (codes, scale)


def _backward(compute: precision.Compute, saved: tuple[Array, Array], towards: Array) -> tuple[Array, None, None]:
    # Not the way forward's matrices, which would lie there all the while: after `towards` is known, made anew.
    codes, scale, towards = jax.lax.optimization_barrier((*saved, towards))
    turned = precision.swapped(dequantised(codes, scale).astype(precision.dtype(compute)))
    return precision.matmul(towards, turned, compute), None, None


product.defvjp(_forward, _backward)
