"""What the models say of a rollout: at the right places, with whatever padding, in whatever chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.hub.language_model import LanguageModel
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import apply, initialize
from jaxlm.rl import forward
from jaxlm.rl.rollout import Rollout
from jaxlm.sample.decoding import prepare
from jaxlm.tokenizer.byte import ByteTokenizer

P, T = 7, 6
TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>"))
SHAPE = ModelConfig(vocab_size=272, layers=1, width=16, heads=2, feed_forward=32, compute="float32").complete()
JUDGE = ModelConfig(criteria=("overall", "short"), vocab_size=272, layers=1, width=16, heads=2, compute="float32")
PROMPTS, ANSWERS = (1, 3, 7, 5), (6, 1, 6, 4)


@pytest.fixture(scope="module")
def policy():
    definition = define_model(SHAPE)
    return definition, jax.jit(lambda: initialize(definition, 0))()


@pytest.fixture(scope="module")
def judge():
    definition = define_model(JUDGE.complete())
    return definition, jax.jit(lambda: initialize(definition, 1))()


def rollout(padding: int = 0, seed: int = 0) -> Rollout:
    """Four answers; `seed` fills what lies behind them and nothing else, `padding` widens the rows."""
    ids = np.random.default_rng(100 + seed).integers(0, 272, (4, P + T + padding))
    fixed = np.random.default_rng(7)
    for row, length in enumerate(np.add(PROMPTS, ANSWERS)):
        ids[row, :length] = fixed.integers(0, 259, length)
    return Rollout(
        ids=jnp.asarray(ids, jnp.int32),
        prompt_lengths=jnp.array(PROMPTS, jnp.int32),
        answer_lengths=jnp.array(ANSWERS, jnp.int32),
        ended=jnp.ones(4, bool),
        scores=jnp.zeros(4),
        sampler_logprobs=jnp.zeros((4, T)),
    )


tokens = jax.jit(forward.answer_tokens, static_argnums=(0, 3, 4, 5))
values = jax.jit(forward.answer_values, static_argnums=0)
rewards = jax.jit(forward.rewards, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def last_scores(definition, params, ids, length):
    """Of the first `length` tokens of one text, which is all that the model sees, at the last of them."""
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    seen = places < length
    hidden = apply(definition, params, lambda m: m(jnp.where(seen, ids, 0), seen.astype(jnp.int32), places)[0])
    return apply(definition, params, lambda m: m.scores(hidden))[0, length - 1]


@pytest.mark.parametrize(("temperature", "vocabulary"), [(1.0, None), (0.7, 259)])
def test_answer_tokens_are_those_of_the_full_logits(policy, temperature, vocabulary):
    definition, params = policy
    lm = LanguageModel(SHAPE, prepare(SHAPE, params), TOKENIZER)
    made = tokens(definition, params, rollout(), temperature, 0, vocabulary)
    full = np.asarray(lm.logits(rollout().ids, np.add(PROMPTS, ANSWERS)), np.float64)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = np.asarray(rollout().ids)[row, : prompt + answer]
        logits = full[row, : prompt + answer, :vocabulary] / temperature
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
        # A token is drawn in the state after the one in front of it.
        drawn = slice(prompt - 1, prompt + answer - 1)
        expected = logprobs[drawn][np.arange(answer), ids[prompt:]]
        np.testing.assert_allclose(made.logprobs[row, :answer], expected, atol=1e-5)
        entropy = -np.sum(np.exp(logprobs) * logprobs, axis=1)
        np.testing.assert_allclose(made.entropy[row, :answer], entropy[drawn], atol=1e-5)


def test_chunks_change_neither_numbers_nor_gradients(policy):
    definition, params = policy
    mask = rollout().answer_mask

    def weighed(params, chunk, entropies):
        made = forward.answer_tokens(definition, params, rollout(), 0.7, chunk, 259)
        weights = jnp.cos(jnp.arange(mask.size, dtype=jnp.float32)).reshape(mask.shape)
        return jnp.sum(jnp.where(mask, made.logprobs * weights + entropies * made.entropy, 0.0)), made

    gradient = jax.jit(jax.value_and_grad(weighed, has_aux=True), static_argnums=1)
    (_, whole), expected = gradient(params, 0, 0.0)
    # The entropy is measured only: with it in the loss, the gradient is the same.
    (_, pieces), got = gradient(params, 8, 1.0)
    np.testing.assert_allclose(pieces.logprobs[mask], whole.logprobs[mask], atol=1e-6)
    np.testing.assert_allclose(pieces.entropy[mask], whole.entropy[mask], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    # Tokens beyond the tokenizer take no part.
    head = np.asarray(got["head"])
    assert np.isfinite(head).all()
    assert (head[:, 259:] == 0).all()
    assert (head[:, :259] != 0).all()


def test_what_lies_behind_an_answer_changes_no_bit(policy, judge):
    definition, params = policy
    mask = np.asarray(rollout().answer_mask)
    one, other = rollout(seed=0), rollout(seed=1)
    assert (np.asarray(one.ids) != np.asarray(other.ids)).any()
    for a, b in zip(*(tokens(definition, params, r, 1.0, 0, 259) for r in (one, other)), strict=True):
        np.testing.assert_array_equal(a[mask], b[mask])
    definition, params = judge
    np.testing.assert_array_equal(*(rewards(definition, params, r) for r in (one, other)))


def test_more_padding_changes_rounding_only(policy, judge):
    mask = np.asarray(rollout().answer_mask)
    one, wide = rollout(), rollout(padding=19)
    definition, params = policy
    a, b = (tokens(definition, params, r, 1.0, 0, 259) for r in (one, wide))
    np.testing.assert_allclose(a.logprobs[mask], b.logprobs[mask], atol=1e-5)
    definition, params = judge
    np.testing.assert_allclose(*(rewards(definition, params, r) for r in (one, wide)), atol=1e-5)


def test_values_are_read_where_a_token_is_drawn_and_rewards_at_the_end(judge):
    definition, params = judge
    made, judged = values(definition, params, rollout()), rewards(definition, params, rollout())
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = rollout().ids[row : row + 1]
        for place in range(answer):
            state = last_scores(definition, params, ids, prompt + place)
            np.testing.assert_allclose(made[row, place], state[0], atol=1e-5)
        np.testing.assert_allclose(judged[row], last_scores(definition, params, ids, prompt + answer), atol=1e-5)


def test_rows_that_only_fill_a_batch_are_finite(policy, judge):
    empty = rollout()._replace(prompt_lengths=jnp.ones(4, jnp.int32), answer_lengths=jnp.zeros(4, jnp.int32))
    assert np.isfinite(tokens(*policy, empty, 1.0, 0, None).logprobs).all()
    assert np.isfinite(rewards(*judge, empty)).all()
    assert not empty.answer_mask.any()
