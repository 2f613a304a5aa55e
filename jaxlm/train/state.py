"""The training state, where it lies on the mesh, and the program that a stage builds around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm.base import sharding
from jaxlm.base.arrays import Array
from jaxlm.model import layout
from jaxlm.model.config import ModelConfig
from jaxlm.model.weights import Definition, Params, initialize
from jaxlm.train import optimizer as optimizers


class TrainState(NamedTuple):
    """All that a step changes. Keys are not in it: they come from names and the step."""

    step: Array
    """int32 `[]`: steps taken, skipped ones included; the next batch is the data's at this step"""
    params: Params
    optimizer: Any
    """Optax's state"""
    ema: Params
    """running average of the parameters; an empty dict without one"""
    skipped: Array
    """int32 `[]`: steps that changed nothing because loss or gradient was not finite"""


class Shardings(NamedTuple):
    state: Any
    batch: Any


class Program(NamedTuple):
    """What a training stage hands to the loop, to the planner and to replay."""

    step: Any
    """a jitted function (state, batch) → (state, metrics); compiled once, donates the state"""
    initialize: Callable[[], Any]
    """() → the state before the first step, made in place on the mesh"""
    abstract_state: Any
    """ShapeDtypeStructs with shardings"""
    abstract_batch: Any
    shardings: Shardings
    mesh: Mesh


def make_program(
    step: Callable[..., Any],
    definition: Definition,
    optimizer: optax.GradientTransformation,
    batch: dict[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    *,
    ema: bool,
    start: Callable[[Any], Params],
) -> Program:
    """The step with pinned shardings, of a state with this optimizer; nothing is computed or allocated here.

    `batch` are its abstract arrays with their shardings. `start` makes the first parameters, given their shardings:
    `from_seed`, or a function that reads them.
    """

    def initial(params: Params) -> TrainState:
        return initial_state(params, optimizer, ema)

    abstract = jax.eval_shape(initial, definition.abstract())
    placed = state_shardings(abstract, definition, mesh)
    batch_placed = {name: x.sharding for name, x in batch.items()}

    return Program(
        step=jax.jit(
            step,
            in_shardings=(placed, batch_placed),
            out_shardings=(placed, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
        initialize=lambda: jax.jit(initial, out_shardings=placed, donate_argnums=0)(start(placed.params)),
        abstract_state=with_shardings(abstract, placed),
        abstract_batch=batch,
        shardings=Shardings(placed, batch_placed),
        mesh=mesh,
    )


def from_seed(definition: Definition, seed: int) -> Callable[[Any], Params]:
    """shardings → initial parameters, made in place."""
    return lambda placed: jax.jit(lambda: initialize(definition, seed), out_shardings=placed)()


def abstract_rows(mesh: Mesh, rows: int, row_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a global batch of packed rows."""
    placed = sharding.batch_sharding(mesh)
    make = lambda kind: jax.ShapeDtypeStruct((rows, row_length), kind, sharding=placed)
    whole_numbers = {name: make(jnp.int32) for name in ("ids", "segment_ids", "positions")}
    return whole_numbers | {"loss_mask": make(jnp.bool_)}


def initial_state(params: Params, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        optimizer=optimizers.init(optimizer, params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        skipped=jnp.int32(0),
    )


def state_shardings(state: Any, definition: Definition, mesh: Mesh) -> Any:
    """Everything shaped like a weight lies as the weight does, the rest is replicated.

    A leaf belongs to the weight whose whole path ends its own: moments keep the parameters' paths.
    """
    placed = {path: (w.shape, s) for (path, w), s in zip(definition, _leaves(definition.shardings(mesh)), strict=True)}

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            shape, weight_sharding = placed.get(names[start:], ((), None))
            if weight_sharding is not None and tuple(leaf.shape) == shape:
                return weight_sharding
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)


def _leaves(shardings: Params) -> list[NamedSharding]:
    return jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def convert_layout(tree: Any, config: ModelConfig, stacked: bool) -> Any:
    """A state with its layers stacked or unrolled: parameters, averages and moments alike."""
    turn = layout.stack if stacked else layout.unroll
    is_model = lambda x: isinstance(x, dict) and "embedding" in x
    return jax.tree.map(lambda x: turn(x, config) if is_model(x) else x, tree, is_leaf=is_model)
