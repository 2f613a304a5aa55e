"""Adapters' numbers: how they begin, the keys of what is dropped, and the plain model that they make of their base."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.base import rng
from jaxlm.base.arrays import Array
from jaxlm.base.errors import ConfigError, nearest
from jaxlm.model import lora, quantised
from jaxlm.model.config import LoRAConfig
from jaxlm.model.lora import HIGHEST
from jaxlm.model.weights import Definition, Params, Weight, initialize


def require_targets(definition: Definition, config: LoRAConfig, whose: str = "") -> None:
    """Raises ConfigError for a target that names no matrix that takes adapters; `definition`: of the plain model, and
    `whose` layers, where a run has several."""
    every = {w.name for _, w in definition if w.matrix and w.layers}
    for target in config.targets:
        alone = dataclasses.replace(config, targets=(target,))
        if not any(lora.takes(alone, name) for name in every):
            if any(lora.matches(target, name) for name in every):
                raise ConfigError("lora.targets", f"{target!r} names routers alone, which stay frozen")
            known = [w for name in every if not name.endswith("/router") for w in (name, name.rpartition("/")[2])]
            raise ConfigError("lora.targets", f"{target!r} is no matrix of the layers{whose}{nearest(target, known)}")


def begin(definition: Definition, base: Params, seed: int, placed: Any) -> Params:
    """The first values of what changes beside a frozen `base`, on these shardings."""
    make = lambda base: with_magnitudes(initialize(lora.trained(definition), seed), base)
    return jax.jit(make, out_shardings=placed)(base)


def with_magnitudes(params: Params, base: Params) -> Params:
    """Adapters whose DoRA magnitudes are the norms of the base's columns, as they begin."""
    made: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            value = with_magnitudes(value, base.get(name, {}))
        elif name.endswith("_lora_magnitude"):
            own = name.removesuffix("_lora_magnitude")
            value = lora.column_norms(
                quantised.matrix(base, own), params[f"{own}_lora_a"], params[f"{own}_lora_b"], 0.0
            )
        made[name] = value
    return made


def dropout_keys(definition: Definition, seed: int, step: Array, piece: Array) -> Params:
    """The keys of a step's piece, for every matrix and layer its own, whether layers are stacked or not."""

    def make(declared: Weight) -> Array:
        data = lambda layer: jax.random.key_data(rng.key(seed, "dropout", step, piece, declared.name, layer))
        layers = jnp.array(declared.layers, jnp.uint32)
        return jax.vmap(data)(layers) if declared.axes[0] == "layers" else data(layers[0])

    return definition.part(lambda w: w.name.endswith("_lora_key")).tree(make)


def merged(params: Params, config: LoRAConfig) -> Params:
    """The plain model's parameters, W + scale · A B in each matrix's place; in either layout, to be jitted."""
    made: Params = {}
    scales = {f"{name}_scale" for name in params}
    for name, value in params.items():
        if isinstance(value, dict):
            made[name] = merged(value, config)
        elif "_lora_" not in name and name not in scales:
            a, b, magnitude = (params.get(f"{name}_lora_{part}") for part in ("a", "b", "magnitude"))
            kernel = quantised.matrix(params, name)
            made[name] = kernel if a is None else merged_matrix(kernel, a, b, magnitude, config.scale)
    return made


def merged_matrix(kernel: Array, a: Any, b: Any, magnitude: Array | None, scale: float) -> Array:
    """W + scale · A B, with a magnitude its columns scaled to that; float32."""
    whole = kernel + scale * jnp.einsum("...dr,...rf->...df", a, b, precision=HIGHEST)
    return whole if magnitude is None else whole * (magnitude / lora.column_norms(kernel, a, b, scale))[..., None, :]
