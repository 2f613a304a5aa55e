"""What a model is outside of this package: a definition, and parameters as a plain nested dict.

A weight is declared once, in a module's constructor, with its shape, logical axes and initialiser:

    self.up = weight((D, F), ("embed", "mlp"), Normal(D**-0.5))

Shardings, counts, decay masks and optimizer rules derive from that. `define` collects the declarations of a module
tree, `initialize` makes the numbers, and `apply`, the only caller of `nnx.merge`, first holds the given parameters
against the declarations: `nnx.merge` itself pairs leaves by order, ignores names and takes any shape.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import rng, sharding
from jaxlm.base.precision import Compute

Params = dict[str, Any]
Result = TypeVar("Result")


class Normal(NamedTuple):
    """Normal numbers of this standard deviation, cut at three of them."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype) * jnp.asarray(self.std, dtype)


class Constant(NamedTuple):
    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight, as `Definition.weights` lists it."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    """Logical names of the axes; "layers" first when layers are stacked."""
    init: Normal | Constant
    matrix: bool
    """Whether the last two axes are a matrix [in, out] of the network's inside (Muon's case)."""
    name: str
    """Path without layer numbers, such as layers/attention/query: what names its random numbers."""
    layers: tuple[int, ...]
    """Global indices of the layers stacked here; one index when unstacked; empty outside of the layers."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A model without its numbers: hashable, so a static argument of compiled functions."""

    graphdef: Any
    weights: tuple[tuple[tuple[str, ...], Weight], ...]
    compute: Compute
    """Type of the factors in matrix products."""

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], Weight]]:
        return iter(self.weights)

    def tree(self, make: Callable[[Weight], Any]) -> Params:
        """A nested dict like the parameters, with `make(weight)` at each leaf."""
        return self.filled([make(declared) for _, declared in self.weights])

    def filled(self, leaves: Sequence[Any]) -> Params:
        """The same with these leaves, one a weight and in the weights' order."""
        tree: Params = {}
        for (path, _), leaf in zip(self.weights, leaves, strict=True):
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = leaf
        return tree

    def part(self, keep: Callable[[Weight], bool]) -> "Definition":
        """The same with those weights alone: for trees of them, `apply` needs all."""
        return dataclasses.replace(self, weights=tuple((path, w) for path, w in self.weights if keep(w)))

    def of(self, tree: Params) -> "Definition":
        """The same with those weights alone that a tree has."""
        given = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        return dataclasses.replace(self, weights=tuple((path, w) for path, w in self.weights if path in given))

    def abstract(self) -> Params:
        return self.tree(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype))

    def shardings(self, mesh: jax.sharding.Mesh) -> Params:
        return self.tree(lambda w: sharding.weight_sharding(mesh, w.name, w.axes, w.shape, w.dtype.itemsize))

    def parameter_count(self) -> int:
        return sum(math.prod(w.shape) for _, w in self.weights)


def weight(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Normal | Constant,
    *,
    matrix: bool = False,
    kind: Any = jnp.float32,
) -> nnx.Param:
    """Declares a weight, float32 but for keys; no number is made here."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, kind), axes=axes, init=init, matrix=matrix, layers=())


def number(block: nnx.Module, layers: tuple[int, ...], *, stacked: bool) -> nnx.Module:
    """Tells the declarations of a block which layers it holds, `stacked` along a new first axis or just one."""
    for _, declared in nnx.iter_graph(block):
        if not isinstance(declared, nnx.Variable):
            continue
        declared.set_metadata(layers=layers)
        if stacked:
            abstract = declared.get_value()
            declared.set_value(jax.ShapeDtypeStruct((len(layers), *abstract.shape), abstract.dtype))
            declared.set_metadata(axes=("layers", *declared.get_metadata()["axes"]))
    return block


def canonical(path: tuple[str, ...]) -> str:
    """The name of a weight in any layout: without numbers, all of the layers' under "layers".

    >>> canonical(("stack", "0", "attention", "query"))
    'layers/attention/query'
    """
    words = [part for part in path if not part.isdigit()]
    return "/".join(["layers" if words[0] in ("lead", "stack", "tail") else words[0], *words[1:]])


def define(module: nnx.Module, compute: Compute, matrix_dtype: Any = jnp.float32) -> Definition:
    """The definition of a module tree; `matrix_dtype` other than float32 is for inference copies of the weights."""
    graphdef, state = nnx.split(module)
    weights = []
    for path, declared in nnx.to_flat_state(state):
        meta = declared.get_metadata()
        names = tuple(str(part) for part in path)
        abstract = declared.get_value()
        # Adapters train whatever type their matrix lies in; a router's rounding would send tokens elsewhere.
        large = (meta["matrix"] and not {"rank", "routes"} & {*meta["axes"]}) or "vocab" in meta["axes"]
        weights.append(
            (
                names,
                Weight(
                    shape=tuple(abstract.shape),
                    dtype=jnp.dtype(matrix_dtype if large else abstract.dtype),
                    axes=meta["axes"],
                    init=meta["init"],
                    matrix=meta["matrix"],
                    name=canonical(names),
                    layers=meta["layers"],
                ),
            )
        )
    return Definition(graphdef, tuple(weights), compute)


def initialize(definition: Definition, seed: int) -> Params:
    """Initial values; a layer's numbers depend on the seed, the weight's name and the layer's global index only."""

    def make(declared: Weight) -> jax.Array:
        if len(declared.axes) == 0 or declared.axes[0] != "layers":
            layer = declared.layers  # () or (index,)
            return declared.init(rng.key(seed, "init", declared.name, *layer), declared.shape, declared.dtype)

        def one(layer: jax.Array) -> jax.Array:
            return declared.init(rng.key(seed, "init", declared.name, layer), declared.shape[1:], declared.dtype)

        return jax.vmap(one)(jnp.array(declared.layers, jnp.uint32))

    return definition.tree(make)


def apply(definition: Definition, params: Params, run: Callable[[Any], Result]) -> Result:
    """`run(module)` with the module holding `params`. Raises ValueError where they differ from the declarations.

    >>> logits = apply(definition, params, lambda model: model.logits(model(ids)))
    """
    given = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    declared = dict(definition.weights)
    problems = [f"missing: {'/'.join(path)}" for path in declared if path not in given]
    problems += [f"unknown: {'/'.join(path)}" for path in given if path not in declared]
    problems += [
        f"{'/'.join(path)}: got {leaf.dtype}{tuple(leaf.shape)}, declared {declared[path].dtype}{declared[path].shape}"
        for path, leaf in given.items()
        if path in declared and (tuple(leaf.shape), leaf.dtype) != (declared[path].shape, declared[path].dtype)
    ]
    if problems:
        raise ValueError("parameters do not fit the model:\n  " + "\n  ".join(problems))
    return run(nnx.merge(definition.graphdef, params))
