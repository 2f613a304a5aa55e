"""Decoding on the device: prompts are read in one pass, then tokens are drawn in a loop until every row has stopped.

    state = start(definition, config, room, params, prompts, stops, settings)      # the first token of each row
    state = advance(definition, params, state, stops, settings, limit)             # up to `limit` tokens a row

Both compile once for each (rows, prompt slots, room, what `settings` has on, mesh). Rows never see each other, and a
row's random bits are those of its own key, so what else is in the batch changes nothing but rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base import rng
from jaxlm.base.arrays import Array, Bool, Float32, Int32
from jaxlm.base.sharding import constrain, fitting_spec
from jaxlm.model import layout
from jaxlm.model.attention import Layer
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import Cache, Transformer, empty_cache, for_inference, widened
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.sample.distribution import Settings, draw, process


class Prompts(NamedTuple):
    """A batch of prompts, padded on the right; rows that only fill the batch have `real` false and never start."""

    ids: Array
    """int32 `[B, P]`"""
    lengths: Array
    """int32 `[B]`, at least 1"""
    real: Array
    """bool `[B]`"""
    prompt_ids: Array
    """uint32 `[B]`"""
    samples: Array
    """uint32 `[B]`: which of the prompt's completions"""
    seed: Array
    """uint32 `[]`"""
    step: Array
    """uint32 `[]`: the rollout's step"""


class State(NamedTuple):
    """All that the loop carries: T = P + M slots, the prompts' and then one for each new token."""

    cache: Cache
    prompts: Array
    """int32 `[B, P]`"""
    lengths: Array
    """int32 `[B]`: tokens of the prompt"""
    keys: Array
    """key `[B]`: of (seed, step, prompt, sample); the draw at place t folds t in"""
    seen: Array | None
    """bool `[B, V]`: tokens under the repetition penalty; None when it is off"""
    tokens: Array
    """int32 `[B, M]`: new tokens, the one that stopped the row included; 0 after it"""
    logprobs: Array
    """float32 `[B, M]`: theirs"""
    counts: Array
    """int32 `[B]`: how many they are"""
    done: Array
    """bool `[B]`"""
    drawn: Array
    """int32 `[]`: how many draws there were: the place of the next token"""


@functools.partial(jax.jit, static_argnames=("config",))
def prepare(config: ModelConfig, params: Params) -> Params:
    """Parameters as the sampler wants them: unrolled, matrices in the compute type (see `for_inference`)."""
    definition = for_inference(config)[1]
    mesh = jax.sharding.get_abstract_mesh()
    copied = jax.tree.map(lambda x, like: x.astype(like.dtype), layout.unroll(params, config), definition.abstract())
    place = lambda w: fitting_spec(mesh.shape, w.axes, w.shape)
    return copied if mesh.empty else jax.lax.with_sharding_constraint(copied, definition.tree(place))


@functools.partial(jax.jit, static_argnames=("definition", "config", "room"))
def start(
    definition: Definition,
    config: ModelConfig,
    room: int,
    params: Params,
    prompts: Prompts,
    stops: Int32[Array, "N"],
    settings: Settings,
) -> State:
    """Reads the prompts and draws each row's first token; `room` is M, the most tokens that `advance` may draw."""
    B, P = prompts.ids.shape
    places = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    inside = places < prompts.lengths[:, None]
    hidden, cache = apply(
        definition,
        params,
        lambda model: model(prompts.ids, inside.astype(jnp.int32), places, empty_cache(config, B, P)),
    )
    assert cache is not None
    # Only the last token's logits are made: [B, V], not [B, P, V].
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    name = lambda prompt, sample: rng.key(prompts.seed, "sample", prompts.step, prompt, sample)
    seen = None
    if settings.repetition_penalty is not None:
        nothing = jnp.zeros((B, config.vocab_size), bool)
        seen = nothing.at[jnp.arange(B)[:, None], jnp.where(inside, prompts.ids, config.vocab_size)].set(
            True, mode="drop"
        )
    state = State(
        cache=widened(cache, room),
        prompts=jnp.asarray(prompts.ids),
        lengths=jnp.asarray(prompts.lengths),
        keys=jax.vmap(name)(prompts.prompt_ids, prompts.samples),
        seen=seen,
        tokens=jnp.zeros((B, room), jnp.int32),
        logprobs=jnp.zeros((B, room), jnp.float32),
        counts=jnp.zeros(B, jnp.int32),
        done=~prompts.real,
        drawn=jnp.int32(0),
    )
    return _pin(_draw(state, apply(definition, params, lambda model: model.logits(last)), stops, settings))


@functools.partial(jax.jit, static_argnames=("definition",), donate_argnames=("state",))
def advance(
    definition: Definition,
    params: Params,
    state: State,
    stops: Int32[Array, "N"],
    settings: Settings,
    limit: Int32[Array, ""],
) -> State:
    """Draws until every row has stopped or has `limit` tokens; the state given is used up."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.drawn < limit) & ~jnp.all(state.done)

    def token(state: State) -> State:
        B = state.tokens.shape[0]
        latest = jax.lax.dynamic_slice_in_dim(state.tokens, state.drawn - 1, 1, axis=1)
        positions = (state.lengths + state.drawn - 1)[:, None]

        def forward(model):
            rope = model.config.rope_scaling
            read = lambda: model(latest, jnp.ones((B, 1), jnp.int32), positions, state.cache)
            again = lambda: _read_again(model, state, positions)
            if rope.kind == "longrope" and rope.trained_positions < state.cache.segments.shape[1]:
                hidden, cache = jax.lax.cond(jnp.any(positions == rope.trained_positions), again, read)
            else:
                hidden, cache = read()
            return model.logits(hidden[:, 0]), cache

        logits, cache = apply(definition, params, forward)
        return _draw(state._replace(cache=cache), logits, stops, settings)

    return _pin(jax.lax.while_loop(unfinished, token, state))


def _read_again(model: Transformer, state: State, positions: Int32[Array, "B 1"]) -> tuple[Array, Cache | None]:
    """The hidden states of the latest tokens, and a cache of all of the texts read from their beginning, in one pass:
    LongRoPE turns a text that grew longer than the trained positions by other angles from its first token on."""
    old, B = state.cache, positions.shape[0]
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=old.slot, axis=1)
    segments, places = put(old.segments, jnp.ones((B, 1), jnp.int32)), put(old.positions, positions)
    nothing = jnp.zeros_like(segments)
    empty = old._replace(segments=nothing, positions=nothing, slot=jnp.int32(0))
    hidden, cache = model(jnp.concatenate([state.prompts, state.tokens], axis=1), segments, places, empty)
    assert cache is not None
    return jax.lax.dynamic_slice_in_dim(hidden, old.slot, 1, axis=1), cache._replace(slot=old.slot + 1)


def _draw(state: State, logits: Float32[Array, "B V"], stops: Int32[Array, "N"], settings: Settings) -> State:
    """The state with one more token in every row that is not done."""
    logits = constrain(logits, "batch", None)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.drawn)))(state.keys)
    ids, logprobs = draw(process(logits, state.seen, settings), uniform, settings)
    ids = jnp.where(state.done, 0, ids)
    logprobs = jnp.where(state.done, 0.0, logprobs)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(ids.shape[0]), ids].set(True)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.drawn, axis=1)
    return state._replace(
        seen=seen,
        tokens=put(state.tokens, ids[:, None]),
        logprobs=put(state.logprobs, logprobs[:, None]),
        counts=state.counts + (~state.done).astype(jnp.int32),
        done=state.done | jnp.any(ids[:, None] == stops[None, :], axis=1),
        drawn=state.drawn + 1,
    )


def _pin(state: State) -> State:
    """Fixes where the state lies: the cache over rows and heads; results whole, so that every process can read them."""
    heads = lambda x: constrain(x, "batch", "activation_heads", None, None)
    rows = lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1))
    whole = lambda x: constrain(x, *(None,) * x.ndim)
    return State(
        cache=Cache(
            tuple(Layer(heads(layer.key), heads(layer.value)) for layer in state.cache.layers),
            rows(state.cache.segments),
            rows(state.cache.positions),
            whole(state.cache.slot),
        ),
        prompts=rows(state.prompts),
        lengths=rows(state.lengths),
        keys=whole(state.keys),
        seen=None if state.seen is None else rows(state.seen),
        tokens=whole(state.tokens),
        logprobs=whole(state.logprobs),
        counts=whole(state.counts),
        done=whole(state.done),
        drawn=whole(state.drawn),
    )
