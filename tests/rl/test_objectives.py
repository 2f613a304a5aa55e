import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.rl import advantages, kl, objectives

# Compiled: all of them can be, and it is faster than operation by operation.
policy_loss, value_loss = jax.jit(objectives.policy_loss), jax.jit(objectives.value_loss)
entropy, explained_variance = jax.jit(objectives.entropy), jax.jit(objectives.explained_variance)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def picture(*rows: str) -> jax.Array:
    """A mask as it looks: "110" is two real tokens and one of padding."""
    return jnp.array([[c == "1" for c in row] for row in rows])


MASK = picture("11111", "11100", "10000", "11110", "01110", "11000", "11111", "00000")


def random_batch(seed=0, spread=0.3):
    """Log-probabilities, the old policy's, advantages: `[8, 5]` each, with tokens on both sides of every clip."""
    keys = jax.random.split(jax.random.key(seed), 3)
    old = -jnp.abs(jax.random.normal(keys[0], MASK.shape))
    return old + spread * jax.random.normal(keys[1], MASK.shape), old, jax.random.normal(keys[2], MASK.shape)


TOKEN = functools.partial(objectives.normalizers, kind="token")
SEQUENCE = functools.partial(objectives.normalizers, kind="sequence")
CONSTANT = functools.partial(objectives.normalizers, kind="constant", max_length=8)
KINDS = {"token": TOKEN, "sequence": SEQUENCE, "constant": CONSTANT}


@pytest.mark.parametrize(("kind", "want"), [("sequence", 1.5), ("token", 1.333333), ("constant", 0.5)])
def test_normalizations_of_the_table(float64, kind, want):
    losses = jnp.array([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 9.0, 9.0]])
    weights, units = KINDS[kind](picture("1111", "1100"))
    np.testing.assert_allclose(jnp.sum(weights * losses) / units, want, rtol=0, atol=1e-6)


def test_weights_by_eye():
    mask = picture("1111", "0110", "0000")
    np.testing.assert_array_equal(TOKEN(mask).weights, mask.astype(float))
    np.testing.assert_array_equal(SEQUENCE(mask).weights, [[0.25] * 4, [0, 0.5, 0.5, 0], [0] * 4])
    np.testing.assert_array_equal(CONSTANT(mask).weights, mask.astype(float) / 8)
    assert [float(of(mask).units) for of in (TOKEN, SEQUENCE, CONSTANT)] == [6, 2, 2]  # an empty row is no answer


def test_refused():
    with pytest.raises(ConfigError, match="max_length"):
        objectives.normalizers(MASK, "constant")
    with pytest.raises((ConfigError, jaxtyping.TypeCheckError), match="tokens"):
        objectives.normalizers(MASK, "tokens")  # pyright: ignore
    with pytest.raises(ConfigError, match="k1 has no expected gradient"):
        objectives.kl_loss(*random_batch()[:2], MASK, kl.k1)
    with pytest.raises(ConfigError, match="temperature"):
        objectives.token_logprobs(jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), 0.0)


def test_policy_loss_is_the_formula_in_numpy(float64):
    logprobs, old, advantages = (jnp.asarray(x, jnp.float64) for x in random_batch())
    got = policy_loss(logprobs, old, advantages, MASK, 0.2, 0.3)
    ratio, A, real = np.exp(np.asarray(logprobs - old)), np.asarray(advantages), np.asarray(MASK)
    surrogate = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.3) * A)
    stopped = ((ratio > 1.3) & (A > 0)) | ((ratio < 0.8) & (A < 0))
    want = (-surrogate, stopped, ratio, (ratio - 1) ** 2, ratio - 1 - np.log(ratio), np.ones_like(ratio))
    np.testing.assert_allclose(got, [x[real].sum() for x in want], rtol=1e-12)
    assert 2 <= got.clipped < got.tokens == 23


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_clipping_stops_the_gradient_exactly_and_only_outside(spread):
    logprobs, old, advantages = random_batch(spread=spread)
    loss = lambda x: policy_loss(x, old, advantages, MASK, 0.2, 0.3).loss
    got, ratio, A = np.asarray(jax.grad(loss)(logprobs)), np.exp(logprobs - old), np.asarray(advantages)
    stopped = ((ratio > 1.3) & (A > 0)) | ((ratio < 0.8) & (A < 0)) | ~np.asarray(MASK)
    np.testing.assert_array_equal(got[stopped], 0)
    np.testing.assert_allclose(got[~stopped], (-ratio * A)[~stopped], rtol=1e-5)  # at ratio 1: the policy gradient


def test_the_first_minibatch_has_ratio_1_and_no_kl():
    logprobs, _, advantages = random_batch()
    got = policy_loss(logprobs, logprobs, advantages, MASK, 0.2, 0.2)
    assert (got.clipped, got.squared_deviation, got.old_kl) == (0, 0, 0)
    assert got.ratio == got.tokens
    np.testing.assert_allclose(got.loss, -jnp.sum(jnp.where(MASK, advantages, 0.0)), rtol=1e-6)


@pytest.mark.parametrize("far", [50.0, 100.0, 1e30, np.inf])
def test_ratios_beyond_float32_make_no_nan(far):
    """Drawn with a probability of next to 0, or of 0, under the one or the other policy."""
    both = jnp.array([[far, -far, far, -far, far, -far]])
    advantages = jnp.array([[0.0, 0.0, 1.0, 1.0, -1.0, -1.0]])
    mask, zeros = jnp.ones((1, 6), bool), jnp.zeros((1, 6))
    for new, old in ((both, zeros), (zeros, -both)):
        loss = lambda x, old=old: policy_loss(x, old, advantages, mask, 0.2, 0.2).loss
        got, gradient = jax.value_and_grad(loss)(new)
        assert np.isfinite(got)
        # Clipped, of advantage 0, or past the cut; the fourth alone could move, with a ratio of next to nothing.
        np.testing.assert_allclose(gradient, 0, atol=1e-21)


def test_a_nan_at_a_real_token_is_not_hidden():
    for broken in range(3):
        x, y, z = (each.at[0, 0].set(jnp.nan) if i == broken else each for i, each in enumerate(random_batch()))
        assert np.isnan(policy_loss(x, y, z, MASK, 0.2, 0.2).loss)
        assert np.isnan(value_loss(x, y, z, MASK, 0.2).loss)


def test_value_loss_is_the_formula_in_numpy(float64):
    values, old, returns = (jnp.asarray(x, jnp.float64) for x in random_batch())
    got = value_loss(values, old, returns, MASK, 0.2)
    v, o, R = (np.asarray(x)[np.asarray(MASK)] for x in (values, old, returns))
    clipped = np.clip(v, o - 0.2, o + 0.2)
    larger = np.maximum((v - R) ** 2, (clipped - R) ** 2)
    stopped = (np.abs(v - o) > 0.2) & ((clipped - R) ** 2 > (v - R) ** 2)
    want = (0.5 * larger, stopped, R - v, (R - v) ** 2, R, R**2, np.ones_like(v))
    np.testing.assert_allclose(got, [x.sum() for x in want], rtol=1e-12)
    np.testing.assert_allclose(explained_variance(got), 1 - (R - v).var() / R.var(), rtol=1e-12)
    gradient = jax.grad(lambda x: value_loss(x, old, returns, MASK, 0.2).loss)(values)
    np.testing.assert_allclose(np.asarray(gradient)[np.asarray(MASK)], np.where(stopped, 0, v - R), rtol=1e-12)
    plain = value_loss(values, old, returns, MASK, np.inf)
    np.testing.assert_allclose(plain.loss, 0.5 * ((v - R) ** 2).sum(), rtol=1e-12)
    assert plain.clipped == 0 < got.clipped


def test_explained_variance_of_values_that_know_all_that_know_nothing_and_of_no_variance():
    _, old, returns = random_batch()
    of = lambda values, returns: float(explained_variance(value_loss(values, old, returns, MASK, np.inf)))
    assert of(returns, returns) == 1
    np.testing.assert_allclose(of(jnp.full(returns.shape, 0.7), returns), 0, atol=1e-6)
    assert np.isnan(of(old, jnp.full(returns.shape, 0.1)))


LOSSES = {
    "policy": lambda x, y, z, mask, weights: policy_loss(x, y, z, mask, 0.2, 0.3, weights=weights),
    "value": lambda x, y, z, mask, weights: value_loss(x, y, z, mask, 0.2, weights=weights),
    "k2": lambda x, y, z, mask, weights: objectives.kl_loss(x, y, mask, kl.k2, weights=weights),
    "k3": lambda x, y, z, mask, weights: objectives.kl_loss(x, y, mask, weights=weights),
}


@functools.partial(jax.jit, static_argnums=0)
def gradient_of(name, *arguments):
    """Sums, and the gradient of the loss with respect to the first argument."""
    loss = lambda first: getattr(LOSSES[name](first, *arguments[1:]), "loss", LOSSES[name](first, *arguments[1:]))
    return LOSSES[name](*arguments), jax.grad(loss)(arguments[0])


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_changes_no_bit_of_sums_and_gradients(name):
    batch, pad = random_batch(), np.asarray(~MASK)
    plain = gradient_of(name, *batch, MASK, SEQUENCE(MASK).weights)
    np.testing.assert_array_equal(np.asarray(plain[1])[pad], 0)
    for content in (0.0, 7e30, np.inf, np.nan):
        filled = [jnp.where(MASK, x, content) for x in (*batch, SEQUENCE(MASK).weights)]
        got = gradient_of(name, *filled[:3], MASK, filled[3])
        jax.tree.map(np.testing.assert_array_equal, got, plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_add_up_to_one_batch(float64, name, kind):
    batch = [jnp.asarray(x, jnp.float64) for x in random_batch()]
    weights, units = KINDS[kind](MASK)
    whole, gradient = gradient_of(name, *batch, MASK, weights)
    parts = [
        (gradient_of(name, *(x[i : i + 2] for x in batch), mask := MASK[i : i + 2], KINDS[kind](mask).weights), mask)
        for i in range(0, 8, 2)
    ]
    added = jax.tree.map(lambda *each: sum(each), *(sums for (sums, _), _ in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), added, whole)
    np.testing.assert_allclose(jnp.concatenate([each for (_, each), _ in parts]), gradient, rtol=1e-12)
    assert sum(float(KINDS[kind](mask).units) for _, mask in parts) == units


def test_token_logprobs_divide_the_logits_by_the_temperature(float64):
    logits = jax.random.normal(jax.random.key(0), (6, 7), jnp.float64) * 3
    ids = jnp.array([0, 6, 3, 3, 1, 5], jnp.int32)
    wide = np.asarray(logits) / 0.7
    want = (wide - np.log(np.exp(wide).sum(-1, keepdims=True)))[np.arange(6), ids]
    np.testing.assert_allclose(objectives.token_logprobs(logits, ids, 0.7), want, rtol=1e-12)
    assert objectives.token_logprobs(logits.astype(jnp.bfloat16), ids).dtype == jnp.float32


def test_entropy_is_exact_and_takes_impossible_tokens(float64):
    logits = jax.random.normal(jax.random.key(0), (6, 7), jnp.float64) * 3
    p = np.exp(np.asarray(logits))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy(logits), -(p * np.log(p)).sum(-1), rtol=1e-12)
    some = jnp.array([[0.0, 0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(entropy(some), [np.log(3), 0], atol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(entropy(x)))(some)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)  # both are as even as they can be


def test_the_temperature_may_be_traced_and_normalizers_compile():
    logits, ids = jax.random.normal(jax.random.key(0), (6, 7)), jnp.arange(6, dtype=jnp.int32)
    traced = jax.jit(objectives.token_logprobs)(logits, ids, jnp.float32(0.7))
    np.testing.assert_allclose(traced, objectives.token_logprobs(logits, ids, 0.7), rtol=1e-5)
    for of in KINDS.values():
        jax.tree.map(np.testing.assert_array_equal, jax.jit(of)(MASK), of(MASK))


def test_pair_loss_by_hand(float64):
    """Rewards of .1 a nat: differences of 0, 10 and 20 nats as in DESIGN, section 7, and a prompt that has no pair."""
    ratios = np.array([0, 0, 7, -3, 20, 0, 1e3, -1e3])
    mask = np.array([[True, True, False]] * 8)
    reference = np.full((8, 3), -5.0)
    logprobs = np.where(mask, reference + ratios[:, None] / 2, np.nan)
    signs = np.array([1.0, -1, 1, -1, 1, -1, 0, 0])
    given = map(jnp.asarray, (logprobs, reference, mask, signs))
    sums = objectives.pair_loss(*given, 0.1)
    np.testing.assert_allclose(sums.loss / sums.pairs, 0.377779, atol=1e-6)
    np.testing.assert_allclose([sums.margin, sums.correct, sums.pairs], [3, 2, 3], atol=1e-6)


def test_best_and_worst():
    rewards = jnp.array([[0.2, 0.9, 0.1, 0.9], [1, 1, 1, 1], [1, 2, 3, 4], [1, 2, jnp.nan, 4], [7, 8, 9, 9]])
    counted = jnp.array([[True] * 4, [True] * 4, [True, False, True, False], [True] * 4, [False, False, True, False]])
    found = advantages.best_and_worst(rewards, counted)
    expected = [[0, 1, -1, 0], [0, 0, 0, 0], [-1, 0, 1, 0], [np.nan] * 4, [0, 0, 0, 0]]
    np.testing.assert_array_equal(found, expected)
