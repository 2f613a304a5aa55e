"""Mixture of experts: against a dense computation over all experts, and what must not depend on the way it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters.quantising import quantise
from jaxlm.adapters.weights import merged
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.model import layout, lora, quantised
from jaxlm.model.config import ExpertsConfig, LoRAConfig, ModelConfig
from jaxlm.model.experts import Experts
from jaxlm.model.transformer import define_model, empty_cache, for_inference
from jaxlm.model.weights import apply, define, initialize
from jaxlm.plan.flops import active_parameters, flops_per_token

B, S, D, E, K = 4, 6, 16, 4, 2
BASE = ModelConfig(vocab_size=50, layers=1, width=D, heads=2, feed_forward=24, compute="float32")
VARIANTS = {
    "softmax": {},
    "before the choice": {"normalize": False, "scale": 1.5, "chosen": 1},
    "sigmoid, shared": {"scores": "sigmoid", "choice_bias": True, "shared": 2, "feed_forward": 12, "scale": 2.5},
    "clamped, biases": {"count": 4},
    "the best group's": {"groups": 2, "normalize": False, "scale": 16.0},
    "the best groups' by two each": {"count": 9, "groups": 3, "chosen_groups": 2, "group_best": 2, "chosen": 4}
    | {"scores": "sigmoid", "choice_bias": True},
}


def made(name, adapters=None, **fields):
    kind = ExpertsConfig(**{"count": E, "chosen": K} | VARIANTS[name] | fields)
    config = dataclasses.replace(BASE, experts=kind)
    if "biases" in name:
        config = dataclasses.replace(config, activation="clamped", biases=("mlp", "router"))
    config = config.complete()
    experts = Experts(config)
    if adapters is not None:
        lora.declare(experts, "layers/experts", adapters)
    definition = define(experts, "float32")
    params = initialize(definition, 0)
    # Biases begin at 0, and scores are near one another: neither would be seen.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), params)
    return config, definition, params


def inputs():
    x = jax.random.normal(jax.random.key(2), (B, S, D))
    return x, jnp.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [0] * 6]) > 0


@functools.partial(jax.jit, static_argnums=0)
def run(definition, params, x, real):
    return apply(definition, params, lambda m: m(x, real))


def reference(config, params, x, real):
    """Every token through every expert in numpy, weighted with what the chosen ones' scores say."""
    c, p = config.experts, {name: np.asarray(value, np.float64) for name, value in params.items() if name != "shared"}
    x, out = np.asarray(x, np.float64), np.zeros((B, S, D))
    load = np.zeros(c.count)
    act = lambda g: g / (1 + np.exp(-g))
    for b, s in np.argwhere(real):
        logits = x[b, s] @ p["router"] + p.get("router_bias", 0)
        scores = 1 / (1 + np.exp(-logits)) if c.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        preferred = scores + p.get("choice_bias", 0)
        groups = preferred.reshape(c.groups, -1)
        worth = np.sort(groups, axis=1)[:, -c.group_best :].sum(1)
        for group in np.argsort(-worth)[c.chosen_groups :]:
            groups[group] = -np.inf
        chosen = np.argsort(-preferred, kind="stable")[: c.chosen]
        load[chosen] += 1
        for e in chosen:
            gate, up = (
                x[b, s] @ p[name][e] + p.get(f"{name}_bias", np.zeros((c.count, 1)))[e] for name in ("gate", "up")
            )
            if config.activation == "clamped":
                gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
                inner = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            else:
                inner = act(gate) * up
            y = inner @ p["down"][e] + p.get("down_bias", np.zeros((c.count, 1)))[e]
            out[b, s] += c.scale * scores[e] / (scores[chosen].sum() if c.normalize else 1) * y
    if c.shared:
        shared = {name: np.asarray(value, np.float64) for name, value in params["shared"].items()}
        out += (act(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"]
    return out, load


@pytest.mark.parametrize("name", VARIANTS)
def test_dropless_is_a_dense_computation_over_all_experts(name):
    """And so is a capacity that is large enough; padding is not routed."""
    config, definition, params = made(name)
    x, real = inputs()
    expected, load = reference(config, params, x, real)
    for capacity in (0.0, float(config.experts.count)):
        config, definition, _ = made(name, capacity=capacity)
        out, routing = run(definition, params, x, real)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        np.testing.assert_array_equal(routing.load, load)
        assert float(routing.tokens) == 15
        assert float(routing.dropped) == 0
        assert float(jnp.sum(routing.shares)) == pytest.approx(15)


def test_adapters_of_experts_are_the_experts_merged_in_both_ways():
    adapters = LoRAConfig(rank=3, alpha=7.0, dora=True)
    for capacity in (0.0, float(E)):
        _, definition, params = made("clamped, biases", adapters, capacity=capacity)
        _, plain, _ = made("clamped, biases", capacity=capacity)
        out, _ = run(definition, params, *inputs())
        np.testing.assert_allclose(out, run(plain, merged(params, adapters), *inputs())[0], atol=1e-4)


@pytest.mark.parametrize("adapters", [None, LoRAConfig(rank=3, dora=True)])
def test_what_a_product_leaves_past_its_groups_is_nobodys(adapters, monkeypatch):
    """Some platforms' grouped products write nothing there: here it is made to be no number, both ways."""
    _, definition, params = made("clamped, biases", adapters)
    x, real = inputs()

    def gradients():
        loss = lambda params, x: jnp.sum(jnp.sin(apply(definition, params, lambda m: m(x, real))[0]))
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    expected, product, seen = gradients(), jax.lax.ragged_dot, []

    def careless(rows, kernels, group_sizes, **more):
        past = (jnp.arange(len(rows)) >= jnp.sum(group_sizes))[:, None]
        seen.append(int(jnp.sum(past)))

        @jax.custom_vjp
        def left(rows):
            return jnp.where(past, jnp.nan, rows)

        left.defvjp(lambda rows: (left(rows), None), lambda _, g: (jnp.where(past, jnp.nan, g),))
        return left(product(left(rows), kernels, group_sizes, **more))

    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients(), expected)
    assert min(seen) == 2 * 9, "two choices of each row of padding"


def test_a_step_keeps_no_scale_spread_over_the_rows():
    """Of what remat="dots" keeps, nothing is as large as [B S k, F] but what it is told to."""
    _, definition, params = made("clamped, biases", LoRAConfig(rank=3, dora=True))
    x, real = inputs()
    loss = lambda params: jnp.sum(jnp.sin(apply(definition, params, lambda m: m(x, real))[0]))
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    kept = jax.vjp(jax.checkpoint(loss, policy=policy), params)[1]
    shapes = {leaf.shape for leaf in jax.tree.leaves(kept)}
    assert shapes
    assert not [shape for shape in shapes if shape[0] == B * S * K]


def test_the_first_tokens_take_the_places_and_the_rest_is_dropped():
    """Capacity 1 of 4 experts, 2 of them chosen, by 6 tokens that all choose alike: 3 places each, 3 tokens without."""
    _, definition, params = made("softmax", capacity=1.0)
    x = jnp.broadcast_to(inputs()[0][:1, :1], (B, S, D))
    out, routing = run(definition, params, x, jnp.ones((B, S), bool))
    assert float(routing.dropped) == B * 3 * K
    assert sorted(np.asarray(routing.load)) == [0, 0, B * S, B * S]
    np.testing.assert_allclose(out[:, :3], jnp.broadcast_to(out[:1, :1], (B, 3, D)), atol=1e-6)
    assert float(jnp.abs(out[0, 0]).max()) > 0.01
    np.testing.assert_array_equal(out[:, 3:], 0)


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_gradients_are_finite_differences(capacity):
    """Of the router through the chosen weights, of the experts, of the input; the choice bias has none."""
    _, definition, params = made("sigmoid, shared", capacity=capacity)
    x, real = inputs()

    def loss(params, x):
        out, routing = run(definition, params, x, real)
        return jnp.sum(jnp.sin(out)) + 0.1 * routing.squared_normalizer + jnp.sum(jnp.square(routing.shares)) / 10

    gradient = jax.grad(loss, argnums=(0, 1))(params, x)
    np.testing.assert_array_equal(gradient[0].pop("choice_bias"), 0)
    step = 5e-4  # small enough for no token to choose otherwise
    for seed in range(3):
        way = jax.tree.map(functools.partial(noise, seed), (params, x))
        way[0]["choice_bias"] *= 0
        ahead, behind = (loss(*jax.tree.map(lambda v, w, s=s: v + s * w, (params, x), way)) for s in (step, -step))
        moved = (ahead - behind) / (2 * step)
        way[0].pop("choice_bias")
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, w: jnp.sum(g * w), gradient, way)))
        assert float(moved) == pytest.approx(float(along), rel=0.02, abs=0.05)


def noise(seed, like):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), like.size), like.shape)


MESHES = [
    MeshConfig(data=1, expert=4, tensor=2),
    MeshConfig(data=1, fsdp=2, expert=2, context=2),
    MeshConfig(data=2, expert=2, tensor=2),
]


@pytest.mark.parametrize(
    ("name", "capacity", "mesh", "adapters"),
    [
        ("clamped, biases", 0.0, MESHES[0], LoRAConfig(rank=3, dora=True)),
        ("sigmoid, shared", 0.0, MESHES[1], None),
        ("softmax", 1.0, MESHES[2], LoRAConfig(rank=3, dora=True)),
    ],
)
def test_eight_devices_equal_one(name, capacity, mesh, adapters):
    """Results, sums and gradients."""
    _, definition, params = made(name, adapters, capacity=capacity)
    x, real = inputs()

    def loss(params, x):
        out, routing = apply(definition, params, lambda m: m(x, real))
        return jnp.sum(jnp.sin(out)), (out, routing)

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    one = jax.jit(both)(params, x)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        placed = definition.shardings(mesh)
        many = jax.jit(both, in_shardings=(placed, None), out_shardings=None)(jax.device_put(params, placed), x)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        size = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a / size, b / size, atol=1e-5)


@pytest.mark.parametrize("capacity", [0.0, 1.0])
@pytest.mark.parametrize(("base", "width"), [("int8", 24), ("nf4", 24), ("nf4", 192), ("nf4", 128)])
def test_codes_of_experts_on_eight_devices_equal_those_on_one(base, width, capacity):
    """Of two devices, each has half a block of nf4 where the width is 24, one and a half of 192, and one of 128."""
    kind = LoRAConfig(rank=3, dora=True)
    config, _, params = made("softmax", kind, capacity=capacity, feed_forward=width)
    experts = Experts(config)
    lora.declare(experts, "layers/experts", kind)
    quantised.declare(experts, base)
    definition = define(experts, "float32")
    for name in ("gate", "up", "down"):
        params[name], params[f"{name}_scale"] = quantise(params[name], base)
    frozen, changes = (
        {name: params[name] for name in definition.abstract() if ("_lora_" in name) == own} for own in (False, True)
    )
    x, real = inputs()

    def loss(changes, x, frozen):
        return jnp.sum(jnp.sin(apply(definition, frozen | changes, lambda m: m(x, real))[0]))

    both = jax.value_and_grad(loss, argnums=(0, 1))
    one = both(changes, x, frozen)
    mesh = make_mesh(MESHES[0])
    with jax.set_mesh(mesh):
        placed = definition.shardings(mesh)
        part = lambda tree: {name: jax.device_put(value, placed[name]) for name, value in tree.items()}
        many = jax.jit(both)(part(changes), x, part(frozen))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        size = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a / size, b / size, atol=1e-5)


def test_a_batch_that_the_mesh_does_not_divide_is_done_whole():
    _, definition, params = made("softmax")
    x, real = (part[:1, :5] for part in inputs())
    with jax.set_mesh(make_mesh(MESHES[0])):
        out, _ = run(definition, params, x, real)
    np.testing.assert_allclose(out, run(definition, params, x, real)[0], atol=1e-5)


@pytest.mark.parametrize("adapters", [None, LoRAConfig(rank=3, dora=True)])
@pytest.mark.parametrize("capacity", [0.0, 2.0])
def test_gradients_in_bfloat16_follow_those_in_float32(capacity, adapters):
    config, _, params = made("softmax", adapters, capacity=capacity)
    x, real = inputs()

    def gradient(compute):
        experts = Experts(dataclasses.replace(config, compute=compute))
        if adapters is not None:
            lora.declare(experts, "layers/experts", adapters)
        definition = define(experts, compute)
        narrow = x.astype(compute)
        loss = lambda params: jnp.sum(run(definition, params, narrow, real)[0].astype(jnp.float32) ** 2)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(params))])

    narrow, wide = gradient("bfloat16"), gradient("float32")
    assert float(jnp.linalg.norm(narrow - wide)) < 0.03 * float(jnp.linalg.norm(wide))


# A first dense layer, then every other one with experts, beside local and global attention: 1 + 2 x 2 + 1 layers.
DEEP = dataclasses.replace(
    BASE,
    layers=6,
    pattern=("local", "global"),
    window=3,
    experts=ExpertsConfig(count=E, chosen=K, feed_forward=8, first_dense=1, every=2, shared=1),
).complete()


@pytest.mark.slow
def test_layers_with_and_without_experts_scanned_and_unrolled():
    assert DEEP.groups() == (1, 2, 5)
    assert [DEEP.has_experts(layer) for layer in range(6)] == [False, True] * 3
    unrolled = dataclasses.replace(DEEP, scan_layers=False)
    make = lambda config: jax.jit(functools.partial(initialize, define_model(config), 1))()
    stacked, single = make(DEEP), make(unrolled)
    assert stacked.keys() >= {"lead", "stack", "tail"}
    assert stacked["stack"]["0"]["experts"]["up"].shape == (2, E, D, 8)
    jax.tree.map(np.testing.assert_array_equal, layout.unroll(stacked, DEEP), single)
    jax.tree.map(np.testing.assert_array_equal, layout.stack(single, DEEP), stacked)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 50, jnp.int32)
    segments = jnp.array([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2], jnp.int32)
    positions = jnp.array([[*range(9)], [0, 1, 2, 3, 0, 1, 2, 0, 0]], jnp.int32)

    def forward(config, params):
        def model(m):
            hidden, routing = m.routed(ids, segments, positions)
            return m.logits(hidden), routing

        return jax.jit(lambda params: apply(define_model(config), params, model))(params)

    (a, first), (b, second) = forward(DEEP, stacked), forward(unrolled, single)
    real = segments > 0
    np.testing.assert_allclose(a[real], b[real], atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), first, second)
    assert first.load.shape == (3, E)
    np.testing.assert_array_equal(first.load.sum(-1), 16 * K)
    # Packed = alone, and token by token through a cache = at once.
    config, definition = for_inference(
        dataclasses.replace(DEEP, experts=dataclasses.replace(DEEP.experts, capacity=1.0))
    )
    assert config.experts.capacity == 0
    cache = empty_cache(config, 1, 3)

    @jax.jit
    def next_logits(cache, *place):
        def model(m):
            hidden, after = m(*place, cache)
            return m.logits(hidden), after

        return apply(definition, single, model)

    for t in range(3):
        at = jnp.full((1, 1), t, jnp.int32)
        logits, cache = next_logits(cache, ids[1:, 4 + t : 5 + t], jnp.ones_like(at), at)
        np.testing.assert_allclose(logits[0, 0], b[1, 4 + t], atol=1e-5)


def test_parameters_and_flops_counted_by_hand():
    expert, attention, norms = 3 * D * 8, 4 * D * D, 2 * D
    dense = 3 * (attention + norms + 3 * D * 24)
    sparse = lambda experts: 3 * (attention + norms + D * E + (experts + 1) * expert)
    ends = 2 * 50 * D + D
    assert define_model(DEEP).parameter_count() == dense + sparse(E) + ends
    assert active_parameters(DEEP) == dense + sparse(K) + ends
    products = active_parameters(DEEP) - 6 * norms - D - 50 * D
    seen = (16 + 1) / 2 * 3 + (1 + 2 + 3 * 14) / 16 * 3
    assert flops_per_token(DEEP, 16) == pytest.approx(6 * products + 12 * D * seen)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="5 of 4 experts cannot be chosen"):
        ExpertsConfig(count=4, chosen=5)
    with pytest.raises(ConfigError, match="clamped is of gated"):
        ModelConfig(activation="clamped", gated_mlp=False)
    with pytest.raises(ConfigError, match="experts are gated"):
        ModelConfig(gated_mlp=False, experts=ExpertsConfig(count=4))
