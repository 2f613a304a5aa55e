"""Low-rank adapters beside frozen matrices: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353).

A matrix W [in, out] that `LoRAConfig.targets` names gets A [in, r] and B [r, out], sharded as its own axes are, and
its product becomes x W + scale · x A B; with DoRA, whose magnitude m [out] is a weight too, m / |W + scale · A B| times
that, the norm of each column taken as a constant (section 4.3 of the paper; as in Hugging Face's peft). Neither W plus
its change nor a gradient of W is made. Adapters are weights like others, of the names `query_lora_a`, `query_lora_b`,
`query_lora_magnitude`; where inputs are dropped, `query_lora_key` holds the layer's random key of the step.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Float, Float32
from jaxlm.base.errors import ConfigError
from jaxlm.model import quantised
from jaxlm.model.config import LoRAConfig
from jaxlm.model.weights import Constant, Definition, Normal, Params, Weight, weight

HIGHEST = jax.lax.Precision.HIGHEST


def declare(part: Any, name: str, lora: LoRAConfig) -> None:
    """Declares the adapters of a part of a block, of `name` such as layers/attention; those of experts, whose matrices
    are `[E, in, out]`, for each expert its own."""
    for own, value in list(vars(part).items()):
        if not isinstance(value, nnx.Param) or not value.get_metadata()["matrix"] or not takes(lora, f"{name}/{own}"):
            continue
        (*E, D, F), (*e, rows, columns) = value.get_value().shape, value.get_metadata()["axes"]
        if E and lora.dropout:  # a mask would have to follow its tokens to the experts' devices; peft takes none either
            raise ConfigError("lora.dropout", f"adapters of experts ({name}/{own}) take none; set 0, or other targets")
        # As peft: uniform numbers up to D^-1/2 have this deviation. B is 0, so that training begins at the base.
        a, b = Normal((3 * D) ** -0.5), Constant(0.0)
        setattr(part, f"{own}_lora_a", weight((*E, D, lora.rank), (*e, rows, "rank"), a, matrix=True))
        setattr(part, f"{own}_lora_b", weight((*E, lora.rank, F), (*e, "rank", columns), b, matrix=True))
        if lora.dora:
            setattr(part, f"{own}_lora_magnitude", weight((*E, F), (*e, columns), Constant(1.0)))
        if lora.dropout:
            setattr(part, f"{own}_lora_key", weight((2,), ("key",), Constant(0), kind=jnp.uint32))
    part.lora = lora


def takes(lora: LoRAConfig, name: str) -> bool:
    """Whether the matrix of that name, such as layers/attention/query, gets adapters; a router's never."""
    return not name.endswith("/router") and any(matches(target, name) for target in lora.targets)


def matches(target: str, name: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name.rpartition("/")[2], target)


def is_adapter(declared: Weight) -> bool:
    return "_lora_" in declared.name


def trained(definition: Definition) -> Definition:
    """The part of a model that changes: all of it, or where there are adapters, these and a reward model's heads."""
    if not any(is_adapter(w) for _, w in definition):
        return definition
    return definition.part(lambda w: is_adapter(w) or w.name in ("score", "score_bias"))


def over(definition: Definition, base: Params | None, params: Params) -> Params:
    """The whole model of what changes over its base, from which it takes what it has not; itself without adapters."""
    own = trained(definition)
    if base is None or len(own.weights) == len(definition.weights):
        return params
    changes = {path for path, _ in own}
    kept = dataclasses.replace(definition, weights=tuple(x for x in definition.weights if x[0] not in changes))
    return joined(part_of(kept, base), params)


def added(
    module: Any, name: str, x: Float[Array, "B S D"], product: Float32[Array, "B S F"], compute: precision.Compute
) -> Float32[Array, "B S F"]:
    """What the adapters of `name` add to the `product` of x with its matrix."""
    lora: LoRAConfig = module.lora
    a, b, key = (getattr(module, f"{name}_lora_{part}", None) for part in ("a", "b", "key"))
    assert a is not None
    assert b is not None
    if key is not None:
        bits = jax.random.wrap_key_data(key[...], impl="threefry2x32")
        x = jnp.where(jax.random.bernoulli(bits, 1 - lora.dropout, x.shape), x / (1 - lora.dropout), jnp.zeros_like(x))
    low = lora.scale * precision.matmul(precision.matmul(x, a[...], compute), b[...], compute, wide=True)
    columns = ratio(module, name)
    if columns is None:
        return low
    if key is not None:  # peft's form: the change of the magnitude sees the dropped inputs too
        product = quantised.times(module, name, x, compute)
    columns = columns[None, None, :]
    return (columns - 1) * product + columns * low


def ratio(module: Any, name: str) -> Float32[Array, "*E F"] | None:
    """DoRA's magnitude of each column of `name` over the column's norm; None without."""
    a, b, magnitude = (getattr(module, f"{name}_lora_{part}", None) for part in ("a", "b", "magnitude"))
    if a is None or b is None or magnitude is None:
        return None
    return magnitude[...] / column_norms(quantised.kernel(module, name), a[...], b[...], module.lora.scale)


def column_norms(
    kernel: Float[Array, "*L D F"], a: Float32[Array, "*L D r"], b: Float32[Array, "*L r F"], scale: float
) -> Float32[Array, "*L F"]:
    """|W + scale · A B| of each column, a constant to gradients, without making that sum: from W, WᵀA and AᵀA."""
    kernel, a, b = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (kernel, a, b))
    mixed = jnp.einsum("...df,...dr->...rf", kernel, a, precision=HIGHEST)
    square = jnp.einsum("...dr,...dq->...rq", a, a, precision=HIGHEST)
    low = jnp.einsum("...rq,...qf->...rf", square, b, precision=HIGHEST)
    change = jnp.sum(b * (2 * scale * mixed + scale**2 * low), axis=-2)
    return jnp.sqrt(jnp.maximum(jnp.sum(kernel * kernel, axis=-2) + change, 1e-30))


def joined(base: Params, params: Params) -> Params:
    """Both trees in one, no array copied; where both have a leaf, that of `params`."""
    inner = {name: joined(base[name], x) if isinstance(x, dict) and name in base else x for name, x in params.items()}
    return base | inner


def part_of(definition: Definition, tree: Params) -> Params:
    """Those leaves of a tree that the definition has, no array copied."""

    def kept(node: Params, wanted: Params) -> Params:
        return {
            name: kept(node[name], below) if isinstance(below, dict) else node[name] for name, below in wanted.items()
        }

    return kept(tree, definition.tree(lambda w: None))
