"""The parts of a step that every stage takes the same way: gradients in pieces, and what becomes of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.base import metrics
from jaxlm.base.arrays import Array, Bool, Float32
from jaxlm.base.metrics import Mean
from jaxlm.model.weights import Definition, Params
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.spikes import is_spike, remembered
from jaxlm.train.state import TrainState

Objective = Callable[[Params, Any], tuple[jax.Array, Any]]


def gradients_in_pieces(
    objective: Objective, params: Params, batch: Any, pieces: int
) -> tuple[tuple[jax.Array, Any], Params]:
    """((objective, its sums), gradients) over a batch of rows `[B, …]`, worked off in `pieces`, one after the other.

    The objective of a piece is a sum over its rows, so pieces and devices only add.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    return summed_in_pieces(lambda rows: gradient(params, rows), batch, pieces)


def summed_in_pieces(make: Callable[[Any], Any], batch: Any, pieces: int) -> Any:
    """The sum of `make(piece)` over the pieces."""
    if pieces == 1:
        return make(batch)
    # Piece a takes rows a, a + A, …: each device splits its own rows, nothing moves between devices.
    each = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), each)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(make, one))

    def add(total: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, make(rows)), None

    return jax.lax.scan(add, zero, each)[0]


def apply_gradients(
    state: TrainState,
    gradients: Params,
    loss: Float32[Array, ""],
    good: Bool[Array, ""],
    rate: Float32[Array, ""],
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    definition: Definition,
    also: Callable[[Params], Params] = lambda params: params,
) -> tuple[TrainState, dict[str, Mean]]:
    """The state after one more step: clipped gradients through the optimizer, and the average of the parameters.

    A step that is not `good`, whose gradient is not finite, or whose `loss` or gradient norm is a spike changes nothing
    but the counts; after one, a state that can halt (`TrainState.halt`) changes no more until the loop has looked.
    `also` is done to new parameters besides (`routing/balance.py`).
    """
    norm = optimizers.global_norm(gradients)
    by_group = optimizers.norms_by_group(gradients, definition)
    good &= jnp.isfinite(norm)
    now = jnp.stack([loss, norm])
    if config.spike_limit:
        good &= ~is_spike(state.recent, now, config.spike_limit)
    halted = state.halt > 0
    bad, good = ~(good | halted), good & ~halted
    gradients = optimizers.clip(gradients, norm, config.clip_norm)
    direction, optimizer_state = optimizers.direction(optimizer, gradients, state.optimizer, state.params)
    params = also(jax.tree.map(lambda p, d: p + rate * d, state.params, direction))
    decay = config.ema
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params) if decay else {}
    kept = TrainState(
        step=state.step + jnp.where(halted, 0, 1),
        params=optimizers.where(good, params, state.params),
        optimizer=optimizers.where(good, optimizer_state, state.optimizer),
        ema=optimizers.where(good, ema, state.ema),
        skipped=state.skipped + jnp.where(bad, 1, 0),
        halt=jnp.where(bad & (state.halt == 0), state.step + 1, state.halt),
        recent=optimizers.where(good, remembered(state.recent, now), state.recent) if config.spike_limit else {},
    )
    return kept, {
        "train/gradient_norm": metrics.scalar(norm),
        **{f"train/gradient_norm/{name}": metrics.scalar(part) for name, part in by_group.items()},
        "train/update_norm": metrics.scalar(rate * optimizers.global_norm(direction)),
        "train/parameter_norm": metrics.scalar(optimizers.global_norm(state.params)),
        "train/learning_rate": metrics.scalar(rate),
        "train/skipped_steps": metrics.scalar(kept.skipped),
    }
