"""Models whose frozen matrices are quantised while they are read."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array
from jaxlm.model.config import Base
from jaxlm.model.lora import joined
from jaxlm.model.quantised import BLOCK, LEVELS
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.train.model_directory import ModelDirectory

BASES: dict[Any, Base] = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.uint8): "nf4"}


class Quantising(ModelDirectory):
    """A model directory that gives codes and scales where a definition asks for them. One weight (all layers of it,
    where they are stacked) is whole in memory at a time."""

    @classmethod
    def of(cls, model: ModelDirectory) -> "Quantising":
        return cls(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})

    def load_params(self, definition: Definition, shardings: Any = None, *, part: Definition | None = None) -> Params:
        stored, wanted = _whole(definition), part or definition
        coded = [(path, w) for path, w in wanted if w.dtype in BASES]
        kept = _whole(wanted.part(lambda w: not is_quantised(w)))
        params = super().load_params(stored, shardings, part=kept)
        for path, declared in coded:
            one = _whole(dataclasses.replace(wanted, weights=((path, declared),)))
            node = read = super().load_params(stored, shardings, part=one)
            placed = shardings
            for step in path[:-1]:
                node, placed = node[step], placed and placed[step]
            name, scales = path[-1], f"{path[-1]}_scale"
            where = placed and (placed[name], placed[scales])
            make = jax.jit(quantise, static_argnames="base", out_shardings=where)
            node[name], node[scales] = make(node[name], base=BASES[declared.dtype])
            params = joined(params, read)
        return params


def quantise(kernel: Array, base: Base) -> tuple[Array, Array]:
    """(codes, scales) of a matrix, or of several along first axes; the nearest of what there is."""
    kernel = kernel.astype(jnp.float32)
    *first, D, F = kernel.shape
    size = D if base == "int8" else BLOCK
    blocks = jnp.pad(kernel, [(0, 0)] * len(first) + [(0, -D % size), (0, 0)]).reshape(*first, -1, size, F)
    scale = jnp.max(jnp.abs(blocks), axis=-2) / (127 if base == "int8" else 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    scaled = (blocks / scale[..., None, :]).reshape(*first, -1, F)[..., :D, :]
    if base == "int8":
        return jnp.round(scaled).astype(jnp.int8), scale
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for low, high in itertools.pairwise(LEVELS):
        codes += (scaled > (low + high) / 2).astype(jnp.uint8)
    return codes[..., ::2, :] | codes[..., 1::2, :] << 4, scale


def is_quantised(declared: Weight) -> bool:
    """Whether it is the codes or the scales of a matrix."""
    return declared.dtype in BASES or declared.name.endswith("_scale")


def _whole(definition: Definition) -> Definition:
    """The same with its matrices as they are stored, float32 and without scales."""

    def stored(declared: Weight) -> Weight:
        if declared.dtype not in BASES:
            return declared
        *first, rows, columns = declared.shape
        rows *= 2 if BASES[declared.dtype] == "nf4" else 1
        return dataclasses.replace(declared, shape=(*first, rows, columns), dtype=jnp.dtype(jnp.float32), matrix=True)

    kept = tuple((path, stored(w)) for path, w in definition if w.dtype in BASES or not is_quantised(w))
    return dataclasses.replace(definition, weights=kept)
