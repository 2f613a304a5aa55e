"""A spike is what lies far above the last good steps; the rule by hand, and in the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.train import optimizer as optimizers
from jaxlm.train import spikes
from jaxlm.train.config import OptimizerConfig
from jaxlm.train.state import initial_state
from jaxlm.train.update import apply_gradients


def after(steps, window):
    recent = spikes.nothing_seen(window)
    for step in steps:
        recent = spikes.remembered(recent, jnp.array(step, jnp.float32))
    return recent


def test_the_threshold_is_median_and_mad():
    """Losses 1 2 3 4 100: median 3, deviations 2 1 0 1 97, MAD 1; an outlier in the window moves neither."""
    recent = after([(x, 1.0) for x in (1, 2, 3, 4, 100)], 5)
    spike = lambda loss, norm=1.0: bool(spikes.is_spike(recent, jnp.array([loss, norm]), 4.0))
    assert not spike(7.0)
    assert spike(7.01)
    assert spike(0.0, norm=1.05)  # all norms were 1: the least spread, 0.01 of the median, times 4
    assert not spike(0.0, norm=1.03)
    assert not spike(-50.0), "only what lies above"


def test_no_step_is_one_before_the_window_is_full_and_the_oldest_goes():
    now = jnp.array([1e9, 1e9])
    assert not bool(spikes.is_spike(after([(1.0, 1.0)] * 4, 5), now, 4.0))
    assert bool(spikes.is_spike(after([(1.0, 1.0)] * 5, 5), now, 4.0))
    recent = after([(9.0, 9.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], 3)
    np.testing.assert_array_equal(recent["seen"][:, 0], [3.0, 1.0, 2.0])


@pytest.mark.parametrize("halts", [False, True])
def test_a_spike_changes_nothing_and_a_state_that_halts_stands_still(halts):
    definition = define_model(ModelConfig(vocab_size=8, layers=1, width=8, heads=1).complete())
    config = OptimizerConfig(spike_limit=10.0, spike_window=4)
    optimizer = optimizers.make_optimizer(config, definition)
    params = initialize(definition, 0)
    state = initial_state(params, optimizer, False, config.spike_window)._replace(halt=jnp.int32(0 if halts else -1))

    @jax.jit
    def step(state, size):
        gradients = jax.tree.map(lambda p: size * jnp.ones_like(p), state.params)
        args = gradients, size, jnp.bool_(True), jnp.float32(1e-3)
        return apply_gradients(state, *args, optimizer, config, definition)[0]

    for size in (1.0, 1.1, 0.9, 1.0):
        state = step(state, jnp.float32(size))
    before = state
    state = step(state, jnp.float32(50.0))
    assert (int(state.step), int(state.skipped), int(state.halt)) == (5, 1, 5 if halts else -1)
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))
    kept = lambda s: (s.params, s.optimizer, s.recent)
    assert same(kept(before), kept(state))
    state = step(state, jnp.float32(1.0))
    assert same(kept(before), kept(state)) == halts
    assert (int(state.step), int(state.skipped)) == ((5, 1) if halts else (6, 1))
