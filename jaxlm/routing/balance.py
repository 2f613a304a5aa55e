"""Training of routers: the losses that keep experts busy and logits small, and the balance without a loss.

The load-balancing loss of a layer is E Σ_e f_e P_e (arXiv:2101.03961, equations 4 to 6; Mixtral's is k times this): f_e
the share of all choices that fell on expert e, P_e its mean share of the scores; 1 where all are chosen alike. It is
that of the *global batch*, which lets experts specialise where one per piece would not (arXiv:2501.11873). Being a
product of two means, it is no sum over pieces; but its gradient flows through P alone, and given the whole batch's f
the rest is one. So where a batch is worked off in pieces, f is counted first, in a forward pass of its own: a third
more work, which `accumulate=1`, `balance_loss=0` and the choice bias do without.

Both losses are means over layers with experts, and over real tokens: prompts are routed too, targets or not.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float32
from jaxlm.base.metrics import Mean, scalar
from jaxlm.model.experts import Routing
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.routing.config import RoutingConfig
from jaxlm.train.update import summed_in_pieces


def loads(
    params_for: Callable[[Any], Params], batch: Any, pieces: int, definition: Definition, config: RoutingConfig
) -> Array | None:
    """The whole batch's `Routing.load` `[L, E]`, where pieces need it, each by its `params_for(rows)`; else None."""
    if pieces == 1 or not config.balance_loss or not any("routes" in w.axes for _, w in definition):
        return None

    def count(rows: Any) -> Array | None:
        places = rows["ids"], rows["segment_ids"], rows["positions"]
        routing = apply(definition, params_for(rows), lambda m: m.routed(*places)[1])
        return None if routing is None else routing.load

    return summed_in_pieces(count, batch, pieces)


def penalty(routing: Routing | None, load: Array | None, batch: Any, config: RoutingConfig) -> Float32[Array, ""]:
    """A piece's part of both losses, times their weights; `load` is the whole `batch`'s (None: this is all of it)."""
    if routing is None:
        return jnp.float32(0)
    tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
    z = jnp.mean(routing.squared_normalizer) / tokens
    whole = routing.load if load is None else load
    return config.balance_loss * evenness(routing._replace(load=whole), tokens) + config.router_z_loss * z


def evenness(routing: Routing, tokens: Array) -> Float32[Array, ""]:
    """Mean over layers of E Σ_e f_e P_e."""
    load = jax.lax.stop_gradient(routing.load)
    chosen = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    return load.shape[-1] * jnp.mean(jnp.sum(chosen * routing.shares / tokens, axis=-1))


def as_metrics(routing: Routing | None) -> dict[str, Mean]:
    if routing is None:
        return {}
    choices = jnp.maximum(jnp.sum(routing.load, axis=-1), 1)
    experts = routing.load.shape[-1]
    return {
        "train/balance_loss": scalar(evenness(routing, jnp.maximum(routing.tokens[0], 1))),
        "train/router_z_loss": Mean(jnp.sum(routing.squared_normalizer), jnp.sum(routing.tokens)),
        "train/expert_load": scalar(experts * jnp.mean(jnp.max(routing.load, axis=-1) / choices)),
        "train/least_expert_load": scalar(experts * jnp.mean(jnp.min(routing.load, axis=-1) / choices)),
        "train/dropped_tokens": Mean(jnp.sum(routing.dropped), jnp.sum(routing.load)),
    }


def balanced(params: Params, routing: Routing | None, definition: Definition, rate: float) -> Params:
    """Choice biases after a step: those of experts chosen less often than the mean go up by `rate`, others down."""
    biases = {path: w for path, w in definition if path[-1] == "choice_bias"}
    if routing is None or not biases or not rate:
        return params
    order = sorted(layer for w in biases.values() for layer in w.layers)
    error = jnp.sign(jnp.mean(routing.load, axis=-1, keepdims=True) - routing.load)
    moved = jax.tree.map(lambda x: x, params)  # new dicts
    for path, declared in biases.items():
        own = error[jnp.array([order.index(layer) for layer in declared.layers])].reshape(declared.shape)
        node = functools.reduce(operator.getitem, path[:-1], moved)
        node[path[-1]] = node[path[-1]] + rate * own
    return moved
