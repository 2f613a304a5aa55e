"""Where KL is put decides what is learnt: expected gradients, summed exactly over all outcomes of a small softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.rl import kl
from jaxlm.rl.advantages import generalized_advantages, token_rewards
from jaxlm.rl.objectives import kl_loss, policy_loss

V = 5
OUTCOMES = np.array([[a, b] for a in range(V) for b in range(V)])  # two tokens, all 25 answers


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def policy(seed):
    """Logits of the first token `[V]`, and of the second given the first `[V, V]`."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (V,)), jax.random.normal(keys[1], (V, V))


@jax.jit
def logprobs_of(logits):
    """Of each answer's two tokens, `[25, 2]`."""
    first, second = (jax.nn.log_softmax(x) for x in logits)
    return jnp.stack([first[OUTCOMES[:, 0]], second[OUTCOMES[:, 0], OUTCOMES[:, 1]]], axis=1)


def kl_of(p, q):
    """KL(p ‖ q) over whole answers, by its definition."""
    log_p, log_q = logprobs_of(p).sum(1), logprobs_of(q).sum(1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def kl_at_prefixes(p, q, drawn_by):
    """Σ over both tokens of KL(p ‖ q) at the prefix, prefixes weighted as `drawn_by` draws them: without gradient."""
    one = lambda a, b: jnp.sum(jnp.exp(jax.nn.log_softmax(a)) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)), -1)
    prefixes = jax.lax.stop_gradient(jax.nn.softmax(drawn_by[0]))
    return one(p[0], q[0]) + jnp.sum(prefixes * one(p[1], q[1]))


GRADIENT_OF_KL, GRADIENT_AT_PREFIXES = jax.jit(jax.grad(kl_of)), jax.jit(jax.grad(kl_at_prefixes))


def chances(logits):
    """Probability of each answer, on both of its tokens: the weights that make a sum over answers an expectation."""
    each = jnp.exp(logprobs_of(logits).sum(1, keepdims=True))
    return jax.lax.stop_gradient(jnp.repeat(each, 2, axis=1))


with jax.enable_x64(True):
    POLICY, REFERENCE, MASK = policy(0), policy(1), jnp.ones((25, 2), bool)


def policy_gradient(rewards_to_go):
    """Expected gradient of PPO's loss at the policy that draws, rewards_to_go(logprobs) as advantages."""

    def loss(logits):
        logprobs = logprobs_of(logits)
        old = jax.lax.stop_gradient(logprobs)
        return policy_loss(logprobs, old, rewards_to_go(old), MASK, 0.2, 0.2, weights=chances(logits)).loss

    return jax.jit(jax.grad(loss))(POLICY)


def expected_gradient(estimator):
    reference = logprobs_of(REFERENCE)
    expected = lambda logits: jnp.sum(chances(logits) * estimator(logprobs_of(logits), reference))
    return jax.jit(jax.grad(expected))(POLICY)


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, want)


def test_estimators_of_the_table():
    logprobs, reference = jnp.array([[-1.0, -0.5, -0.2]]), jnp.array([[-1.2, -0.4, -0.5]])
    np.testing.assert_allclose(kl.k3(logprobs, reference), [[0.018731, 0.005171, 0.040818]], atol=1e-6)
    np.testing.assert_allclose(kl.k1(logprobs, reference), [[0.2, -0.1, 0.3]], atol=1e-12)
    np.testing.assert_allclose(kl.k2(logprobs, reference), [[0.02, 0.005, 0.045]], atol=1e-12)


def test_k1_and_k3_have_the_mean_kl_and_k2_has_not():
    logprobs, reference, weights = logprobs_of(POLICY), logprobs_of(REFERENCE), chances(POLICY)
    mean = {each.__name__: float(jnp.sum(weights * each(logprobs, reference))) for each in (kl.k1, kl.k2, kl.k3)}
    want = float(kl_of(POLICY, REFERENCE))
    assert abs(mean["k1"] - want) < 1e-12
    assert abs(mean["k3"] - want) < 1e-12
    assert abs(mean["k2"] - want) > 0.1


def test_k3_keeps_its_digits_where_the_policies_are_close():
    with jax.enable_x64(False):
        logprobs = jnp.array([[-1.0, -1.0]], jnp.float32)
        got = kl.k3(logprobs, logprobs - jnp.array([[1e-3, -1e-3]], jnp.float32))
    assert (np.asarray(got) >= 0).all()
    np.testing.assert_allclose(got, [[5e-7, 5e-7]], rtol=2e-3)


def test_k1_in_the_reward_gives_the_gradient_of_kl():
    """The score-function gradient, through jaxlm's own rewards, advantages and loss, over answers of two tokens."""

    def reward_to_go(logprobs):
        rewards = token_rewards(jnp.zeros(25), logprobs, logprobs_of(REFERENCE), MASK, 1.0)
        return generalized_advantages(rewards, jnp.zeros((25, 2)), MASK, 1.0, 1.0)[0]

    same(policy_gradient(reward_to_go), GRADIENT_OF_KL(POLICY, REFERENCE))


def test_k1_in_the_loss_gives_no_gradient():
    same(expected_gradient(kl.k1), jax.tree.map(jnp.zeros_like, POLICY))
    assert max(jnp.abs(x).max() for x in GRADIENT_OF_KL(POLICY, REFERENCE)) > 0.1  # while KL has one


def test_k2_in_the_loss_gives_the_gradient_of_kl_at_the_drawn_prefixes():
    got = expected_gradient(kl.k2)
    same(got, GRADIENT_AT_PREFIXES(POLICY, REFERENCE, POLICY))
    # The last token leads to no prefix, so that its part is that of the answer's KL; the first one's is not.
    whole = GRADIENT_OF_KL(POLICY, REFERENCE)
    same(got[1], whole[1])
    assert jnp.abs(got[0] - whole[0]).max() > 0.01


def test_k3_in_the_loss_gives_the_gradient_of_the_other_kl_at_the_drawn_prefixes():
    got = expected_gradient(kl.k3)
    same(got, jax.grad(lambda p: kl_at_prefixes(REFERENCE, p, POLICY))(POLICY))
    forward = GRADIENT_AT_PREFIXES(POLICY, REFERENCE, POLICY)
    assert max(jnp.abs(a - b).max() for a, b in zip(got, forward, strict=True)) > 0.01


def test_k3_in_the_loss_agrees_with_k2_to_first_order_around_the_reference():
    close = jax.tree.map(lambda a, b: b + 1e-4 * (a - b), POLICY, REFERENCE)
    expected = lambda estimator: jax.grad(
        lambda p: jnp.sum(chances(p) * estimator(logprobs_of(p), logprobs_of(REFERENCE)))
    )(close)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), expected(kl.k3), expected(kl.k2))
    assert max(jnp.abs(x).max() for x in expected(kl.k2)) > 1e-6


@pytest.mark.parametrize("estimator", [kl.k2, kl.k3])
def test_the_loss_is_these_estimators_summed(estimator):
    reference = logprobs_of(REFERENCE)
    loss = lambda p: kl_loss(logprobs_of(p), reference, MASK, estimator, weights=chances(p))
    same(jax.grad(loss)(POLICY), expected_gradient(estimator))


def test_k3_by_the_ratio_gives_the_gradient_of_kl_where_an_older_policy_drew():
    older = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, POLICY, REFERENCE)
    drawn, reference, odds = logprobs_of(older), logprobs_of(REFERENCE), chances(older)
    loss = lambda p: kl_loss(logprobs_of(p), reference, MASK, weights=odds, drawn=drawn)
    same(jax.grad(loss)(POLICY), GRADIENT_AT_PREFIXES(POLICY, REFERENCE, older))
    np.testing.assert_allclose(loss(POLICY), kl_at_prefixes(POLICY, REFERENCE, older), rtol=1e-9)
    plain = jax.grad(lambda p: kl_loss(logprobs_of(p), reference, MASK, weights=odds))(POLICY)
    assert max(jnp.abs(a - b).max() for a, b in zip(plain, jax.grad(loss)(POLICY), strict=True)) > 0.01


def test_ppo_at_ratio_1_is_the_policy_gradient():
    """∇ E[R] = Σ_answers p · R · ∇ log p, for a reward of whole answers."""
    scores = jax.random.normal(jax.random.key(7), (25,), jnp.float64)
    expected_reward = lambda p: jnp.sum(jnp.exp(logprobs_of(p).sum(1)) * scores)
    got = policy_gradient(lambda _: jnp.repeat(scores[:, None], 2, axis=1))
    same(jax.tree.map(jnp.negative, got), jax.grad(expected_reward)(POLICY))


@pytest.mark.parametrize(("observed", "want"), [(3.0, 0.148464), (6.0, 0.15), (12.0, 0.151536)])
def test_the_adaptive_coefficient_of_the_table(observed, want):
    np.testing.assert_allclose(kl.adaptive(0.15, observed, 6.0, 10000, 512), want, rtol=0, atol=1e-6)
    compiled = jax.jit(lambda c, k: kl.adaptive(c, k, 6.0, 10000, 512))
    np.testing.assert_allclose(compiled(0.15, observed), want, rtol=0, atol=1e-6)


def test_the_adaptive_coefficient_within_the_clip_is_proportional():
    np.testing.assert_allclose(kl.adaptive(0.15, 6.6, 6.0, 10000, 512), 0.15 * (1 + 0.1 * 0.0512), rtol=1e-12)
    assert kl.fixed(0.15, 600.0) == 0.15
