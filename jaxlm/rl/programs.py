"""The compiled programs of reinforcement learning: an iteration, and one of its updates alone, to look at.

    program = iteration_program(config, mesh, directories, step)      # a rollout and a state → the next state
    update = update_program(program, config, step)                    # (policy, value) and a minibatch → the next ones

`step` is a stage's, such as `stages/rl.ppo_step`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.model.lora import trained
from jaxlm.rl.config import RLConfig
from jaxlm.rl.learner import Frozen, Learner, Models, RLState, Update, Updated, updates_a_rollout
from jaxlm.rl.models import (
    Directories,
    Part,
    abstract_batch,
    define_models,
    first_policy,
    first_value,
    load_frozen,
    row_length,
)
from jaxlm.train import optimizer as optimizers
from jaxlm.train.state import Program, Shardings


def bound(config: RLConfig, models: Models, step: Callable[..., Any]) -> Update:
    """The step with its optimizers."""
    given: dict[str, Any] = {"policy_optimizer": optimizers.make_optimizer(config.optimizer, trained(models.policy))}
    if config.ppo is not None and models.value is not None:
        rule = config.ppo.value_optimizer
        given["value_optimizer"] = optimizers.make_optimizer(rule, trained(models.value))
    return functools.partial(step, config=config, models=models, **given)


def iteration_program(
    config: RLConfig,
    mesh: Mesh,
    directories: Directories,
    step: Callable[..., Any],
    first_adapters: Callable[..., Any],
    frozen: Callable[[], Frozen] | None = None,
) -> Program:
    """What `learner.Learner` does with a rollout. `first_adapters`: as `adapters/training.py` has it. `frozen`: () →
    what `load_frozen` reads, where it is read already."""
    models = define_models(config, directories, mesh)
    batch = abstract_batch(config, models, mesh, row_length(config, directories.policy.config, mesh))
    read = frozen or (lambda: load_frozen(directories, models, batch["frozen"]))
    adapters = functools.partial(first_adapters, config.seed, read)
    update: Any = bound(config, models, step)
    rule = config.optimizer
    window = rule.spike_window if rule.spike_limit else 0
    policy = Part(models.policy, update.keywords["policy_optimizer"], mesh, ema=rule.ema > 0, spike_window=window)
    value = None
    if config.ppo is not None and models.value is not None:
        value = Part(models.value, update.keywords["value_optimizer"], mesh)
    whole = sharding.replicated(mesh)
    number = lambda kind: jax.ShapeDtypeStruct((), kind, sharding=whole)
    abstract = RLState(
        step=number(jnp.int32),
        policy=policy.abstract,
        value=value.abstract if value else (),
        coefficient=number(jnp.float32),
        kl=number(jnp.float32),
        skipped=number(jnp.int32),
    )

    def initialize() -> RLState:
        numbers = RLState(
            step=jnp.int32(0),
            policy=(),
            value=(),
            coefficient=jnp.float32(config.penalty.coefficient if config.penalty else 0.0),
            kl=jnp.float32(0),
            skipped=jnp.int32(0),
        )
        return jax.device_put(numbers, whole)._replace(
            policy=policy.initial(first_policy(config, directories, models, policy.placed.params, adapters)),
            value=value.initial(first_value(config, directories, models, value.placed.params, adapters))
            if value
            else (),
        )

    placed = jax.tree.map(lambda x: x.sharding, (abstract, batch))
    return Program(
        step=jax.jit(
            Learner(config, models, update),
            in_shardings=placed,
            out_shardings=(placed[0], whole, whole),
            donate_argnums=0,
        ),
        initialize=initialize,
        abstract_state=abstract,
        abstract_batch=batch,
        shardings=Shardings(*placed),
        mesh=mesh,
        base=lambda: {"frozen": read()},
    )


def update_program(iteration: Program, config: RLConfig, models: Models, step: Callable[..., Any]) -> Program:
    """One update, as an iteration of `iteration` has many: (Updated, {"examples", "rows", "frozen"}) → the next."""
    abstract = Updated(iteration.abstract_state.policy, iteration.abstract_state.value)
    with jax.set_mesh(iteration.mesh):
        answers = jax.eval_shape(iteration.step, iteration.abstract_state, iteration.abstract_batch)[2]
    whole, minibatch = sharding.replicated(iteration.mesh), config.minibatch_answers
    some = lambda x, size: (size, *x.shape[1:])
    batch = {
        "examples": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(some(x, minibatch), x.dtype, sharding=whole), answers.examples
        ),
        "rows": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                some(x, x.shape[0] // updates_a_rollout(config)), x.dtype, sharding=x.sharding
            ),
            iteration.abstract_batch.get("pretraining", {}),
        ),
        "frozen": iteration.abstract_batch["frozen"],
    }
    update = bound(config, models, step)

    def one(state: Updated, batch: dict[str, Any]) -> tuple[Updated, dict[str, Any]]:
        after, measured = update(state.policy, state.value, batch["examples"], batch["rows"], batch["frozen"])
        return Updated(*after), measured

    placed = jax.tree.map(lambda x: x.sharding, (abstract, batch))
    return iteration._replace(
        step=jax.jit(one, in_shardings=placed, out_shardings=(placed[0], whole), donate_argnums=0),
        abstract_state=abstract,
        abstract_batch=batch,
        shardings=Shardings(*placed),
    )
