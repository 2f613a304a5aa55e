"""Losses of pairs against numbers checked by hand, to 1e-6 in float64, and their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.preference import losses
from jaxlm.preference.config import DPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from jaxlm.preference.losses import Answers


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def doubles(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float64)


def answers(logprobs, tokens, reference=None) -> Answers:
    """Of one pair or more."""
    logprobs, tokens = np.atleast_1d(np.float64(logprobs)), np.atleast_1d(np.float64(tokens))
    reference = np.zeros_like(logprobs) if reference is None else np.atleast_1d(np.float64(reference))
    return Answers(jnp.asarray(logprobs), jnp.asarray(tokens), jnp.asarray(reference))


close = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_dpo_golden_numbers():
    """DESIGN, section 7: differences of log-ratios, not of their means."""
    better, worse = doubles(0, 10, 20), doubles(0, 0, 0)
    each = losses.dpo(better, worse, 0.1)
    close(each, [0.693147, 0.313262, 0.126928])
    close(jnp.mean(each), 0.377779)
    # ε of the labels wrong: each loss grows by ε β Δ, 0, .1 and .2.
    close(jnp.mean(losses.dpo(better, worse, 0.1, 0.1)), 0.477779)
    # (0 - 5)², (10 - 5)², (20 - 5)²
    close(losses.ipo(better, worse, 0.1), [25, 25, 225])
    close(jnp.mean(losses.ipo(better, worse, 0.1)), 91.666667)


def test_dpo_of_answers_takes_sums_or_means_of_log_ratios():
    chosen, rejected = answers(-20, 5, -30), answers(-16, 3, -10)
    made = losses.losses(DPOConfig(), chosen, rejected, jnp.float64(0))
    close(made.loss, math.log1p(math.exp(-1.6)))  # .1 (10 + 6)
    close(made.chosen, 1.0)
    close(made.rejected, -0.6)
    # 10 nats over 5 tokens and -6 over 3: 2 and -2, times .5.
    made = losses.losses(DPOConfig(beta=0.5, length_normalised=True), chosen, rejected, jnp.float64(0))
    close(made.loss, 0.126928)
    close(made.chosen, 1.0)
    close(made.rejected, -1.0)
    close(losses.losses(DPOConfig(loss="ipo"), chosen, rejected, jnp.float64(0)).loss, (16 - 5) ** 2)
    close(
        losses.losses(DPOConfig(loss="ipo", length_normalised=True), chosen, rejected, jnp.float64(0)).loss,
        (4 - 5) ** 2,
    )
    smooth = losses.losses(
        DPOConfig(label_smoothing=0.1), answers([0, 10, 20], [1, 1, 1]), answers([0, 0, 0], [1] * 3), jnp.float64(0)
    )
    close(jnp.mean(smooth.loss), 0.477779)


def test_kto_by_hand():
    # Rewards .1 (10 - 5) = .5 and .1 (5 + 5) = 1: 1 - σ(.5) = .377541 and 1 - σ(1) = .268941.
    close(losses.kto(doubles(10), doubles(-5), jnp.float64(5), 0.1), (0.377541 + 0.268941) / 2)
    close(losses.kto(doubles(10), doubles(-5), jnp.float64(5), 0.1, 1.0, 1.33), (0.377541 + 1.33 * 0.268941) / 2)
    # An estimate below 0, which no KL is, counts as 0.
    close(losses.kto(doubles(10), doubles(-5), jnp.float64(-3), 0.1), (0.268941 + 0.377541) / 2)
    close(losses.kto(doubles(0), doubles(0), jnp.float64(0), 0.1), 0.5)
    made = losses.losses(KTOConfig(), answers(-10, 4, -20), answers(-25, 2, -20), jnp.float64(5))
    close(made.loss, 0.323241)
    close([made.chosen[0], made.rejected[0]], [1.0, -0.5])
    # The reference point gets no gradient, also where it is above 0.
    assert jax.grad(lambda kl: losses.kto(doubles(10), doubles(-5), kl, 0.1)[0])(jnp.float64(5)) == 0
    # d/dr of 1 - σ(β (r - z)) is -β σ (1 - σ): .1 · .622459 · .377541, half of it, for it is one answer of two.
    slope = jax.grad(lambda r: losses.kto(r, doubles(-5), jnp.float64(5), 0.1)[0])(doubles(10))
    close(slope, -0.1 * 0.622459 * 0.377541 / 2)


def test_orpo_by_hand():
    # p = 1/2 has odds 1, p = 1/4 has 1/3: the ratio is 3, σ(log 3) = 3/4. -log 1/2 - .1 log 3/4.
    each = losses.orpo(doubles(math.log(0.5)), doubles(math.log(0.25)), 0.1)
    close(each, 0.693147 + 0.1 * 0.287682)
    # Means, not sums: 4 tokens of p = 1/2, 2 of p = 1/4.
    made = losses.losses(ORPOConfig(), answers(4 * math.log(0.5), 4), answers(2 * math.log(0.25), 2), jnp.float64(0))
    close(made.loss, 0.721915)
    close([made.chosen[0], made.rejected[0]], [0.0, -0.1098612])


def test_log_odds_have_digits_at_both_ends_and_no_infinity():
    for p in (1e-9, 1e-3, 0.3, 0.6, 0.7, 0.999):
        close(losses.log_odds(doubles(math.log(p))), math.log(p) - math.log1p(-p))
    with jax.enable_x64(False):
        for mean in (0.0, -1e-9, -0.5, -100.0):
            value, slope = jax.value_and_grad(lambda x: losses.log_odds(x)[0])(jnp.array([mean], jnp.float32))
            assert np.isfinite(value)
            assert np.isfinite(slope).all()


def test_simpo_by_hand():
    # 2 (-.5 + 1.5) - 1 = 1, and 2 · 0 - 1 = -1.
    close(losses.simpo(doubles(-0.5, -1), doubles(-1.5, -1), 2.0, 1.0), [0.313262, 1.313262])
    made = losses.losses(SimPOConfig(), answers(-2, 4), answers(-3, 2), jnp.float64(0))
    close(made.loss, 0.313262)
    close([made.chosen[0], made.rejected[0]], [-1.0, -3.0])


@pytest.mark.parametrize(
    "method",
    [
        DPOConfig(),
        DPOConfig(label_smoothing=0.2),
        DPOConfig(loss="ipo"),
        DPOConfig(beta=2.0, length_normalised=True),
        KTOConfig(),
        ORPOConfig(weight=1.0),
        SimPOConfig(),
    ],
    ids=str,
)
def test_gradients_are_finite_differences_and_prefer_the_chosen(method):
    def loss(logprobs: jax.Array) -> jax.Array:
        a, b = answers(0, 4, -6.5), answers(0, 3, -5.0)
        a, b = a._replace(logprobs=logprobs[:1]), b._replace(logprobs=logprobs[1:])
        return losses.losses(method, a, b, jnp.float64(0.3)).loss[0]

    at, step = doubles(-6.0, -5.5), 1e-5
    slopes = np.asarray(jax.grad(loss)(at))
    each = [(loss(at + step * axis) - loss(at - step * axis)) / (2 * step) for axis in np.eye(2)]
    np.testing.assert_allclose(slopes, each, rtol=1e-6)
    assert slopes[0] < 0 < slopes[1], "up with the chosen answer, down with the rejected one"
