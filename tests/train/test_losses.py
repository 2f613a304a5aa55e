import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.train import losses


def test_targets_are_the_next_tokens_that_the_mask_marks():
    ids = jnp.array([[5, 6, 7, 8, 0]])
    mask = jnp.array([[False, True, False, True, False]])
    targets, counted = losses.targets_of(ids, mask)
    np.testing.assert_array_equal(targets[0, :4], [6, 7, 8, 0])
    np.testing.assert_array_equal(counted, [[True, False, True, False, False]])


def test_the_first_token_of_a_row_is_never_a_target():
    _, counted = losses.targets_of(jnp.array([[5, 6]]), jnp.array([[True, False]]))
    assert not counted.any()


def test_sums_match_numpy_in_float64():
    logits = jax.random.normal(jax.random.key(0), (7, 11)) * 5
    targets = jnp.arange(7, dtype=jnp.int32)
    counted = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    got = losses.token_sums(logits, targets, counted)
    wide = np.asarray(logits, np.float64)
    normalizer = np.log(np.exp(wide).sum(-1))
    each = normalizer - wide[np.arange(7), np.arange(7)]
    np.testing.assert_allclose(got.loss, each[np.asarray(counted)].sum(), rtol=1e-6)
    np.testing.assert_allclose(got.squared_normalizer, (normalizer**2)[np.asarray(counted)].sum(), rtol=1e-6)
    assert float(got.correct) == (wide.argmax(-1) == np.arange(7))[np.asarray(counted)].sum()
    assert float(got.targets) == 5


def test_uniform_logits_cost_log_v():
    got = losses.token_sums(jnp.zeros((3, 8)), jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    np.testing.assert_allclose(got.loss, 3 * np.log(8), rtol=1e-6)
