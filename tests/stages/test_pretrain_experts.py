"""Invariants of training steps on a mixture of experts, in float32."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.distill.teaching import CrossEntropy
from jaxlm.model.config import ExpertsConfig, ModelConfig
from jaxlm.model.experts import Routing
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.plan.fit import require_model_fits
from jaxlm.routing import balance
from jaxlm.routing.config import RoutingConfig
from jaxlm.stages import pretrain, sft
from jaxlm.stages.config import PretrainConfig, SFTConfig
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig, ScheduleConfig
from jaxlm.train.state import convert_layout

B, S, V, E = 8, 16, 64, 4
EXPERTS = ExpertsConfig(count=E, chosen=2, feed_forward=16, shared=1, first_dense=1)
MODEL = ModelConfig(
    vocab_size=V, layers=3, width=16, heads=2, feed_forward=32, experts=EXPERTS, compute="float32"
).complete()
CONFIG = PretrainConfig(
    data=(MixtureSource(name="x", path="x"),),
    model=MODEL,
    row_length=S,
    batch_rows=B,
    steps=100,
    schedule=ScheduleConfig(peak=1e-2, warmup_steps=0),
    routing=RoutingConfig(balance_loss=0.1, router_z_loss=0.01),
)


def with_experts(config, **fields):
    model = dataclasses.replace(MODEL, experts=dataclasses.replace(EXPERTS, **fields))
    return dataclasses.replace(config, model=model)


def rows(seed=0):
    """Rows of two documents and some padding; every other position is a target, so that prompts are routed too."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, V, (B, S)).astype(np.int32)
    ends = random.integers(8, S + 1, B)[:, None]
    place = np.arange(S, dtype=np.int32)[None]
    segments = np.where(place < 6, 1, np.where(place < ends, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, place - 6, np.where(segments == 1, place, 0)).astype(np.int32)
    return {"ids": ids, "segment_ids": segments, "positions": positions, "loss_mask": positions % 2 == 1}


def run(config, mesh=None, steps=2, batches=rows):
    devices = jax.devices() if mesh else jax.devices()[:1]
    mesh = make_mesh(mesh or MeshConfig(), devices)
    with jax.set_mesh(mesh):
        program = pretrain.build(config, mesh)
        state = program.initialize()
        history = []
        for step in range(steps):
            state, metrics = program.step(state, jax.device_put(batches(step), program.shardings.batch))
            history.append(values(metrics))
    return state, history


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@functools.cache
def one_device(capacity):
    return run(with_experts(CONFIG, capacity=capacity, choice_bias=True))


NAMES = ("train/loss", "train/gradient_norm", "train/balance_loss", "train/router_z_loss", "train/expert_load")
NAMES += ("train/least_expert_load", "train/dropped_tokens")


def same(run, capacity):
    (state, history), (one, alone) = run, one_device(capacity)
    for name in NAMES:
        close([h[name] for h in history], [h[name] for h in alone])
    close(state.params, one.params, 2e-4)
    assert (alone[0]["train/dropped_tokens"] > 0.02) == (capacity > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capacity", "mesh"),
    [
        (0.0, MeshConfig(data=2, expert=4)),
        (0.0, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
        (1.0, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ],
    ids=str,
)
def test_eight_devices_equal_one(capacity, mesh):
    same(run(with_experts(CONFIG, capacity=capacity, choice_bias=True), mesh), capacity)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_accumulated_equals_one_big_batch(capacity):
    """The load-balancing loss is the whole batch's, of which no piece knows the load."""
    config = with_experts(CONFIG, capacity=capacity, choice_bias=True)
    same(run(dataclasses.replace(config, accumulate=4)), capacity)


@pytest.mark.slow
def test_unrolled_equals_scanned():
    config = with_experts(CONFIG, choice_bias=True)
    state, history = run(dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False)))
    same((state._replace(params=convert_layout(state.params, config.model, stacked=True)), history), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adafactor", "muon", "soap"])
def test_an_experts_matrix_is_updated_as_one_that_lies_alone(kind):
    """[L, E, D, F] stacked = each [D, F] by itself, as a dense model's MLP has it."""
    definition = define_model(MODEL)
    params = jax.jit(functools.partial(initialize, definition, 0))()
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    config = OptimizerConfig(kind=kind, soap_refresh_steps=1)
    found = moved(config, definition, params, gradient)["stack"]["0"]["experts"]["up"]
    dense = define_model(dataclasses.replace(MODEL, layers=1, feed_forward=16, experts=ExpertsConfig()))
    at = lambda tree, leaf: {"stack": {"0": tree["stack"]["0"] | {"mlp": {n: x[:1] for n, x in leaf.items()}}}}
    alone = jax.jit(functools.partial(initialize, dense, 0))()
    pick = lambda tree, e: {n: tree["stack"]["0"]["experts"][n][1, e][None] for n in ("gate", "up", "down")}
    for e in (0, 3):
        own = alone | at(alone, pick(params, e))
        steepest = jax.tree.map(jnp.zeros_like, own)
        steepest |= at(steepest, pick(gradient, e))
        single = moved(config, dense, own, steepest)["stack"]["0"]["mlp"]["up"][0]
        np.testing.assert_allclose(found[1, e], single, atol=1e-5, rtol=1e-5)


def moved(config, definition, params, gradient):
    optimizer = optimizers.make_optimizer(config, definition)
    state = optimizers.init(optimizer, params)
    step = jax.jit(lambda s: optimizers.direction(optimizer, gradient, s, params))
    _, state = step(state)
    return step(state)[0]


def test_losses_by_hand():
    """Two layers of three experts and four tokens, two choices each."""
    made = Routing(
        load=jnp.array([[4.0, 3.0, 1.0], [8 / 3] * 3]),
        shares=jnp.array([[2.0, 1.0, 1.0], [4 / 3] * 3]),
        squared_normalizer=jnp.array([6.0, 2.0]),
        dropped=jnp.array([1.0, 0.0]),
        tokens=jnp.array([4.0, 4.0]),
    )
    # 3 (4/8 2/4 + 3/8 1/4 + 1/8 1/4) = 1.125, and 1; log² (6 + 2) / 2 / 4 = 1.
    batch = {"segment_ids": jnp.array([[1, 2, 2, 0, 1]])}
    config = RoutingConfig(balance_loss=0.1, router_z_loss=0.01)
    assert float(balance.penalty(made, None, batch, config)) == pytest.approx(0.1 * 1.0625 + 0.01 * 1.0, abs=1e-7)
    found = values(balance.as_metrics(made))
    assert found["train/balance_loss"] == pytest.approx(1.0625)
    assert found["train/router_z_loss"] == pytest.approx(1.0)
    assert found["train/expert_load"] == pytest.approx((1.5 + 1) / 2)
    assert found["train/least_expert_load"] == pytest.approx((0.375 + 1) / 2)
    assert found["train/dropped_tokens"] == pytest.approx(1 / 16)
    assert balance.as_metrics(None) == {}


def test_each_piece_is_counted_by_its_own_parameters():
    """As adapters' dropout has them: other keys in each piece."""
    definition = define_model(MODEL)
    params = initialize(definition, 0)
    batch = rows() | {"piece": np.arange(B, dtype=np.float32) % 2}
    noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    moved = lambda by: jax.tree.map(lambda x, other: x + jnp.float32(by) * other, params, noise)
    twice = lambda half: {name: np.concatenate([x, x]) for name, x in half.items()}
    found = balance.loads(lambda rows: moved(rows["piece"][0]), batch, 2, definition, CONFIG.routing)
    halves = ({name: x[piece::2] for name, x in batch.items()} for piece in range(2))
    count = lambda piece, half: balance.loads(lambda rows: moved(piece), twice(half), 2, definition, CONFIG.routing)
    np.testing.assert_array_equal(found, sum(count(piece, half) for piece, half in enumerate(halves)) / 2)


def test_biases_move_by_the_sign_of_the_error():
    config = with_experts(CONFIG, choice_bias=True).model
    definition = define_model(config)
    params = jax.jit(functools.partial(initialize, definition, 0))()
    load = jnp.array([[1.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 8.0]])
    made = Routing(load, load, load[:, 0], load[:, 0], load[:, 0])
    after = balance.balanced(params, made, definition, 0.5)
    biases = after["stack"]["0"]["experts"].pop("choice_bias")
    np.testing.assert_array_equal(biases, [[0.5, -0.5, 0, 0], [0.5, 0.5, 0.5, -0.5]])
    del params["stack"]["0"]["experts"]["choice_bias"]
    jax.tree.map(np.testing.assert_array_equal, after, params)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bias", "loss"])
def test_a_toy_comes_into_balance(way):
    """From a router that sends nearly all to two experts; neither by itself does nothing."""
    config = with_experts(CONFIG, choice_bias=way == "bias", shared=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, biases=("router",)))
    weights = {"bias": RoutingConfig(balance_loss=0, bias_rate=0.02), "loss": RoutingConfig(balance_loss=1.0)}
    load = {}
    for rule in (weights[way], RoutingConfig(balance_loss=0, bias_rate=0, router_z_loss=0)):
        made = dataclasses.replace(config, routing=rule, schedule=ScheduleConfig(peak=2e-2, warmup_steps=0))
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            program = pretrain.build(made, mesh)
            state = program.initialize()
            experts = state.params["stack"]["0"]["experts"]
            experts["router_bias"] = experts["router_bias"].at[:, :2].set(1.5)
            history = []
            for step in range(60):
                state, metrics = program.step(state, jax.device_put(rows(step), program.shardings.batch))
                history.append(values(metrics)["train/expert_load"])
        load[rule.balance_loss, rule.bias_rate] = np.mean(history[-10:])
    helped, left = load.values()
    assert history[0] > 1.6  # of 2, where all choose the same two
    assert helped < 1.3
    assert helped < left - 0.2


@pytest.mark.slow
def test_sft_has_the_same_losses():
    """Its step's gradient is that of pretraining's without a z-loss on the logits, prompts routed though no target."""
    config = SFTConfig(
        model="x",
        sources=(ChatSource(name="x", path="x"),),
        batch_rows=B,
        row_length=S,
        steps=100,
        schedule=CONFIG.schedule,
        routing=CONFIG.routing,
    )
    definition = define_model(MODEL)
    optimizer = optimizers.make_optimizer(CONFIG.optimizer, definition)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = pretrain.build(CONFIG, mesh).initialize()
        made = []
        for step, settings in ((pretrain.train_step, CONFIG), (sft.train_step, config)):
            given = {"definition": definition, "optimizer": optimizer, "learnt": CrossEntropy()}
            step = functools.partial(step, config=settings, **given)
            made.append(values(jax.jit(step)(state, rows())[1]))
    assert made[0] == pytest.approx(made[1], rel=1e-6)
    assert made[0]["train/balance_loss"] > 1
    assert math.isfinite(made[0]["train/router_z_loss"])


def test_a_mesh_that_does_not_divide_the_experts_is_refused():
    with pytest.raises(ConfigError, match=r"8 does not divide model.experts.count 4"):
        require_model_fits(MeshConfig(data=1, expert=8), 8, MODEL)
