"""Where a completion ends: a model that says one text, whatever it is given."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.sample import decoding
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.sampler import Sampler
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_end|>"))
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=8, heads=1, compute="float32").complete()
SCRIPT = [*"Grüße\nUser: hi".encode(), TOKENIZER.eos_id, 65]


@pytest.fixture(scope="module")
def model():
    """A sampler and parameters whose next token is SCRIPT[t], almost surely."""
    draw = decoding._draw

    def scripted(state, logits, stops, settings):
        wanted = jnp.array(SCRIPT, jnp.int32)[jnp.minimum(state.drawn, len(SCRIPT) - 1)]
        return draw(state, jnp.where(jnp.arange(logits.shape[1])[None] == wanted, 30.0, 0 * logits), stops, settings)

    params = jax.jit(functools.partial(initialize, define_model(CONFIG), 0))()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_draw", scripted)
        jax.clear_caches()
        yield Sampler(CONFIG, TOKENIZER), decoding.prepare(CONFIG, params)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("fields", "text", "count", "reason"),
    [
        ({}, "Grüße\nUser: hi", 17, "eos"),
        ({"max_tokens": 16}, "Grüße\nUser: hi", 16, "length"),
        ({"max_tokens": 1}, "G", 1, "length"),
        ({"max_tokens": 3}, "Gr\ufffd", 3, "length"),
        ({"stop_at_eos": False, "max_tokens": 18}, "Grüße\nUser: hiA", 18, "length"),
        ({"stop": ("\nUser:",)}, "Grüße", 13, "stop_string"),
        ({"stop": ("hi", "e\nU")}, "Grüß", 9, "stop_string"),
        ({"stop": ("never",)}, "Grüße\nUser: hi", 17, "eos"),
        ({"stop_tokens": ("10",)}, "Grüße", 8, "stop_token"),
        ({"stop_tokens": ("10",), "stop": ("üß",)}, "Gr", 6, "stop_string"),
        ({"stop_tokens": ("</s>",), "stop_at_eos": False}, "Grüße\nUser: hi", 17, "stop_token"),
    ],
)
def test_where_a_completion_ends(model, fields, text, count, reason):
    sampler, params = model
    sampling = SamplingConfig(**{"max_tokens": 32, "temperature": 0.0, **fields})
    (completion,) = sampler.generate(params, [[257]], sampling)
    assert (completion.text, completion.stop_reason) == (text, reason)
    assert completion.ids == tuple(SCRIPT[:count])
    assert len(completion.logprobs) == count
    assert all(-1e-9 < logprob <= 0 for logprob in completion.logprobs)
    pieces = list(sampler.stream(params, [257], sampling))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_a_stream_gives_pieces_as_they_are_drawn(model):
    sampler, params = model
    pieces = list(sampler.stream(params, [257], SamplingConfig(max_tokens=32, temperature=0.0, stop=("\nUser: he",))))
    # A look every 4 tokens; what may become the stop string is held back until it cannot.
    assert pieces == ["Grü", "ße", "\nUser: hi"]


def test_the_loop_ends_when_all_rows_have_stopped(model, monkeypatch):
    sampler, params = model
    states = []
    advance = decoding.advance
    monkeypatch.setattr(decoding, "advance", lambda *args: states.append(advance(*args)) or states[-1])
    sampler.generate(params, [[257]], SamplingConfig(max_tokens=32, temperature=0.0))
    assert [int(state.drawn) for state in states] == [17]
