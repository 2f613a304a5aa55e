"""Invariants of the train step on small random rows, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.train import losses
from jaxlm.train.config import OptimizerConfig, ScheduleConfig
from jaxlm.train.state import convert_layout

B, S, V = 8, 16, 64
MODEL = ModelConfig(
    vocab_size=V, layers=4, width=32, heads=4, kv_heads=2, feed_forward=64, qk_norm=True, compute="float32"
).complete()
CONFIG = PretrainConfig(
    data=(MixtureSource(name="x", path="x"),),
    model=MODEL,
    row_length=S,
    batch_rows=B,
    steps=100,
    schedule=ScheduleConfig(peak=1e-2, warmup_steps=0),
    z_loss=1e-3,
)


def rows(seed=0):
    """Rows of two documents of random lengths and some padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, V, (B, S)).astype(np.int32)
    segments, positions = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
    for row in range(B):
        cut, end = sorted(random.choice(np.arange(3, S + 1), 2, replace=False))
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    return {"ids": ids, "segment_ids": segments, "positions": positions, "loss_mask": (segments > 0) & (positions > 0)}


def run(config, mesh=None, steps=3, batches=rows):
    devices = jax.devices() if mesh else jax.devices()[:1]
    mesh = make_mesh(mesh or MeshConfig(), devices)
    with jax.set_mesh(mesh):
        program = pretrain.build(config, mesh)
        state = program.initialize()
        history = []
        for step in range(steps):
            batch = jax.device_put(batches(step), program.shardings.batch)
            state, metrics = program.step(state, batch)
            history.append(values(metrics))
        assert program.step._cache_size() <= 1, "the step compiled more than once"
    return state, history


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def one_device():
    return run(CONFIG)


@pytest.mark.parametrize(
    "mesh",
    [
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in (MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=4, tensor=2))
        ),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=4, context=2),
        MeshConfig(slices=2, data=2, fsdp=2),
    ],
    ids=str,
)
def test_eight_devices_equal_one(mesh, one_device):
    state, history = run(CONFIG, mesh)
    close([h["train/loss"] for h in history], [h["train/loss"] for h in one_device[1]])
    close([h["train/gradient_norm"] for h in history], [h["train/gradient_norm"] for h in one_device[1]])
    # AdamW divides by the root of tiny second moments: parameters may differ by a little more than the gradient.
    close(state.params, one_device[0].params, 2e-4)


SLOW = pytest.mark.slow


# Not Lion: the sign of a momentum that is almost 0 is a matter of rounding.
@pytest.mark.parametrize("kind", ["sgd", *(pytest.param(kind, marks=SLOW) for kind in ("muon", "adafactor", "soap"))])
def test_eight_devices_equal_one_under_every_rule(kind):
    # Adam's own epsilon would blow the rounding of a gradient that is almost 0 up to whole steps.
    optimizer = OptimizerConfig(kind=kind, epsilon=1e-3, soap_refresh_steps=2)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    (one, alone), (many, together) = run(config), run(config, MeshConfig(data=2, fsdp=2, tensor=2))
    close([h["train/loss"] for h in together], [h["train/loss"] for h in alone])
    close(many.params, one.params, 2e-4)


def test_accumulated_equals_one_big_batch(one_device):
    for pieces in (2, 8):
        state, history = run(dataclasses.replace(CONFIG, accumulate=pieces))
        close([h["train/loss"] for h in history], [h["train/loss"] for h in one_device[1]])
        close(state.params, one_device[0].params, 2e-4)


def test_chunked_logits_change_nothing(one_device):
    _, history = run(dataclasses.replace(CONFIG, loss_chunk_tokens=32))
    close([h["train/loss"] for h in history], [h["train/loss"] for h in one_device[1]])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat, one_device):
    _, history = run(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat=remat)))
    close([h["train/gradient_norm"] for h in history], [h["train/gradient_norm"] for h in one_device[1]])


@pytest.mark.slow
def test_unrolled_equals_scanned(one_device):
    state, history = run(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, scan_layers=False)))
    close([h["train/loss"] for h in history], [h["train/loss"] for h in one_device[1]])
    close(state.params, convert_layout(one_device[0].params, MODEL, stacked=False), 2e-4)


def test_optimizer_state_is_sharded_like_the_weights():
    state, _ = run(CONFIG, MeshConfig(data=1, fsdp=4, tensor=2), steps=1)
    moment = state.optimizer[0].mu["stack"]["0"]["mlp"]["up"]
    weight = state.params["stack"]["0"]["mlp"]["up"]
    assert moment.sharding == weight.sharding
    assert weight.addressable_shards[0].data.size == weight.size // 8


# Lion's steps are all of one size, SGD's as large as the gradient.
PEAKS = {"muon": 1e-2, "adamw": 1e-2, "soap": 1e-2, "adafactor": 1e-2, "lion": 4e-3, "sgd": 0.5}


@pytest.mark.parametrize("kind", ["muon", *(pytest.param(kind, marks=SLOW) for kind in PEAKS if kind != "muon")])
def test_overfits_one_batch(kind):
    optimizer = OptimizerConfig(kind=kind, weight_decay=0.0)
    schedule = dataclasses.replace(CONFIG.schedule, peak=PEAKS[kind])
    config = dataclasses.replace(CONFIG, optimizer=optimizer, schedule=schedule, steps=80)
    _, history = run(config, steps=80, batches=lambda step: rows(0))
    assert history[0]["train/loss"] > 3.5
    assert history[-1]["train/loss"] < 0.05


def test_a_bad_step_changes_nothing_and_is_counted():
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(ema=0.9))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = pretrain.build(config, mesh)
        state, _ = program.step(program.initialize(), jax.device_put(rows(0), program.shardings.batch))
        broken = state._replace(params=state.params | {"head": state.params["head"].at[0, 0].set(jnp.nan)})
        before = jax.device_get(broken)
        after, metrics = program.step(broken, jax.device_put(rows(1), program.shardings.batch))
    assert int(after.step) == 2
    assert int(after.skipped) == 1
    assert float(metrics["train/skipped_steps"].sum) == 1
    for a, b in zip(jax.tree.leaves(before[1:4]), jax.tree.leaves(jax.device_get(after)[1:4]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ema_follows_the_parameters():
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(ema=0.75))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = pretrain.build(config, mesh)
        state = program.initialize()
        before = jax.device_get(state.ema)
        state, _ = program.step(state, jax.device_put(rows(0), program.shardings.batch))
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, before, jax.device_get(state.params))
    close(state.ema, expected, 1e-6)


def test_an_empty_batch_trains_on_nothing():
    empty = {name: np.zeros_like(value) for name, value in rows().items()}
    before, _ = run(CONFIG, steps=0)
    state, history = run(CONFIG, steps=1, batches=lambda step: empty)
    assert np.isnan(history[0]["train/loss"]), "a loss of 0 would look like success"
    assert int(state.skipped) == 1
    close(state.params, before.params, 0)


@pytest.mark.slow
def test_gradient_equals_finite_differences():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = pretrain.build(CONFIG, mesh)
        params = program.initialize().params
        definition = pretrain.define_model(MODEL)
        batch = {name: jnp.asarray(value) for name, value in rows().items()}

        def loss(params):
            return losses.row_sums(params, batch, definition).loss

        direction = jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * p.std() if p.std() > 0 else p * 0.1, params
        )
        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(direction), strict=True)
        )
        h = 1e-3
        ahead = loss(jax.tree.map(lambda p, d: p + h * d, params, direction))
        behind = loss(jax.tree.map(lambda p, d: p - h * d, params, direction))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=5e-3)
