"""The distribution against plain numpy, and the draw against the distribution."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.distribution import draw, process, settings_of

V = 300


def logits(rows=4, size=V, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, size)) * 3).astype(np.float32)


def by_sorting(row, seen, config):
    """The probabilities of one row, in float64, by sorting, token by token."""
    row = row.astype(np.float64)
    for token in np.flatnonzero(seen):
        row[token] *= config.repetition_penalty if row[token] < 0 else 1 / config.repetition_penalty
    row = row / config.temperature
    order = list(np.argsort(-row))
    if config.top_k:
        order = order[: config.top_k]
    weights = {token: np.exp(row[token] - row[order[0]]) for token in order}
    total, kept, mass = sum(weights.values()), [], 0.0
    for token in order:
        if mass < config.top_p:
            kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= config.min_p * weights[order[0]]]
    probabilities = np.zeros(len(row))
    for token in kept:
        probabilities[token] = weights[token] / sum(weights[t] for t in kept)
    return probabilities


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.01},
        {"top_p": 0.7},
        {"top_p": 0.99, "temperature": 1.7},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_process_keeps_what_sorting_keeps(fields):
    config = SamplingConfig(**fields)
    given = logits()
    seen = np.random.default_rng(1).random(given.shape) < 0.3
    kept = np.asarray(process(jnp.array(given), jnp.array(seen), settings_of(config)))
    expected = np.stack([by_sorting(row, s, config) for row, s in zip(given, seen, strict=True)])
    np.testing.assert_array_equal(np.isfinite(kept), expected > 0)
    weights = np.exp(kept - kept.max(-1, keepdims=True))
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), expected, rtol=2e-5, atol=1e-9)


def test_ties_at_the_cut_are_all_kept():
    kept = process(jnp.array([[2.0, 1.0, 3.0, 2.0, -1.0]]), None, settings_of(SamplingConfig(top_k=2)))
    assert np.isfinite(np.asarray(kept))[0].tolist() == [True, False, True, True, False]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    given = jnp.array([[0.0, 1.0, 9.0]])
    for temperature in (0.0, 1.0):
        settings = settings_of(SamplingConfig(temperature=temperature), vocabulary=2)
        ids, _ = draw(process(given, None, settings), jnp.array([0.999999]), settings)
        assert int(ids[0]) == 1


@pytest.mark.parametrize("fields", [{}, {"top_k": 20, "temperature": 0.7}, {"top_p": 0.9}])
def test_frequencies_are_the_probabilities(fields):
    """Chi-square of 100,000 draws with fixed random numbers, tokens expected under 5 times taken together."""
    config, count = SamplingConfig(**fields), 100_000
    settings = settings_of(config)
    row = logits(1, 60)
    uniform = np.random.default_rng(5).random(count, np.float32)
    kept = process(jnp.array(row), None, settings)
    ids, _ = draw(jnp.broadcast_to(kept, (count, 60)), jnp.array(uniform), settings)
    expected = by_sorting(row[0], np.zeros(60, bool), config) * count
    seen = np.bincount(np.asarray(ids), minlength=60)
    assert (seen[expected == 0] == 0).all()
    rare = (expected < 5) & (expected > 0)
    merge = lambda x: [*x[expected >= 5], *([x[rare].sum()] if rare.any() else [])]
    assert stats.chisquare(merge(seen), merge(expected)).pvalue > 0.01


def test_draw_inverts_the_cumulative_distribution():
    """Also across blocks of the vocabulary, at both ends, and never a token that was cut off."""
    settings = settings_of(SamplingConfig())
    given = logits(1, 1000)
    given[0, ::3] = -np.inf
    probabilities = np.exp(given[0].astype(np.float64))
    ends = np.cumsum(probabilities / probabilities.sum())
    uniform = np.array([0.0, 1e-7, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, np.nextafter(np.float32(1), 0)], np.float32)
    ids, logprobs = draw(jnp.broadcast_to(jnp.array(given), (len(uniform), 1000)), jnp.array(uniform), settings)
    ids = np.asarray(ids)
    np.testing.assert_array_equal(ids[1:-1], np.searchsorted(ends, uniform[1:-1], side="right"))
    assert ids[0] == 1
    assert ids[-1] in (997, 998)
    np.testing.assert_allclose(logprobs, np.log(probabilities[ids] / probabilities.sum()), atol=1e-5)


def test_greedy_takes_the_first_of_the_most_likely_and_reports_the_models_logprobs():
    settings = settings_of(SamplingConfig(temperature=0.0, top_p=0.1))
    ids, logprobs = draw(
        process(jnp.array([[0.0, 2.0, 2.0, 1.0]]), None, settings), jnp.array([0.9], jnp.float32), settings
    )
    assert int(ids[0]) == 1
    np.testing.assert_allclose(logprobs[0], 2 - np.log(1 + 2 * np.e**2 + np.e), atol=1e-6)
