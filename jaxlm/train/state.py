"""The training state, where it lies on the mesh, and the program that a stage builds around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxlm.base import sharding
from jaxlm.base.arrays import Array
from jaxlm.model import layout
from jaxlm.model.config import ModelConfig
from jaxlm.model.lora import joined
from jaxlm.model.weights import Definition, Params, initialize
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.spikes import nothing_seen


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
    """int32 `[]`: steps that changed nothing because loss or gradient was not finite, or a spike"""
    halt: Any = np.int32(-1)
    """int32 `[]`: 0: stand still after a bad step, until the loop has looked (`replay/blackbox.py`); that step, while
    it does; -1: never do"""
    recent: Any = {}  # noqa: RUF012 (never changed in place)
    """what the last good steps had (`spikes.py`); an empty dict where no step is judged by them"""

    def turned(self, back: Any, halt: Any) -> "TrainState":
        """The same with `back` skipped steps fewer, and `halt` as given."""
        return self._replace(step=self.step - back, skipped=self.skipped - back, halt=halt)


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
    base: Callable[[], dict[str, Params]] = dict
    """() → what every batch takes and nothing changes, read once: "base", the frozen weights under adapters, and
    "teacher"; {} where there is neither"""

    def whole(self, params: Params) -> Params:
        """A state's parameters, with the frozen ones under them."""
        return joined(self.base().get("base", {}), params)


def make_program(
    step: Callable[..., Any],
    definition: Definition,
    optimizer: optax.GradientTransformation,
    batch: dict[str, Any],
    mesh: Mesh,
    *,
    rule: OptimizerConfig,
    start: Callable[[Any], Params],
    base: Callable[[], dict[str, Params]] = dict,
) -> Program:
    """The step with pinned shardings, of a state with this optimizer; nothing is computed or allocated here.

    `batch` are its abstract arrays with their shardings. `start` makes the first parameters, given their shardings:
    `from_seed`, or a function that reads them. `base`: as the program's; its abstract arrays are in `batch`.
    """

    def initial(params: Params) -> TrainState:
        return initial_state(params, optimizer, rule.ema > 0, rule.spike_window if rule.spike_limit else 0)

    abstract = jax.eval_shape(initial, definition.abstract())
    placed = state_shardings(abstract, definition, mesh)
    batch_placed = jax.tree.map(lambda x: x.sharding, batch)

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
        base=base,
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


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, ema: bool, spike_window: int = 0
) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        optimizer=optimizers.init(optimizer, params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        skipped=jnp.int32(0),
        halt=jnp.int32(-1),
        recent=nothing_seen(spike_window),
    )


def state_shardings(state: Any, definition: Definition, mesh: Mesh) -> Any:
    """What is kept for a weight lies as its declaration says (`optimizer.state_axes`), the rest is replicated.

    A leaf belongs to the weight whose whole path stands in its own: moments keep the parameters' paths.
    """
    definition.shardings(mesh)  # refuses what the mesh does not divide
    declared = dict(definition.weights)

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        parts = tuple(key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey))
        for start in range(len(names)):
            if names[start:] in declared:
                axes = optimizers.state_axes(declared[names[start:]], parts, tuple(leaf.shape))
                return NamedSharding(mesh, sharding.fitting_spec(mesh.shape, axes, leaf.shape))
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def convert_layout(tree: Any, config: ModelConfig, stacked: bool) -> Any:
    """A state with its layers stacked or unrolled: parameters, averages and moments alike."""
    turn = layout.stack if stacked else layout.unroll
    is_model = lambda x: (
        isinstance(x, dict) and not x.keys().isdisjoint(("embedding", "layers", "lead", "stack", "tail"))
    )
    return jax.tree.map(lambda x: turn(x, config) if is_model(x) else x, tree, is_leaf=is_model)
