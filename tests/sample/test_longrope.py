"""LongRoPE where texts grow: what is drawn is what full forwards of the text so far say, as in transformers' generate,
which reads a text anew when it passes the trained positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model.config import ModelConfig, RopeScaling
from jaxlm.model.transformer import apply, define_model, empty_cache, for_inference
from jaxlm.model.weights import initialize
from jaxlm.sample import decoding
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.sampler import Sampler
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_end|>"))
TRAINED = 10
SCALING = RopeScaling(
    kind="longrope",
    factor=4.0,
    trained_positions=TRAINED,
    short_factors=(1.0, 1.1, 1.3, 1.6),
    long_factors=(2.0, 1.5, 9.0, 30.0),
)
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, layers=2, width=32, heads=4, kv_heads=1, rope_base=100.0, rope_scaling=SCALING,
    compute="float32",
).complete()  # fmt: skip
PARAMS = decoding.prepare(CONFIG, jax.jit(functools.partial(initialize, define_model(CONFIG), 3))())
MODEL = for_inference(CONFIG)[1]


@jax.jit
def logits(row, length):
    """Logits after the last of `length` tokens, of a full forward of these alone."""
    places = jnp.arange(32, dtype=jnp.int32)[None]
    inside = (places < length).astype(jnp.int32)
    return apply(MODEL, PARAMS, lambda m: m.logits(m(row[None], inside, places)[0]))[0, length - 1]


def last_logits(ids):
    return logits(np.array(ids + [0] * (32 - len(ids)), np.int32), len(ids))


def test_a_text_that_grows_past_the_trained_positions_is_read_anew():
    # One passes them while it grows, one at another step, one begins past them, one stays below.
    prompts = [[257, 72, 101], [257, *b"longe"], [257, *b"a prompt that is long"], [257]]
    completions = Sampler(CONFIG, TOKENIZER).generate(PARAMS, prompts, SamplingConfig(max_tokens=9, temperature=0.0))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = list(prompt)
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            after = last_logits(ids)
            assert token == int(jnp.argmax(after))
            np.testing.assert_allclose(logprob, jax.nn.log_softmax(after)[token], atol=1e-5)
            ids.append(token)
    lengths = sorted(len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True))
    assert lengths[0] <= TRAINED < lengths[1]


def test_the_factors_are_another_matter_past_the_trained_positions():
    """Else the test above would see nothing."""
    ids = np.arange(60, 60 + TRAINED + 1, dtype=np.int32)[None]
    places = np.arange(TRAINED + 1, dtype=np.int32)[None]
    run = jax.jit(lambda *x: apply(MODEL, PARAMS, lambda m: m.logits(m(*x)[0])))
    short, long = run(ids[:, :-1], np.ones_like(ids)[:, :-1], places[:, :-1]), run(ids, np.ones_like(ids), places)
    assert np.abs(short - long[:, :-1]).max() > 0.01


def test_a_cache_read_with_the_other_factors_gives_nothing_that_looks_right():
    ids = np.arange(60, 60 + TRAINED + 2, dtype=np.int32)[None]
    places = np.arange(TRAINED + 2, dtype=np.int32)[None]

    @jax.jit
    def run(cache, *part):
        return apply(MODEL, PARAMS, lambda m: m(*part, cache))

    part = lambda where: (ids[:, where], np.ones_like(ids[:, where]), places[:, where])
    for first, fine in ((TRAINED, False), (TRAINED + 1, True)):
        _, cache = run(empty_cache(CONFIG, 1, 16), *part(slice(0, first)))
        hidden, _ = run(cache, *part(slice(first, TRAINED + 2)))
        assert np.isfinite(hidden).all() == fine
