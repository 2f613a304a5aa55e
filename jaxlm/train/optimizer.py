"""Optimizers, from Optax where it has them, each weight under the rule that its declaration calls for.

The direction is computed without the learning rate, which the step multiplies in, in plain sight. Rules act per
layer: on stacked layers they give what they give on each layer alone (tested for every optimizer).
"""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.base.arrays import Array, Bool
from jaxlm.base.errors import ConfigError
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.muon import scale_by_muon
from jaxlm.train.soap import scale_by_soap

# Updates scaled so that their root mean square is AdamW's usual 0.2: one learning rate serves both rules
# (arXiv:2502.16982, section 2.2).
MUON_UPDATE_RMS = 0.2


@contextlib.contextmanager
def _optax_promotion() -> Iterator[None]:
    """Optax multiplies float32 by weak Python and integer types; the one place where strict promotion is lifted."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def rule(declared: Weight, config: OptimizerConfig) -> str:
    """The rule for a weight: Muon and SOAP are for the inner matrices (SOAP for those with a side that is turned), the
    others for all."""
    if config.kind == "soap":
        return "soap" if declared.matrix and min(declared.shape[-2:]) <= config.soap_largest_side else "adamw"
    return config.kind if declared.matrix or config.kind != "muon" else "adamw"


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
        if ruled == "soap" and max(declared.shape[-2:]) > config.soap_largest_side:
            ruled += " of the shorter side"
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
        kept = "a tied embedding is the output head too, and one under adapters is frozen; leave its rate at 1"
        raise ConfigError("optimizer.embedding_rate", kept)
    tables = optax.masked(optax.scale(config.embedding_rate), definition.tree(lambda w: w.axes[0] == "vocab"))
    # Decay comes last, at the step's own rate for every weight.
    decay = optax.chain(tables, optax.add_decayed_weights(-config.weight_decay, definition.tree(decays)))
    if config.kind == "muon":
        return optax.chain(_muon(config, definition), decay)
    return optax.chain(_ascent(config, definition), optax.scale(-1.0), decay)


def _ascent(config: OptimizerConfig, definition: Definition) -> optax.GradientTransformation:
    """The direction against the descent, of a size about 1 but for SGD's."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    match config.kind:
        case "lion":
            return optax.scale_by_lion(b1=config.b1, b2=config.lion_momentum)
        case "sgd":
            return optax.trace(config.sgd_momentum)
        case "adafactor":
            # Each matrix is factored, whatever its size; each weight's update is clipped to a root mean square of 1.
            factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
            return per_layer(optax.chain(factored, optax.clip_by_block_rms(1.0)), definition)
        case "soap":
            sizes = config.soap_refresh_steps, config.soap_largest_side
            soap = scale_by_soap(config.b1, config.b2, config.epsilon, *sizes)
            return optax.partition({"soap": soap, "adamw": adam}, definition.tree(lambda w: rule(w, config)))
    return adam


def _muon(config: OptimizerConfig, definition: Definition) -> optax.GradientTransformation:
    # Nesterov's form for both. Muon gets every matrix by name: told by their ranks, stacked kernels would go to Adam.
    rules: dict[Any, Any] = {
        "muon": scale_by_muon(config.muon_momentum, MUON_UPDATE_RMS, definition.compute),
        "adamw": optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon, nesterov=True),
    }
    return optax.chain(optax.partition(rules, definition.tree(lambda w: rule(w, config))), optax.scale(-1.0))


def per_layer(inner: optax.GradientTransformation, definition: Definition) -> optax.GradientTransformation:
    """`inner` for every weight by itself, of stacked layers and experts for each; its state lies at the weight's own
    path."""
    stacked, tree = jax.tree.flatten(definition.tree(lambda w: sum(axis in ("layers", "experts") for axis in w.axes)))
    each = lambda function: [functools.reduce(lambda f, _: jax.vmap(f), range(depth), function) for depth in stacked]

    def init(params: Params) -> Any:
        return tree.unflatten([make(x) for make, x in zip(each(inner.init), tree.flatten_up_to(params), strict=True)])

    def update(gradients: Params, state: Any, params: Any = None) -> tuple[Any, Any]:
        given = zip(each(inner.update), *map(tree.flatten_up_to, (gradients, state, params)), strict=True)
        directions, states = zip(*(step(*of) for step, *of in given), strict=True)
        return tree.unflatten(directions), tree.unflatten(states)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def state_axes(declared: Weight, parts: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Logical names of the axes of what an optimizer keeps for a weight, at `parts` of its state; () where it is small.

    >>> state_axes(up, ("mu",), (256, 768))                  # Adam's moments: as the weight itself
    ("embed", "mlp")
    >>> state_axes(up, ("v_row",), (256,)), state_axes(up, ("v_col",), (768,))        # Adafactor's
    (("embed",), ("mlp",))
    >>> state_axes(up, ("right", "average"), (768, 768))     # SOAP's: [out, out], divided as often as the weight is
    ("mlp", "embed")
    """
    if "right" in parts and len(shape) > 1:
        *layers, rows, columns = declared.axes
        return (*layers, columns, rows)
    if shape == declared.shape or "left" in parts:
        return declared.axes
    if len(shape) == len(declared.shape) - 1 and ("v_row" in parts or "v_col" in parts):
        # Optax calls the averages over the longer axis (the last one, where they are alike) rows, the others columns.
        last_is_longer = declared.shape[-1] >= declared.shape[-2]
        over_last = ("v_row" in parts) == last_is_longer
        return declared.axes[:-1] if over_last else (*declared.axes[:-2], declared.axes[-1])
    return (None,) * len(shape)


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


def norms_by_group(tree: Params, definition: Definition) -> dict[str, Array]:
    """Norms of the embedding, of the quarters of the layers (of all, where they are fewer than four), of the rest; of
    those weights of the definition that the tree has.

    The same for stacked and unrolled layers: {"embedding": …, "layers_1": …, "head": …}.
    """
    layers = 1 + max((layer for _, declared in definition for layer in declared.layers), default=0)
    quarters = 4 if layers >= 4 else 1
    squares: dict[str, Any] = {}
    for path, declared in definition.of(tree):
        leaf: Any = functools.reduce(operator.getitem, path, tree)
        each = jnp.square(leaf)
        if not declared.layers:
            parts = {"embedding" if path[0] == "embedding" else "head": jnp.sum(each)}
        elif len(declared.layers) == 1 and declared.axes[0] != "layers":
            parts = {f"layers_{1 + declared.layers[0] * quarters // layers}": jnp.sum(each)}
        else:
            by_layer = jnp.sum(each, axis=tuple(range(1, each.ndim)))
            parts: dict[str, Any] = {}
            for place, layer in enumerate(declared.layers):
                name = f"layers_{1 + layer * quarters // layers}"
                parts[name] = parts.get(name, jnp.zeros(())) + by_layer[place]
        for name, total in parts.items():
            squares[name] = squares.get(name, jnp.zeros(())) + total
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def where(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` when `good`, else `old`: how a bad step leaves no trace."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
