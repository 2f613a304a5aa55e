import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.rl import advantages as adv

LOGPROBS, REFERENCE = [[-1.0, -0.5, -0.2]], [[-1.2, -0.4, -0.5]]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def picture(*rows: str) -> jax.Array:
    """A mask as it looks: "110" is two real tokens and one of padding."""
    return jnp.array([[c == "1" for c in row] for row in rows])


def near(got, want):
    """The hand-checked numbers of DESIGN, section 7: held to 1e-6, and printed there with six digits."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def random_batch(seed=0, B=4, T=6):
    keys = jax.random.split(jax.random.key(seed), 2)
    rewards, values = (jax.random.normal(key, (B, T)) for key in keys)
    return rewards, values, picture("111111", "111000", "100000", "111110")


def test_rewards_of_the_table(float64):
    mask = picture("111")
    got = adv.token_rewards(jnp.array([0.73]), jnp.array(LOGPROBS), jnp.array(REFERENCE), mask, 0.05)
    near(got, [[-0.01, 0.005, 0.715]])


def test_a_fractional_score_survives_in_float32_beside_integers():
    logprobs = jnp.zeros((2, 3), jnp.bfloat16)
    got = adv.token_rewards(jnp.array([0.73, 1.0]), logprobs, logprobs, picture("111", "100"), 0.05)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.array([[0, 0, 0.73], [1, 0, 0]], np.float32))
    whole = adv.token_rewards(jnp.array([3, 1]), logprobs, logprobs, picture("111", "100"), 0.05)
    np.testing.assert_array_equal(whole, np.array([[0, 0, 3], [1, 0, 0]], np.float32))


def test_the_score_lies_on_the_last_real_token_alone():
    mask = picture("11100", "10000", "00111", "01011", "11111", "00000")
    last = picture("00100", "10000", "00001", "00001", "00001", "00000")
    np.testing.assert_array_equal(adv.last_tokens(mask), last)
    zeros = jnp.zeros(mask.shape)
    got = adv.token_rewards(jnp.full(6, 0.5), zeros, zeros, mask, 0.05)
    np.testing.assert_array_equal(got, jnp.where(last, 0.5, 0.0))


def test_advantages_and_returns_of_the_table(float64):
    rewards, values = jnp.array([[-0.01, 0.005, 0.715]]), jnp.array([[0.1, 0.2, 0.3]])
    advantages, returns = adv.generalized_advantages(rewards, values, picture("111"), 1.0, 0.95)
    near(advantages, [[0.5642875, 0.49925, 0.415]])
    near(returns, [[0.6642875, 0.69925, 0.715]])
    near(adv.whitened(advantages, picture("111")), [[0.954470, 0.085560, -1.040030]])


def test_lambda_1_is_discounted_returns_minus_values(float64):
    rewards, values, mask = random_batch()
    rewards, values = (jnp.asarray(x, jnp.float64) for x in (rewards, values))
    got, returns = adv.generalized_advantages(rewards, values, mask, 0.9, 1.0)
    for b, length in enumerate([6, 3, 1, 5]):
        for t in range(length):
            discounted = sum(0.9 ** (s - t) * rewards[b, s] for s in range(t, length))
            np.testing.assert_allclose(got[b, t], discounted - values[b, t], atol=1e-12)
            np.testing.assert_allclose(returns[b, t], discounted, atol=1e-12)


def test_lambda_0_is_the_temporal_difference_error(float64):
    rewards, values, mask = random_batch()
    rewards, values = (jnp.asarray(x, jnp.float64) for x in (rewards, values))
    got, _ = adv.generalized_advantages(rewards, values, mask, 0.9, 0.0)
    for b, length in enumerate([6, 3, 1, 5]):
        for t in range(length):
            after = values[b, t + 1] if t + 1 < length else 0.0
            np.testing.assert_allclose(got[b, t], rewards[b, t] + 0.9 * after - values[b, t], atol=1e-12)


def test_gae_is_the_weighted_mean_of_n_step_advantages_on_a_random_markov_chain(float64):
    """The definition, (1 - λ) Σ λ^(n-1) A^(n), where the last n takes all the weight that is left."""
    random = np.random.default_rng(3)
    gamma, lam, states = 0.97, 0.8, 5
    chances, value_of = random.dirichlet(np.ones(states), size=states), random.normal(size=states)
    lengths, B, T = [7, 4, 1, 6], 4, 8
    rewards, values, mask = np.full((B, T), np.nan), np.full((B, T), np.nan), np.zeros((B, T), bool)
    want = np.zeros((B, T))
    for b, length in enumerate(lengths):
        state = 0
        for t in range(length):
            rewards[b, t], values[b, t], mask[b, t] = random.normal(state), value_of[state], True
            state = random.choice(states, p=chances[state])
        v = np.append(values[b, :length], 0.0)
        for t in range(length):
            steps = length - t
            n_step = [
                sum(gamma**i * rewards[b, t + i] for i in range(n)) + gamma**n * v[t + n] - v[t]
                for n in range(1, steps + 1)
            ]
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, steps)] + [lam ** (steps - 1)]
            want[b, t] = np.dot(weights, n_step)
    got, _ = adv.generalized_advantages(jnp.array(rewards), jnp.array(values), jnp.array(mask), gamma, lam)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_positions_between_real_tokens_are_no_steps():
    """Another speaker's turn in the middle, a prompt in front: as if they were not there."""
    rewards, values = jnp.array([[0.3, -0.2, 0.7]]), jnp.array([[0.1, 0.2, 0.4]])
    dense, returns = adv.generalized_advantages(rewards, values, picture("111"), 0.9, 0.8)
    spread = lambda x: jnp.full((1, 6), jnp.nan).at[0, jnp.array([1, 3, 4])].set(x[0])
    got, got_returns = adv.generalized_advantages(spread(rewards), spread(values), picture("010110"), 0.9, 0.8)
    zeros = lambda x: np.nan_to_num(spread(x))
    np.testing.assert_array_equal(got, zeros(dense))
    np.testing.assert_array_equal(got_returns, zeros(returns))


FUNCTIONS = {
    "rewards": lambda x, y, mask: adv.token_rewards(jnp.arange(4.0), x, y, mask, 0.1),
    "advantages": lambda x, y, mask: adv.generalized_advantages(x, y, mask, 0.9, 0.8)[0],
    "returns": lambda x, y, mask: adv.generalized_advantages(x, y, mask, 0.9, 0.8)[1],
    "whitened": lambda x, y, mask: adv.whitened(x + y, mask),
    "whitened, not centered": lambda x, y, mask: adv.whitened(x + y, mask, center=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_padding_holds_changes_no_bit_of_values_and_gradients(name):
    x, y, mask = random_batch()
    pad = np.asarray(~mask)

    @jax.jit
    def values_and_gradients(x, y):
        values = FUNCTIONS[name](x, y, mask)
        return values, *jax.grad(lambda x, y: jnp.sum(jnp.sin(FUNCTIONS[name](x, y, mask))), argnums=(0, 1))(x, y)

    plain = values_and_gradients(x, y)
    for content in (0.0, 7e30, np.inf, np.nan):
        got = values_and_gradients(*(jnp.where(mask, each, content) for each in (x, y)))
        for one, other in zip(got, plain, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(np.asarray(one)[pad], 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_padding_changes_nothing(name):
    x, y, mask = random_batch()
    wider = [jnp.pad(each, ((0, 0), (0, 3))) for each in (x, y, mask)]
    got, want = (jax.jit(FUNCTIONS[name])(*arguments) for arguments in (wider, (x, y, mask)))
    np.testing.assert_allclose(got[:, :6], want, atol=1e-6)
    np.testing.assert_array_equal(got[:, 6:], 0)


def test_whitened_has_mean_0_and_unbiased_variance_1(float64):
    x, _, mask = random_batch()
    x = jnp.asarray(x, jnp.float64) * 3 + 100
    got = np.asarray(adv.whitened(x, mask))[np.asarray(mask)]
    np.testing.assert_allclose([got.mean(), got.std(ddof=1)], [0, 1], atol=1e-8)
    kept = np.asarray(adv.whitened(x, mask, center=False))[np.asarray(mask)]
    np.testing.assert_allclose(kept - got, np.asarray(x)[np.asarray(mask)].mean(), atol=1e-9)


def test_whitened_over_eight_devices_is_whitened_on_one():
    x, mask = jax.random.normal(jax.random.key(2), (8, 6)) + 3, picture(*(["111100", "100000"] * 4))
    rows = jax.NamedSharding(make_mesh(MeshConfig(data=8)), jax.P("data"))
    spread = jax.jit(adv.whitened)(jax.device_put(x, rows), jax.device_put(mask, rows))
    np.testing.assert_allclose(spread, adv.whitened(x, mask), atol=1e-5)


def test_whitened_without_variance_is_0():
    x = jnp.full((3, 7), 0.1)
    np.testing.assert_array_equal(adv.whitened(x, picture("1111111", "1100000", "1000000")), 0)
    np.testing.assert_array_equal(adv.whitened(x, picture("1000000", "0000000", "0000000")), 0)
    for center in (True, False):
        np.testing.assert_array_equal(adv.whitened(x, jnp.zeros((3, 7), bool), center=center), 0)


def test_group_advantages_of_the_table(float64):
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    signs = np.array([[1, -1, -1, 1]])
    near(adv.group_advantages(rewards, 1e-6), signs * 0.866024)
    near(adv.group_advantages(rewards, 1e-4), signs * 0.865875)
    near(adv.group_advantages(rewards, 1e-6, scale=False), signs * 0.5)
    near(adv.group_advantages(rewards, 1e-6, ddof=0), signs * (0.5 / (0.5 + 1e-6)))
    near(adv.leave_one_out(rewards), signs * 0.666667)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7, 1e6])
@pytest.mark.parametrize("K", [2, 3, 7])
def test_equal_rewards_give_exactly_0(reward, K):
    rewards = jnp.full((3, K), reward)
    for got in (adv.group_advantages(rewards, 1e-6), adv.leave_one_out(rewards)):
        np.testing.assert_array_equal(got, 0)


def test_leave_one_out_is_the_difference_to_the_mean_of_the_others(float64):
    rewards = jax.random.normal(jax.random.key(1), (3, 5), jnp.float64)
    want = [[r[k] - np.delete(r, k).mean() for k in range(5)] for r in np.asarray(rewards)]
    np.testing.assert_allclose(adv.leave_one_out(rewards), want, atol=1e-12)


def test_one_answer_is_no_group():
    one = jnp.ones((3, 1))
    for refused in (adv.leave_one_out, functools.partial(adv.group_advantages, epsilon=1e-6, ddof=0)):
        with pytest.raises(ConfigError, match="samples: got 1 answers"):
            refused(one)
    with pytest.raises(ConfigError, match="epsilon"):
        adv.group_advantages(jnp.ones((3, 2)), 0.0)


def test_answers_that_did_not_end():
    scores, ended = jnp.array([0.9, 0.9]), jnp.array([True, False])
    np.testing.assert_allclose(adv.missing_eos(scores, ended, "none", 1.0), [0.9, 0.9])
    np.testing.assert_allclose(adv.missing_eos(scores, ended, "penalty", 1.0), [0.9, -0.1], rtol=1e-6)
    np.testing.assert_allclose(adv.missing_eos(scores, ended, "replace", -1.0), [0.9, -1.0])
    with pytest.raises((ConfigError, jaxtyping.TypeCheckError), match="replaced"):
        adv.missing_eos(scores, ended, "replaced", 1.0)  # pyright: ignore


def test_all_of_it_compiles():
    x, y, mask = random_batch()
    scores, ended = jnp.arange(4.0), jnp.array([True, False, True, True])
    eager_and_jit = [
        (functools.partial(adv.token_rewards, coefficient=0.1), (scores, x, y, mask)),
        (functools.partial(adv.generalized_advantages, gamma=0.9, lam=0.8), (x, y, mask)),
        (adv.whitened, (x, mask)),
        (functools.partial(adv.group_advantages, epsilon=1e-6), (x,)),
        (adv.leave_one_out, (x,)),
        (functools.partial(adv.missing_eos, kind="penalty", amount=1.0), (scores, ended)),
    ]
    for function, arguments in eager_and_jit:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            jax.jit(function)(*arguments),
            function(*arguments),
        )
