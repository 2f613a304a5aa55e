"""Mixture of experts: a router chooses k of E MLPs for each token (arXiv:1701.06538, 2101.03961).

By default no token is dropped: choices are sorted by expert, and grouped products (`jax.lax.ragged_dot`) take as many
rows of each as chose it. Where experts lie on several devices of the mesh's `expert` axis, each of them sees the tokens
of all, does those that chose its own experts, and the results are added up. With `capacity`, each expert has a fixed
number of places in every row instead, and tokens move between devices as the partitioner decides.

Padding (segment 0) is not routed and counts for nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.base import precision
from jaxlm.base.arrays import Array, Bool, Float, Float32, Int
from jaxlm.base.sharding import constrain, fitting_spec
from jaxlm.model import lora, quantised
from jaxlm.model.config import ExpertsConfig, LoRAConfig, ModelConfig
from jaxlm.model.layers import MLP, gated
from jaxlm.model.weights import Constant, Normal, weight


class Routing(NamedTuple):
    """Sums over real tokens, float32, with an axis of layers with experts in front: pieces of a batch only add."""

    load: Array
    """`[..., E]`: how many tokens chose each expert"""
    shares: Array
    """`[..., E]`: of the scores, each token's divided by their sum"""
    squared_normalizer: Array
    """`[...]`: log²(Σ exp(logits)), what the router's z-loss keeps small (arXiv:2202.08906, equation 5)"""
    dropped: Array
    """`[...]`: choices that found their expert full"""
    tokens: Array
    """`[...]`: real tokens"""


def _same(x: Array) -> Array:
    return x


class Experts(nnx.Module):
    """Σ weight_e down_e(act(gate_e(x)) * up_e(x)) over the chosen experts e, plus the shared ones' output."""

    lora: LoRAConfig

    def __init__(self, config: ModelConfig):
        c = config.experts
        D, E, F = config.width, c.count, c.feed_forward
        self.router = weight((D, E), ("embed", "routes"), Normal(D**-0.5), matrix=True)
        if "router" in config.biases:
            self.router_bias = weight((E,), ("routes",), Constant(0.0))
        if c.choice_bias:
            self.choice_bias = weight((E,), ("routes",), Constant(0.0))
        inner, outer = Normal(D**-0.5), Normal((2 * F * config.layers) ** -0.5)
        self.gate = weight((E, D, F), ("experts", "embed", "mlp"), inner, matrix=True)
        self.up = weight((E, D, F), ("experts", "embed", "mlp"), inner, matrix=True)
        self.down = weight((E, F, D), ("experts", "mlp", "embed"), outer, matrix=True)
        if "mlp" in config.biases:
            self.gate_bias = weight((E, F), ("experts", "mlp"), Constant(0.0))
            self.up_bias = weight((E, F), ("experts", "mlp"), Constant(0.0))
            self.down_bias = weight((E, D), ("experts", "norm"), Constant(0.0))
        if c.shared:
            self.shared = MLP(config, c.shared * F)
        self.config = config

    def __call__(self, x: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> tuple[Float[Array, "B S D"], Routing]:
        choices, weights, routing = self._route(x, real)
        if self.config.experts.capacity:
            out, dropped = self._limited(x, choices, weights)
            routing = routing._replace(dropped=dropped)
        else:
            out = self._dropless(x, choices, weights)
        if self.config.experts.shared:
            out = out + self.shared(x)
        return out, routing

    def _route(
        self, x: Float[Array, "B S D"], real: Bool[Array, "B S"]
    ) -> tuple[Int[Array, "B S k"], Float32[Array, "B S k"], Routing]:
        """The chosen experts, E (none) at padding; their weights; the sums."""
        c = self.config.experts
        # At its default precision a TPU multiplies float32 in bf16.
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        logits = jnp.matmul(flat, self.router[...], precision=jax.lax.Precision.HIGHEST)
        if "router" in self.config.biases:
            logits = logits + self.router_bias[...][None, :]
        logits = logits.reshape(*x.shape[:2], c.count)
        scores = jax.nn.softmax(logits) if c.scores == "softmax" else jax.nn.sigmoid(logits)
        preferred = jax.lax.stop_gradient(scores)
        if c.choice_bias:
            preferred = preferred + jax.lax.stop_gradient(self.choice_bias[...])[None, None, :]
        choices = jax.lax.top_k(_in_best_groups(preferred, c), c.chosen)[1]
        picked = choices[..., None] == jnp.arange(c.count)[None, None, None, :]  # [B, S, k, E]
        weights = jnp.sum(jnp.where(picked, scores[:, :, None, :], 0.0), axis=-1)
        if c.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        shares = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        total = lambda each: jnp.sum(jnp.where(real.reshape(*real.shape, *(1,) * (each.ndim - 2)), each, 0.0), (0, 1))
        routing = Routing(
            load=total(jnp.sum(picked.astype(jnp.float32), axis=2)),
            shares=total(shares),
            squared_normalizer=total(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
            dropped=jnp.float32(0),
            tokens=total(jnp.ones(real.shape, jnp.float32)),
        )
        return jnp.where(real[..., None], choices, c.count), c.scale * weights, routing

    def _kernels(self) -> dict[str, Array]:
        """Matrices, biases, adapters and, of DoRA's, each column's magnitude over its norm, by name."""
        names = ("gate", "up", "down")
        own = [f"{name}{part}" for name in names for part in ("", "_scale", "_bias", "_lora_a", "_lora_b")]
        held = {name: getattr(self, name)[...] for name in own if hasattr(self, name)}
        ratios = {f"{name}_lora_ratio": lora.ratio(self, name) for name in names}
        return held | {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def _mlp(self, rows: Array, kernels: Any, product: Callable, spread: Callable, place: Callable = _same) -> Array:
        """The experts' outputs for their rows, float32; `product` takes rows with matrices `[E, in, out]`, `spread`
        brings `[E, out]` to the rows, `place` says where the inner ones lie."""
        kind = precision.dtype(self.config.compute)

        def times(rows: Array, name: str) -> Array:
            whole = lambda rows, held: product(rows, quantised.matrix(held, name).astype(kind))
            if f"{name}_scale" in kernels:  # for its gradient codes are kept, and W made anew
                whole = jax.checkpoint(whole)
            own = (name, f"{name}_scale", f"{name}_first")
            out = whole(rows.astype(kind), {key: kernels[key] for key in own if key in kernels})
            a, b, ratio, bias = (kernels.get(f"{name}_{part}") for part in ("lora_a", "lora_b", "lora_ratio", "bias"))
            if a is not None and b is not None:
                low = product(rows.astype(kind), a.astype(kind)).astype(kind)
                out = out + self.lora.scale * product(low, b.astype(kind))
            out = out if ratio is None else out * spread(ratio)
            return out if bias is None else out + spread(bias)

        gate, up = (times(rows, name).astype(kind) for name in ("gate", "up"))
        return times(place(gated(self.config.activation, gate, up)), "down")

    def _dropless(self, x: Array, choices: Array, weights: Array) -> Float[Array, "B S D"]:
        kernels = self._kernels()
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self._grouped(x, choices, weights, kernels, gather=False, split=False, inner=False)
        # The partitioner knows no grouped products: each device runs them on its own tokens and experts.
        rows = fitting_spec(mesh.shape, ("batch", "sequence", None), x.shape)
        tensor = "mlp" if kernels["down"].shape[1] % mesh.shape["tensor"] == 0 else None  # in codes F / 2
        placed = {name: fitting_spec(mesh.shape, _axes(name, tensor), k.shape) for name, k in kernels.items()}
        experts = placed["up"][0] is not None
        whole = rows[0] is None  # every device has all rows already
        inner = placed["up"][2] is not None
        run = functools.partial(self._grouped, gather=experts and not whole, split=experts, inner=inner)
        in_specs = (rows, rows, rows, placed)
        sharded = jax.shard_map(run, in_specs=in_specs, out_specs=rows, check_vma=False)
        return sharded(x, choices, weights, kernels)

    def _grouped(
        self, x: Array, choices: Array, weights: Array, kernels: Any, *, gather: bool, split: bool, inner: bool
    ) -> Array:
        """Of the rows at hand, or (`gather`) of those of all devices on the axis `expert`, the sum over experts. Where
        they are `split` over that axis, or their `inner` width is over `tensor`, the parts are added up."""
        if gather:
            x, choices, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, choices, weights))
        (B, S, D), k, E = x.shape, choices.shape[-1], kernels["up"].shape[0]
        own = choices.reshape(-1) - (E * jax.lax.axis_index("expert") if split else 0)
        own = jnp.where((own >= 0) & (own < E), own, E)  # E: another device's, or padding
        order = jnp.argsort(own)
        ids = own[order]
        sizes = jnp.sum(ids[:, None] == jnp.arange(E)[None, :], axis=0, dtype=jnp.int32)
        # Rows past the groups are nobody's: what a product leaves there must not come back, nor its gradient.
        mine = ids[:, None] < E
        # Copies first: a permutation's gradient is one too, and the same sum of k on every device and every time.
        copies = jnp.broadcast_to(x[:, :, None, :], (B, S, k, D)).reshape(-1, D)
        rows = jnp.where(mine, _permuted(copies, order), 0)
        if inner and "down_bias" in kernels:  # on one of the devices whose parts are added up
            first = jax.lax.axis_index("tensor") == 0
            kernels = kernels | {"down_bias": jnp.where(first, kernels["down_bias"], 0.0)}
        if inner:  # a part may begin within a block of nf4
            kernels = kernels | {"down_first": jax.lax.axis_index("tensor") * kernels["up"].shape[2]}
        product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
        ones = jnp.ones((len(ids), 1))
        # A grouped product too: nothing but `sizes` waits for its gradient, which looks at no row past the groups.
        spread = lambda each: product(ones, each[:, None, :], precision=jax.lax.Precision.HIGHEST)
        out = self._mlp(rows, kernels, product, spread)
        out = _permuted(jnp.where(mine, out, 0.0), jnp.argsort(order))
        out = jnp.sum(weights[..., None] * out.reshape(B, S, k, D), axis=2)
        if inner:
            out = jax.lax.psum(out, "tensor")
        if gather:
            out = jax.lax.psum_scatter(out, "expert", tiled=True)
        elif split:
            out = jax.lax.psum(out, "expert")
        return out.astype(precision.dtype(self.config.compute))

    def _limited(self, x: Array, choices: Array, weights: Array) -> tuple[Float[Array, "B S D"], Float32[Array, ""]]:
        """Experts with C places in each row, and how many choices found none. Rows do not share places: so the result
        is the same on every mesh and for every number of pieces."""
        B, S, D = x.shape
        E, k = self.config.experts.count, choices.shape[-1]
        C = min(math.ceil(self.config.experts.capacity * k * S / E), S)
        chosen = choices.reshape(B, S * k)
        mine = chosen[:, :, None] == jnp.arange(E)[None, None, :]
        place = jnp.sum(jnp.where(mine, jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, 0), axis=-1)
        kept = (chosen < E) & (place < C)
        slot = jnp.where(kept, chosen * C + place, E * C)  # [B, S*k]; E*C: none
        nobody = jnp.full(E * C, S * k, jnp.int32)
        holder = jax.vmap(lambda slot: nobody.at[slot].set(jnp.arange(S * k, dtype=jnp.int32), mode="drop"))(slot)
        rows = _rows(x, holder // k).reshape(B, E, C, D).swapaxes(0, 1)
        rows = constrain(rows, "experts", "expert_batch", None, None)
        flat = lambda rows: rows.reshape(E, B * C, -1)
        product = lambda rows, kernel: precision.product(flat(rows), kernel).reshape(E, B, C, -1)
        place = lambda hidden: constrain(hidden, "experts", "expert_batch", None, "activation_mlp")
        out = self._mlp(rows, self._kernels(), product, lambda each: each[:, None, None, :], place)
        out = constrain(out, "experts", "expert_batch", None, None)
        out = constrain(out.swapaxes(0, 1).reshape(B, E * C, D), "batch", None, None)
        out = jnp.sum(weights[..., None] * _rows(out, slot).reshape(B, S, k, D), axis=2)
        dropped = jnp.sum((chosen < E) & ~kept, dtype=jnp.int32).astype(jnp.float32)
        return out.astype(precision.dtype(self.config.compute)), dropped


def _in_best_groups(scores: Float32[Array, "B S E"], c: ExpertsConfig) -> Float32[Array, "B S E"]:
    """The scores, and -inf in place of those of experts outside of a token's best groups."""
    if c.groups == 1:
        return scores
    grouped = scores.reshape(*scores.shape[:2], c.groups, -1)
    best = jax.lax.top_k(jnp.sum(jax.lax.top_k(grouped, c.group_best)[0], axis=-1), c.chosen_groups)[1]
    kept = jnp.any(best[..., None] == jnp.arange(c.groups)[None, None, None, :], axis=2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _axes(name: str, inner: str | None) -> tuple[str | None, ...]:
    """Where the dropless products want a matrix, or what belongs to it, whose inner width has that axis."""
    rows, columns = (inner, None) if name.startswith("down") else (None, inner)
    ends = {"lora_a": (rows, None), "lora_b": (None, columns), "": (rows, columns), "scale": (None, columns)}
    return ("experts", *ends.get(name.partition("_")[2], (columns,)))


def _permuted(x: Float[Array, "M D"], order: Int[Array, "M"]) -> Float[Array, "M D"]:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _rows(x: Float[Array, "B M D"], index: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """x[b, index[b, n]], and zeros where the index is M."""
    take = lambda x, index: x.at[index].get(mode="fill", fill_value=0)
    return jax.vmap(take)(x, index)
