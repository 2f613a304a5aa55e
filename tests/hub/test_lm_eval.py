"""The adapter to lm_eval against log-probabilities by hand; lm_eval's base class is stood in for where it is absent."""

import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.base.errors import UserError
from jaxlm.hub import lm_eval as adapters
from jaxlm.hub.language_model import LanguageModel
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.sample.decoding import prepare
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
CONFIG = ModelConfig(vocab_size=261, layers=1, width=16, heads=2, compute="float32").complete()


class Base:
    """What of lm_eval.api.model.LM the adapter meets."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture(scope="module")
def model():
    adapters.adapter.cache_clear()
    absent = importlib.util.find_spec("lm_eval") is None
    if absent:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
        sys.modules |= {name: types.ModuleType(name) for name in names}
        sys.modules["lm_eval.api.model"].LM = Base
    params = prepare(CONFIG, jax.jit(lambda: initialize(define_model(CONFIG), 0))())
    template = chat.load("chatml", TOKENIZER)
    lm = LanguageModel(CONFIG, params, TOKENIZER, chat_template=template, context_tokens=64)
    yield adapters.adapter()(lm=lm, batch_size=1, device=None)
    if absent:
        for name in names:
            del sys.modules[name]
    adapters.adapter.cache_clear()


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def by_hand(model, ids, scored):
    """(log p of the last tokens, whether each is the most likely) from the logits of the whole."""
    logits = np.asarray(model.lm.logits([ids]))[0, :-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(ids) - 1), ids[1:]]
    return picked[-scored:].sum(), bool((logprobs.argmax(-1) == ids[1:])[-scored:].all())


def test_the_likelihood_of_continuations(model):
    pairs = [("The sky is", " blue"), ("", "blue"), ("x" * 100, " y")]
    encode, bos = TOKENIZER.encode, TOKENIZER.bos_id
    rows = [([bos, *encode("The sky is blue")], 5), ([bos, *encode("blue")], 4), (encode("x" * 62 + " y"), 2)]
    found = model.loglikelihood(asked(*pairs))
    for (logprob, greedy), (ids, scored) in zip(found, rows, strict=True):
        expected = by_hand(model, ids, scored)
        assert logprob == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_the_greedy_continuation_is_known_as_such(model):
    said = model.generate_until(asked(("The", {"until": [], "max_gen_toks": 1})))[0]
    follows = [text for text in map(chr, range(32, 127)) if model.loglikelihood(asked(("The", text)))[0][1]]
    assert follows in ([said], [])  # [] where the byte is none of ASCII's


def test_whole_texts(model):
    """In windows of 64 tokens whose first one is context; the last window is full too."""
    encode, bos = TOKENIZER.encode, TOKENIZER.bos_id
    long = [bos, *encode("longer " * 20)]  # 141: 63 + 63 + 14 are scored
    found = model.loglikelihood_rolling(asked(("A text.",), ("longer " * 20,), ("",)))
    short = by_hand(model, [bos, *encode("A text.")], 7)[0]
    windows = ((long[:64], 63), (long[63:127], 63), (long[77:141], 14))
    assert found == pytest.approx([short, sum(by_hand(model, *window)[0] for window in windows), 0.0], abs=1e-4)
    assert short == pytest.approx(model.lm.score(["A text."])[0].logprob)


def test_generation_stops_where_it_is_told(model):
    prompts = asked(("A", {"until": ["e"], "max_gen_toks": 12}), ("B", {"until": "\n", "max_gen_toks": 3}))
    said = model.generate_until(prompts)
    assert said[0] == model.lm.generate(["A"], max_tokens=12, temperature=0.0, stop=("e",))[0].text
    assert said[1] == model.lm.generate(["B"], max_tokens=3, temperature=0.0, stop=("\n",))[0].text
    drawn = adapters.sampling_of({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 99}, 64)
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.5, 0.9, 63)
    assert adapters.sampling_of({"temperature": 0.7, "do_sample": False}, 64).temperature == 0
    for wrong, problem in (({"num_beams": 4}, "num_beams is 4"), ({"top_x": 1}, "top_x: not known")):
        with pytest.raises(UserError, match=problem):
            adapters.sampling_of(wrong, 64)


def test_conversations_go_through_the_models_own_template(model):
    messages = [{"role": "user", "content": "Say <|im_end|>"}]
    context = model.apply_chat_template(messages)
    ids = model.lm.chat_template.prompt(messages)
    found = model.loglikelihood(asked((context, "yes")))[0]
    assert found[0] == pytest.approx(by_hand(model, [*ids, *TOKENIZER.encode("yes")], 3)[0], abs=1e-4)
    prefilled = model.apply_chat_template([*messages, {"role": "assistant", "content": "ye"}], False)
    found = model.loglikelihood(asked((prefilled, "s")))[0]
    assert found[0] == pytest.approx(by_hand(model, [*ids, *TOKENIZER.encode("yes")], 1)[0], abs=1e-4)
    assert model.chat_template(True) == model.lm.chat_template.source
    assert model.tokenizer_name.startswith("jaxlm-")
    assert json.loads(json.dumps(context)) == context


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(UserError, match="a continuation of 99 tokens exceeds the context of 64"):
        model.loglikelihood(asked(("a", "b" * 99)))
    with pytest.raises(UserError, match="model_args: path is missing"):
        type(model)()
    with pytest.raises(UserError, match="model_args: pretrained: not known"):
        type(model)(pretrained="x")


def test_without_lm_eval_the_mend_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # importing it fails
    adapters.adapter.cache_clear()
    with pytest.raises(UserError, match=r"lm_eval is not installed: pip install -e '.\[lm-eval\]'"):
        adapters.adapter()
