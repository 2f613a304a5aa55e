"""Bits per byte against numbers by hand, and their uncertainty against repeated draws."""

import functools
import lzma
import math

import jax
import pytest

from jaxlm.evaluate.likelihood import figures, measure, pack_texts, xz_bits_per_byte
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model, for_inference
from jaxlm.model.weights import initialize
from jaxlm.sample import scoring
from jaxlm.sample.decoding import prepare
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>"))
V = TOKENIZER.vocab_size
CONFIG = ModelConfig(vocab_size=V, layers=2, width=16, heads=2, compute="float32").complete()
PARAMS = prepare(CONFIG, jax.jit(functools.partial(initialize, define_model(CONFIG), 0))())
TEXTS = ["Grüße!", "a", "a text that is longer than one row of sixteen tokens", "日本語"]


def sums_of(params, texts, row_length, batch_rows=4):
    return measure(
        for_inference(CONFIG)[1],
        params,
        pack_texts(texts, TOKENIZER, row_length),
        row_length=row_length,
        bytes_of=TOKENIZER.token_bytes(),
        batch_rows=batch_rows,
    )


def test_a_model_that_knows_nothing_needs_log_v_bits_a_token():
    nothing = jax.tree.map(lambda x: 0 * x, PARAMS)
    sums = sums_of(nothing, TEXTS, 16)
    sizes = [len(text.encode()) for text in TEXTS]
    assert [sums[d].bytes for d in range(4)] == sizes == [8, 1, 52, 9]
    assert [sums[d].tokens for d in range(4)] == [size + 1 for size in sizes]  # and the end-of-text token
    found = figures(sums)
    assert (found["documents"], found["tokens"], found["bytes"]) == (4, 74, 70)
    assert found["loss"]["value"] == pytest.approx(math.log(V), rel=1e-6)
    assert found["bits_per_byte"]["value"] == pytest.approx(math.log2(V) * 74 / 70, rel=1e-6)
    assert found["loss"]["interval"] == pytest.approx([math.log(V)] * 2, abs=1e-4)


def test_packed_documents_score_as_they_do_alone():
    together = sums_of(PARAMS, TEXTS, 64)
    for number, text in enumerate(TEXTS):
        (alone,) = sums_of(PARAMS, [text], 64).values()
        assert together[number].nats == pytest.approx(alone.nats, rel=1e-5)
        assert (together[number].tokens, together[number].correct) == (alone.tokens, alone.correct)


def test_batches_and_chunks_change_nothing(monkeypatch):
    whole = sums_of(PARAMS, TEXTS, 16)
    few = sums_of(PARAMS, TEXTS, 16, batch_rows=3)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 4 * 5)
    jax.clear_caches()
    chunked = sums_of(PARAMS, TEXTS, 16)
    for sums in few, chunked:
        assert {d: s.nats for d, s in sums.items()} == pytest.approx({d: s.nats for d, s in whole.items()}, rel=1e-5)
        assert {d: s.correct for d, s in sums.items()} == {d: s.correct for d, s in whole.items()}


def test_xz_packs_the_documents_as_one():
    texts = [str(number) * 50 for number in range(100)]
    content = "".join(texts).encode()
    expected = 8 * len(lzma.compress(content, preset=9)) / len(content)
    assert xz_bits_per_byte(texts) == pytest.approx(expected, rel=0.01)
