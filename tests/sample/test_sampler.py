"""Completions against full forward passes, and what must not change them: batch, padding, layout, devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, JaxlmError, UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import apply, define_model, for_inference
from jaxlm.model.weights import initialize
from jaxlm.sample import decoding
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.distribution import process, settings_of
from jaxlm.sample.sampler import Sampler, bucket, settled
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_end|>"))
V = TOKENIZER.vocab_size
CONFIG = ModelConfig(
    vocab_size=V, layers=2, width=32, heads=4, kv_heads=2, qk_norm=True, pattern=("local", "global"), window=5,
    compute="float32",
).complete()  # fmt: skip
PROMPTS = [[257, 72, 101], [257, *b"a longer prompt of many bytes"], [257], [257, 120, 121, 122]]
TRAINED = jax.jit(functools.partial(initialize, define_model(CONFIG), 3))()
PARAMS = decoding.prepare(CONFIG, TRAINED)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(CONFIG, TOKENIZER)


def full_logits(ids):
    """Logits after each token of one text, by a forward pass without a cache over 64 places."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids)] = ids
    return _full_logits(row)[0, : len(ids)]


@jax.jit
def _full_logits(row):
    places = jnp.arange(64, dtype=jnp.int32)[None]
    forward = lambda m: m.logits(m(row, jnp.ones_like(row), places)[0])
    return apply(for_inference(CONFIG)[1], PARAMS, forward)


def test_greedy_is_argmax_of_full_forwards(sampler):
    completions = sampler.generate(PARAMS, PROMPTS, SamplingConfig(max_tokens=9, temperature=0.0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(prompt)
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            logits = full_logits(ids)[-1]
            assert token == int(jnp.argmax(logits))
            np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[token], atol=1e-5)
            ids.append(token)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.5, "min_p": 0.02}], ids=str
)
def test_logprobs_are_those_of_the_processed_full_forward(sampler, fields):
    sampling = SamplingConfig(max_tokens=8, seed=1, **fields)
    for prompt, completion in zip(PROMPTS, sampler.generate(PARAMS, PROMPTS, sampling), strict=True):
        ids = [*prompt, *completion.ids]
        seen = np.array([[token in ids[:end] for token in range(V)] for end in range(len(prompt), len(ids))])
        kept = process(full_logits(ids)[len(prompt) - 1 : -1], jnp.asarray(seen), settings_of(sampling))
        expected = jax.nn.log_softmax(kept, axis=-1)[np.arange(len(completion.ids)), np.array(completion.ids)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)
        assert np.isfinite(completion.logprobs).all()


def test_company_padding_and_order_change_nothing(sampler):
    sampling = SamplingConfig(max_tokens=12, seed=7)
    together = sampler.generate(PARAMS, PROMPTS, sampling, prompt_ids=[10, 11, 12, 13])
    for index, prompt in enumerate(PROMPTS):
        (alone,) = sampler.generate(PARAMS, [prompt], sampling, prompt_ids=[10 + index])
        assert alone.ids == together[index].ids
        np.testing.assert_allclose(alone.logprobs, together[index].logprobs, atol=1e-5)
    backwards = sampler.generate(PARAMS, PROMPTS[::-1], sampling, prompt_ids=[13, 12, 11, 10])
    assert [c.ids for c in backwards[::-1]] == [c.ids for c in together]
    few_at_a_time = dataclasses.replace(sampling, batch_rows=1, max_tokens=20)
    longer = sampler.generate(PARAMS, PROMPTS, few_at_a_time, prompt_ids=[10, 11, 12, 13])
    assert [c.ids[:12] for c in longer] == [c.ids for c in together]


def test_samples_differ_and_depend_on_their_number_only(sampler):
    sampling = SamplingConfig(max_tokens=6, seed=2, samples=4)
    four = sampler.generate(PARAMS, PROMPTS[1:2], sampling)
    assert len(four) == 4
    one = dataclasses.replace(sampling, samples=1)
    assert sampler.generate(PARAMS, PROMPTS[1:2], one)[0].ids == four[0].ids
    others = [
        sampler.generate(PARAMS, PROMPTS[1:2], dataclasses.replace(one, seed=3)),
        sampler.generate(PARAMS, PROMPTS[1:2], one, step=1),
        sampler.generate(PARAMS, PROMPTS[1:2], one, prompt_ids=[1]),
    ]
    assert len({c.ids for group in [four, *others] for c in group}) == 7
    prompt_by_prompt = sampler.generate(PARAMS, PROMPTS[:2], dataclasses.replace(sampling, samples=2))
    (first,) = sampler.generate(PARAMS, PROMPTS[1:2], one, prompt_ids=[1])
    assert prompt_by_prompt[2].ids == first.ids


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_many_devices_draw_what_one_draws(sampler, mesh):
    sampling = SamplingConfig(max_tokens=8, seed=4)
    expected = sampler.generate(PARAMS, PROMPTS, sampling)
    made = make_mesh(MeshConfig(**mesh))
    definition = define_model(CONFIG)
    params = jax.device_put(TRAINED, definition.shardings(made))
    with jax.set_mesh(made):
        got = sampler.generate(decoding.prepare(CONFIG, params), PROMPTS, sampling)
    for a, b in zip(got, expected, strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_one_program_for_a_bucket(sampler):
    decoding.start.clear_cache()
    decoding.advance.clear_cache()
    for prompt, tokens, temperature in ([257] * 3, 5, 0.5), ([257] * 16, 32, 0.7), ([1, 2], 17, 1.0):
        options = SamplingConfig(max_tokens=tokens, temperature=temperature, stop=("never",) if tokens == 17 else ())
        sampler.generate(PARAMS, [prompt], options)
    assert decoding.start._cache_size() == 1
    assert decoding.advance._cache_size() == 1
    assert [bucket(n, 16) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def test_settled_text_is_what_no_token_can_change():
    assert settled("abc", ()) == 3
    assert settled("ab\ufffd", ()) == 2
    assert settled("ab\nUs", ("\nUser:",)) == 2
    assert settled("ab\nUs", ("\nUser:", "b\nUsa")) == 1
    assert settled("ab\nUs\ufffd", ("\nUsé",)) == 2
    assert settled("User", ("\nUser:",)) == 4


def test_wrong_prompts_and_options_are_refused_by_name(sampler):
    sampling = SamplingConfig(max_tokens=8)
    with pytest.raises(UserError, match=r"prompts\[1\]: is empty"):
        sampler.generate(PARAMS, [[1], []], sampling)
    with pytest.raises(UserError, match=rf"prompts\[0\]: token {V} is outside"):
        sampler.generate(PARAMS, [[V]], sampling)
    with pytest.raises(UserError, match="5 tokens and max_tokens 8 exceed the context of 12"):
        Sampler(CONFIG, TOKENIZER, context_tokens=12).generate(PARAMS, [[1] * 5], sampling)
    with pytest.raises(UserError, match=r"stop_tokens: '<im_end>' is neither.*did you mean '<\|im_end\|>'"):
        sampler.generate(PARAMS, [[1]], SamplingConfig(stop_tokens=("<im_end>",)))
    with pytest.raises(ConfigError, match="top_p: got 0"):
        SamplingConfig(top_p=0.0)
    with pytest.raises(UserError, match="the tokenizer has 260 tokens, the model 200"):
        Sampler(dataclasses.replace(CONFIG, vocab_size=200), TOKENIZER)
    assert sampler.generate(PARAMS, [], sampling) == []


def test_logits_that_are_not_finite_are_an_error(sampler):
    broken = PARAMS | {"head": PARAMS["head"] * jnp.nan}
    with pytest.raises(JaxlmError, match="not finite"):
        sampler.generate(broken, [[1]], SamplingConfig(max_tokens=2))
