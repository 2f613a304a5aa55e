"""GRPO's variants and REINFORCE++ against numbers worked out by hand, their gradients against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl import advantages as adv
from jaxlm.rl import objectives
from jaxlm.rl.config import GRPOConfig, PPOConfig, ReinforceConfig, RLConfig


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def picture(*rows: str) -> jax.Array:
    return jnp.array([[c == "1" for c in row] for row in rows])


def loss(logprobs, old, gains, mask, *, low, high, normalization, most=0, sequence_ratio=False):
    """As `grpo_step` puts it together; `gains` of answers or of tokens."""
    weights, units = objectives.normalizers(mask, normalization, most)
    gains = jnp.broadcast_to(gains.reshape(len(mask), -1), mask.shape)
    sums = objectives.policy_loss(logprobs, old, gains, mask, low, high, weights=weights, sequence_ratio=sequence_ratio)
    return sums.loss / units


GSPO = functools.partial(loss, low=0.04, high=0.04, normalization="sequence", sequence_ratio=True)
BY_TOKEN = functools.partial(loss, low=0.04, high=0.04, normalization="sequence")
DAPO = functools.partial(loss, low=0.2, high=0.28, normalization="token")
DR_GRPO = functools.partial(loss, low=0.2, high=0.2, normalization="constant", most=8)
REINFORCE = functools.partial(loss, low=0.2, high=0.2, normalization="token")


def two_answers():
    """(log-probabilities, the old policy's), of 2 and 3 tokens."""
    return jnp.array([[-1.0, -0.5, 9.0], [-2.0, -1.0, -0.3]]), jnp.array([[-1.2, -0.4, 7.0], [-1.9, -1.3, -0.3]])


def test_gspo_by_hand():
    # log-ratios (.2 - .1) / 2 = .05 and (-.1 + .3 + 0) / 3 = .066667: ratios 1.051271 and 1.068939. The first is
    # clipped to 1.04; of the second, with a bad answer, the smaller product counts: -(1.04 - 1.068939) / 2.
    mask = picture("110", "111")
    logprobs, old = two_answers()
    got = GSPO(logprobs, old, jnp.array([1.0, -1.0]), mask)
    np.testing.assert_allclose(got, 0.014470, rtol=0, atol=1e-6)
    gradient = jax.grad(lambda x: GSPO(x, old, jnp.array([1.0, -1.0]), mask))(logprobs)
    # Nothing from the clipped one; each token of the other a third of its ratio, over 2 answers.
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1.068939 / 6] * 3], rtol=0, atol=1e-6)
    # At the policy that drew them, sequence by sequence or token by token is the same.
    at_old = [jax.grad(lambda x, f=f: f(x, old, jnp.array([1.0, -1.0]), mask))(old) for f in (GSPO, BY_TOKEN)]
    np.testing.assert_allclose(*at_old, atol=1e-12)


def test_what_is_measured_of_a_sequence_ratio():
    mask = picture("110", "111")
    logprobs, old = two_answers()
    sums = objectives.policy_loss(logprobs, old, jnp.ones((2, 3)), mask, 0.04, 0.06, sequence_ratio=True)
    assert (sums.clipped, sums.tokens) == (3, 5)  # the second answer, all of it
    np.testing.assert_allclose(sums.ratio, 2 * 1.051271 + 3 * 1.068939, atol=1e-5)
    by_token = objectives.policy_loss(logprobs, old, jnp.ones((2, 3)), mask, 0.04, 0.06)
    assert sums.old_kl == by_token.old_kl  # of tokens in both, so that runs can be compared


def test_dapo_by_hand():
    # Ratios 1.5 and .5 of a good answer: 1.28 (clipped) + .5; 1.5, .5 and 1 of a bad one: -1.5 - .8 (clipped) - 1.
    mask = picture("110", "111")
    logprobs = jnp.log(jnp.array([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]]))
    got = DAPO(logprobs, jnp.zeros((2, 3)), jnp.array([1.0, -1.0]), mask)
    np.testing.assert_allclose(got, 1.52 / 5, rtol=0, atol=1e-6)


def test_dr_grpo_by_hand():
    # Rewards 1, 0, 0, 1 less their mean: ±.5, not divided; lengths 2, 4, 1, 4, each over 8: (1 - 2 - .5 + 2) / 32.
    gains = adv.group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]]), 0.0, scale=False)
    np.testing.assert_array_equal(gains, [[0.5, -0.5, -0.5, 0.5]])
    got = DR_GRPO(jnp.zeros((4, 4)), jnp.zeros((4, 4)), gains, picture("1100", "1111", "1000", "1111"))
    np.testing.assert_allclose(got, -0.015625, rtol=0, atol=1e-6)


def test_reinforce_plus_plus_advantages_by_hand():
    # Scores 1 and 0, β .1; k1 [.2, -.1] and [.2]: rewards [-.02, 1.01] and [-.02], to come [.99, 1.01] and [-.02];
    # mean .66, unbiased variance (.1089 + .1225 + .4624) / 2 = .3469.
    mask = picture("11", "10")
    logprobs, reference = jnp.array([[-1.0, -0.5], [-0.3, 9.0]]), jnp.array([[-1.2, -0.4], [-0.5, 7.0]])
    rewards = adv.token_rewards(jnp.array([1.0, 0.0]), logprobs, reference, mask, 0.1)
    to_come = adv.rewards_to_come(rewards, mask, 1.0)
    np.testing.assert_allclose(to_come, [[0.99, 1.01], [-0.02, 0.0]], rtol=0, atol=1e-12)
    got = adv.whitened(to_come, mask)
    np.testing.assert_allclose(got, [[0.560289, 0.594246], [-1.154534, 0]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(adv.rewards_to_come(rewards, mask, 0.5)[0], [-0.02 + 0.505, 1.01], atol=1e-12)
    # The policy moves towards the first answer, by (.560289 + .594246) / 3 at ratio 1, and away from the second.
    gradient = jax.grad(lambda x: REINFORCE(x, logprobs, got, mask))(logprobs)
    np.testing.assert_allclose(gradient, -got / 3, rtol=0, atol=1e-12)


def test_soft_punishment_of_length_by_hand():
    lengths = jnp.array([1, 4, 5, 6, 7, 8], jnp.int32)
    np.testing.assert_allclose(adv.overlong(lengths, 8, 4), [0, 0, -0.25, -0.5, -0.75, -1.0], atol=1e-12)


@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize("name", ["GSPO", "DAPO", "DR_GRPO", "REINFORCE"])
def test_gradients_are_finite_differences(name, spread):
    objective = globals()[name]
    mask = picture("11111", "11100", "10000", "01110", "00000", "11110")
    random = np.random.default_rng(0)
    old = -np.abs(random.standard_normal(mask.shape))
    logprobs = old + spread * random.standard_normal(mask.shape)
    gains = jnp.asarray(random.standard_normal((len(mask), 5 if name == "REINFORCE" else 1)))
    value = jax.jit(lambda x: objective(x, jnp.asarray(old), gains, mask))
    gradient = np.asarray(jax.grad(value)(jnp.asarray(logprobs)))
    h = 1e-6
    for index in np.ndindex(*mask.shape):
        step = np.zeros(mask.shape)
        step[index] = h
        slope = (value(jnp.asarray(logprobs + step)) - value(jnp.asarray(logprobs - step))) / (2 * h)
        np.testing.assert_allclose(gradient[index], slope, rtol=0, atol=1e-8)
    assert np.abs(gradient).max() > 0.01


def config(**fields) -> RLConfig:
    made = dict(
        model="unread",
        verifiers=(VerifierConfig(kind="exact"),),
        sources=(ChatSource(name="train", path="unread.jsonl"),),
        samples=4,
    )
    return RLConfig(**made | fields)


def test_configs_that_fit_no_method_are_refused():
    with pytest.raises(ConfigError, match="normalization: got 'token'; a ratio of whole sequences"):
        GRPOConfig(ratio="sequence", normalization="token")
    with pytest.raises(ConfigError, match="exactly one of ppo, grpo, dpo and reinforce"):
        config(ppo=PPOConfig(), reinforce=ReinforceConfig())
    with pytest.raises(ConfigError, match="samples: got 1; a group needs"):
        config(reinforce=ReinforceConfig(baseline="group"), samples=1)
    config(reinforce=ReinforceConfig(), samples=1)
    with pytest.raises(ConfigError, match="grpo.extra_prompts: is for verifiers alone"):
        config(grpo=GRPOConfig(extra_prompts=8), reward_model="unread")
    with pytest.raises(ConfigError, match="overlong_tokens: got 200; max_tokens is 128"):
        config(grpo=GRPOConfig(), overlong_tokens=200)
    assert config(reinforce=ReinforceConfig()).penalty == ReinforceConfig().kl
    assert config(grpo=GRPOConfig()).penalty is None
