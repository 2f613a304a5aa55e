"""Optimizers from Optax, each weight under the rule that its declaration calls for.

The direction is computed without the learning rate, which the step multiplies in, in plain sight. Rules act per
layer: on stacked layers they give what they give on each layer alone (tested for every optimizer).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.base.arrays import Array, Bool
from jaxlm.base.errors import ConfigError
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.train.config import OptimizerConfig

# Updates scaled so that their root mean square is AdamW's usual 0.2: one learning rate serves both rules
# (arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2


@contextlib.contextmanager
def _optax_promotion() -> Iterator[None]:
    """Optax multiplies float32 by weak Python and integer types; the one place where strict promotion is lifted."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def rule(declared: Weight, config: OptimizerConfig) -> str:
    """ "muon" or "adamw" for a weight."""
    return "muon" if config.kind == "muon" and declared.matrix else "adamw"


def decays(declared: Weight) -> bool:
    """Matrices and tables decay; norms and other vectors do not."""
    return declared.matrix or "vocab" in declared.axes


def table(definition: Definition, config: OptimizerConfig) -> list[tuple[str, str, str]]:
    """(weight, shape, rule and decay) for every weight, as printed at the start of a run.

    The weights of unrolled layers that are alike share a row: ("layers/*/mlp/up", "3 of 256 x 768", ...).
    """
    alike: dict[tuple[str, str, str], int] = {}
    for path, declared in definition:
        ruled = rule(declared, config)
        if declared.axes[0] == "vocab" and config.embedding_rate != 1:
            ruled += f", rate x {config.embedding_rate:g}"
        if decays(declared):
            ruled += f", decay {config.weight_decay:g}"
        name = "/".join("*" if part.isdigit() else part for part in path)
        row = (name, " x ".join(map(str, declared.shape)), ruled)
        alike[row] = alike.get(row, 0) + 1
    return [(name, f"{n} of {shape}" if n > 1 else shape, ruled) for (name, shape, ruled), n in alike.items()]


def make_optimizer(config: OptimizerConfig, definition: Definition) -> optax.GradientTransformation:
    """(gradients, state, params) → (direction, state); the step adds learning rate × direction."""
    heads = any(declared.axes[-1] in ("vocab", "criteria") for _, declared in definition)
    if config.embedding_rate != 1 and not heads:
        raise ConfigError("optimizer.embedding_rate", "a tied embedding is the output head too; leave its rate at 1")
    tables = optax.masked(optax.scale(config.embedding_rate), definition.tree(lambda w: w.axes[0] == "vocab"))
    # Decay comes last, at the step's own rate for every weight.
    decay = optax.chain(tables, optax.add_decayed_weights(-config.weight_decay, definition.tree(decays)))
    if config.kind == "adamw":
        adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
        return optax.chain(adam, optax.scale(-1.0), decay)
    # Matrices are declared [in, out] in their last two axes; an axis before them is layers, one matrix each.
    # Muon gets every matrix by name: left alone, it would hand stacked kernels to Adam without a word.
    one_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = optax.contrib.muon(
        learning_rate=1.0,
        beta=config.muon_momentum,
        consistent_rms=MUON_UPDATE_RMS,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.epsilon,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=definition.tree(lambda w: one_matrix if w.matrix else None),
    )
    # Decay is added here for both rules, by our own mask: optax's would decay norms too.
    return optax.chain(muon, decay)


def init(optimizer: optax.GradientTransformation, params: Params) -> Any:
    with _optax_promotion():
        return optimizer.init(params)


def direction(
    optimizer: optax.GradientTransformation, gradients: Params, state: Any, params: Params
) -> tuple[Any, Any]:
    with _optax_promotion():
        return optimizer.update(gradients, state, params)


def clip(gradients: Params, norm: Array, limit: float) -> Params:
    """Scales the gradients down to the global norm `limit` where `norm` is above it; 0: never."""
    if not limit:
        return gradients
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, gradients)


def global_norm(tree: Any) -> Array:
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.float32(0)))


def where(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` when `good`, else `old`: how a bad step leaves no trace."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
