"""The transformer: the one forward pass of learner, scorer and sampler.

    model = define_model(config)                                # a Definition: no numbers
    params = initialize(model, seed=0)                          # a plain nested dict
    hidden = apply(model, params, lambda m: m(ids, segments, positions)[0])      # [B, S, D]
    logits = apply(model, params, lambda m: m.logits(hidden))                    # [B, S, V] float32
    scores = apply(model, params, lambda m: m.scores(hidden))                    # [B, S, C], of a reward model

Layers lie stacked (`config.scan_layers`): with layers that repeat each P (`config.groups`), stack/p holds the layers
p, p + P, p + 2P, … along a first axis, tail/… the L mod P last ones, and lead/… those before the first with experts.
`jaxlm/model/layout.py` converts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Float, Float32, Int
from jaxlm.base.sharding import constrain
from jaxlm.model import lora, quantised
from jaxlm.model.attention import Layer, Place, SelfAttention
from jaxlm.model.config import AdaptedConfig, ModelConfig
from jaxlm.model.experts import Experts, Routing
from jaxlm.model.latent import LatentAttention
from jaxlm.model.layers import MLP, HeadTransform, Rotations, make_norm, project, rotations
from jaxlm.model.weights import Constant, Definition, Normal, apply, define, number, weight

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of all that was read so far; every row writes at the same slot, masks go by position."""

    layers: tuple[Layer, ...]
    """L times keys `[B, K, N, T]` and values `[B, K, T, N]`, or shared keys and latents (see `Layer`)"""
    segments: Array
    """int32 `[B, T]`: 1 where a token stands, 0 where nothing does (the padding of a prompt, slots to come)"""
    positions: Array
    """int32 `[B, T]`: the token's position in its text"""
    slot: Array
    """int32 `[]`: the next slot to write"""


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """Room for `slots` tokens a row, in the compute type; in float32 on the CPU. Of latent attention, for the latents.

    The CPU's batched products take float32 only: of a bf16 cache they would make a float32 copy at every step, which
    takes four times as long as the products themselves.
    """
    K, N, M = config.kv_heads, config.head_size, config.head_size
    if config.latent.kv_rank:
        K, N, M = 1, config.rope_size, config.latent.kv_rank
    keys, values = (batch, K, N, slots), (batch, K, slots, M)
    kind = precision.dtype("float32" if jax.default_backend() == "cpu" else config.compute)
    layers = tuple(Layer(jnp.zeros(keys, kind), jnp.zeros(values, kind)) for _ in range(config.layers))
    nothing = jnp.zeros((batch, slots), jnp.int32)
    return Cache(layers, nothing, nothing, jnp.int32(0))


def widened(cache: Cache, room: int) -> Cache:
    """The cache with `room` more empty slots."""
    pad = lambda x, axis: jnp.pad(x, [(0, room if axis == i else 0) for i in range(x.ndim)])
    return Cache(
        tuple(Layer(pad(layer.key, 3), pad(layer.value, 2)) for layer in cache.layers),
        pad(cache.segments, 1),
        pad(cache.positions, 1),
        cache.slot,
    )


def text_lengths(place: Place) -> Int[Array, "B S"]:
    """How many tokens each query's text has so far, by the positions of its keys; 0 where there are none."""

    def row(queries: Array, keys: Array, positions: Array) -> Array:
        ends = jax.ops.segment_max(jnp.where(keys > 0, positions + 1, 0), keys, keys.shape[0] + 1)
        return jnp.maximum(ends, 0)[queries]

    return jax.vmap(row)(place.query_segments, place.key_segments, place.key_positions)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `config.norm_place` and `config.parallel_mlp` have other forms."""

    def __init__(self, config: ModelConfig, layer: int):
        kind = config.kind(layer)
        self.reads_norm = config.norm_place in ("before", "both")
        if self.reads_norm:
            self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        if config.norm_place != "before":
            self.attention_post_norm, self.mlp_post_norm = make_norm(config), make_norm(config)
        self.attention = (LatentAttention if config.latent.kv_rank else SelfAttention)(config, kind)
        if config.has_experts(layer):
            self.experts = Experts(config)
        else:
            self.mlp = MLP(config)
        if isinstance(config, AdaptedConfig):
            parts: dict[str, Any] = {name: getattr(self, name, None) for name in ("attention", "mlp", "experts")}
            parts["experts/shared"] = getattr(parts["experts"], "shared", None)
            for name, part in parts.items():
                if part is not None and config.adapters:
                    lora.declare(part, f"layers/{name}", config.lora)
                if part is not None:
                    quantised.declare(part, config.lora.base)
        self.kind, self.place, self.parallel = kind, config.norm_place, config.parallel_mlp

    def __call__(
        self, x: Float[Array, "B S D"], rotations: Rotations, place: Place, past: Layer | None = None
    ) -> tuple[Float[Array, "B S D"], Layer | None, Routing | None]:
        before, routing = x, None
        mixed = self.attention_norm(x) if self.reads_norm else x
        mixed, past = self.attention(mixed, rotations[self.kind], place, past)
        x = self._add(x, mixed, "attention_post_norm")
        mixed = before if self.parallel else x
        mixed = self.mlp_norm(mixed) if self.reads_norm else mixed
        if hasattr(self, "experts"):
            mixed, routing = self.experts(mixed, place.query_segments > 0)
        else:
            mixed = self.mlp(mixed)
        x = self._add(x, mixed, "mlp_post_norm")
        return constrain(x, "batch", "sequence", None), past, routing

    def _add(self, x: Array, mixed: Array, norm: str) -> Array:
        if self.place == "before":
            return x + mixed
        post_norm = getattr(self, norm)
        return post_norm(x + mixed) if self.place == "sum" else x + post_norm(mixed)


class Transformer(nnx.Module):
    """Embedding, blocks, final norm; then the output head, or the scalar heads of a reward model."""

    def __init__(self, config: ModelConfig, matrix_dtype: Any = jnp.float32):
        V, D, L = config.vocab_size, config.width, config.layers
        C = len(config.criteria)
        # A tied table is also the head: at D^-1/2 the first logits have unit variance.
        std = D**-0.5 if config.tied_embeddings else 1.0
        self.embedding = weight((V, D), ("vocab", "embed"), Normal(std))
        if config.learned_positions:
            self.positions = weight((config.learned_positions, D), ("positions", "embed"), Normal(std / 2))
        if config.token_types:
            self.types = weight((config.token_types, D), ("positions", "embed"), Normal(std / 2))
        if config.norm_place == "sum":
            self.embedding_norm = make_norm(config)
        else:
            self.final_norm = make_norm(config)
        if config.scan_layers:
            first, P, end = config.groups()
            self.lead = nnx.Dict({str(i): self._block(config, i) for i in range(first)})
            self.stack = nnx.Dict(
                {
                    str(p): number(Block(config, first + p), tuple(range(first + p, end, P)), stacked=True)
                    for p in range(P if first < end else 0)
                }
            )
            self.tail = nnx.Dict({str(i): self._block(config, i) for i in range(end, L)})
            self.group = tuple(define(Block(config, first + p), config.compute, matrix_dtype) for p in range(P))
        else:
            self.layers = nnx.Dict({str(i): self._block(config, i) for i in range(L)})
        if config.head == "transform":
            self.transform = HeadTransform(config)
            self.head_bias = weight((V,), ("norm",), Constant(0.0))
        if C:
            # Scores begin with a variance of about 1, as in Stiennon et al. 2020 (arXiv:2009.01325).
            self.score = weight((D, C), ("embed", "criteria"), Normal((D + 1) ** -0.5))
            self.score_bias = weight((C,), ("criteria",), Constant(0.0))
        elif config.head == "pooler":
            self.pooler = weight((D, D), ("embed", "norm"), Normal(D**-0.5), matrix=True)
            self.pooler_bias = weight((D,), ("norm",), Constant(0.0))
        elif not config.tied_embeddings:
            self.head = weight((D, V), ("embed", "vocab"), Normal(D**-0.5))
        self.config = config

    def _block(self, config: ModelConfig, index: int) -> nnx.Module:
        return number(Block(config, index), (index,), stacked=False)

    def __call__(
        self,
        ids: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Hidden states after the final norm, in the compute type; and the cache with these tokens in it.

        `segments` are 0 at padding; a token sees its own segment, in a causal model up to itself. With a cache, S
        new tokens are written at its slot and see what it holds. With longrope, a row whose text was begun in the
        cache at no more than the trained positions and goes past them becomes NaN: it has to be read anew from its
        first token.
        """
        if cache is None:
            return self.routed(ids, segments, positions)[0], None
        c = self.config
        if not c.causal:
            raise ValueError("an encoder has no cache: tokens to come would change what it holds")
        if c.scan_layers:
            raise ValueError("a cache needs unrolled layers (see model/layout.py): a scan would copy it every step")
        cache = cache._replace(
            segments=jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.slot, 1),
            positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.slot, 1),
        )
        place = Place(segments, positions, cache.segments, cache.positions, cache.slot)
        x, turns = self._start(ids, place, cache.segments.shape[1])
        layers = []
        for index in range(c.layers):
            x, layer, _ = self.layers[str(index)](x, turns, place, cache.layers[index])
            layers.append(layer)
        return self._end(x), cache._replace(layers=tuple(layers), slot=cache.slot + ids.shape[1])

    def routed(
        self, ids: Int[Array, "B S"], segments: Int[Array, "B S"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """The hidden states, and what the routers of the layers with experts did, in the layers' order."""
        # No position lies past the row's end: it is the index within a segment.
        place = Place(segments, positions, segments, positions)
        x, turns = self._start(ids, place, ids.shape[1])
        x, routing = self._run(x, turns, place)
        return self._end(x), routing

    def _start(self, ids: Array, place: Place, limit: int) -> tuple[Array, Rotations]:
        """The embedded tokens, and the rotations at their positions, all below `limit`."""
        c, segments, positions = self.config, place.query_segments, place.query_positions
        x = self.embed(ids)
        if c.learned_positions:
            # Past the table there is nothing to add: NaN says so, where the last row in its place would not.
            places = jnp.where(segments > 0, positions, 0)
            x = x + self.positions[...].at[places].get(mode="fill", fill_value=jnp.nan).astype(x.dtype)
        if c.token_types:
            x = x + self.types[...][:1][None].astype(x.dtype)
        if c.norm_place == "sum":
            x = self.embedding_norm(x)
        if c.rope_scaling.kind != "longrope":
            return x, rotations(c, positions, limit)
        lengths, trained = text_lengths(place), c.rope_scaling.trained_positions
        if place.slot is not None:
            # What the cache holds of a text was read with the short factors' rotations, while it was short.
            past = jnp.where(jnp.arange(limit)[None, :] < place.slot, place.key_segments, 0)
            before = text_lengths(place._replace(key_segments=past))
            x = jnp.where(((before > 0) & (before <= trained) & (lengths > trained))[:, :, None], jnp.nan, x)
        return x, rotations(c, positions, limit, lengths)

    def _end(self, x: Array) -> Array:
        return x if self.config.norm_place == "sum" else self.final_norm(x)

    def embed(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        # The table is gathered over fsdp before the lookup: looking up in a table that is sharded over both of
        # its axes makes the partitioner materialise it anew for every use.
        table = constrain(self.embedding[...].astype(precision.dtype(self.config.compute)), "activation_vocab", None)
        x = table[ids]
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        return constrain(x, "batch", "sequence", None)

    def _run(self, x: Array, turns: Rotations, place: Place) -> tuple[Array, Routing | None]:
        """All blocks without a cache: where they are stacked, the first ones, a scan over the groups, then the tail."""
        policy = REMAT_POLICIES.get(self.config.remat)
        remat = (lambda f: jax.checkpoint(f, policy=policy)) if policy else (lambda f: f)
        found: list[Routing] = []

        def alone(x: Array, blocks: Any) -> Array:
            for index in sorted(blocks, key=int):
                x, routing = remat(lambda x, block: block(x, turns, place)[::2])(x, blocks[index])
                found.extend([jax.tree.map(lambda leaf: leaf[None], routing)] if routing else [])
            return x

        def group(x: Array, layers: dict[str, Any]) -> tuple[Array, Routing | None]:
            each = []
            for position, block in enumerate(self.group):
                x, routing = apply(block, layers[str(position)], lambda m, x=x: m(x, turns, place)[::2])
                each.extend([routing] if routing else [])
            return x, jax.tree.map(lambda *rows: jnp.stack(rows), *each) if each else None

        if not self.config.scan_layers:
            x = alone(x, self.layers)
        else:
            x = alone(x, self.lead)
            if len(self.stack):
                stacked = nnx.to_pure_dict(nnx.split(self.stack)[1])
                x, routing = jax.lax.scan(remat(group), x, stacked)
                if routing is not None:
                    found.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), routing))
            x = alone(x, self.tail)
        return x, jax.tree.map(lambda *rows: jnp.concatenate(rows), *found) if found else None

    def logits(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        if self.config.criteria:
            raise ValueError("a reward model has no logits: its output head gave way to scores")
        if self.config.head == "pooler":
            raise ValueError("a bare encoder has no logits: its config's head is a pooler")
        if self.config.head == "transform":
            hidden = self.transform(hidden)
        head = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        logits = precision.matmul(hidden, head, self.config.compute, wide=True)
        if self.config.head == "transform":
            logits = logits + self.head_bias[...].reshape((1,) * (logits.ndim - 1) + (-1,))
        cap = self.config.logit_soft_cap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def pooled(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        """tanh(dense(the first token's state)), of a model with a pooler."""
        return jnp.tanh(project(self, "pooler", hidden[:, :1], self.config.compute)[:, 0])

    def scores(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... C"]:
        """A scalar for each of the config's criteria, in their order; read it at a text's last real token."""
        if not self.config.criteria:
            raise ValueError("a language model has no scores: its config names no criteria")
        # At its default precision a TPU multiplies float32 in bf16.
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
        scores = jnp.matmul(flat, self.score[...], precision=jax.lax.Precision.HIGHEST) + self.score_bias[...][None, :]
        return scores.reshape(*hidden.shape[:-1], len(self.config.criteria))


def define_model(config: ModelConfig, matrix_dtype: Any = jnp.float32) -> Definition:
    """The definition of a complete config (`ModelConfig.complete`)."""
    return define(Transformer(config, matrix_dtype), config.compute, matrix_dtype)


def for_inference(config: ModelConfig) -> tuple[ModelConfig, Definition]:
    """The same model with unrolled layers and matrices in the compute type, as the sampler runs it."""
    experts = dataclasses.replace(config.experts, capacity=0.0)
    config = dataclasses.replace(config, scan_layers=False, remat="none", attention="plain", experts=experts)
    return config, define_model(config, precision.dtype(config.compute))
