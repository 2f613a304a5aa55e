"""`jaxlm.load`: scores against sums by hand, rewards against whole forwards, generation, and what it refuses."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.hub.find import find_model
from jaxlm.hub.forward import last_scores
from jaxlm.hub.language_model import LanguageModel, load, scoring_windows
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import apply, initialize
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import model_directory

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>"))
CONFIG = ModelConfig(vocab_size=259, layers=2, width=16, heads=2, compute="float32").complete()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model in its pretrain stage, trained on rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("run")
    tokenizers.save(TOKENIZER, folder / "tokenizer")
    params = jax.jit(functools.partial(initialize, define_model(CONFIG), 0))()
    written = functools.partial(model_directory.write, inputs={}, config={}, facts={"row_length": 32})
    written(folder / "pretrain" / "model", params, CONFIG, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def lm(run):
    return load(run)


def test_paths_that_lead_to_the_model(run, lm):
    model = run / "pretrain" / "model"
    assert [str(find_model(path)) for path in (run, run / "pretrain", model)] == [str(model)] * 3
    assert lm.context_tokens == 32
    assert lm.config.vocab_size == lm.tokenizer.vocab_size == 259


def test_paths_without_a_model_are_refused_with_what_is_there(run, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no finished model; found tokenizer"):
        (tmp_path / "tokenizer").mkdir()
        load(tmp_path)
    with pytest.raises(UserError, match=r"without manifest.json is not finished"):
        (tmp_path / "params").mkdir()
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with pytest.raises(UserError, match=r"model_type 'mamba' is not understood"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"is a Hugging Face directory; .* python -m jaxlm import --source="):
        find_model(tmp_path)


def by_hand(lm, ids):
    """log p of each token after the first, from the logits of the whole text."""
    logprobs = jax.nn.log_softmax(lm.logits([ids])[0], axis=-1)
    return [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]


def test_score_is_the_sum_over_tokens(lm):
    texts = ["Grüße", "a", "", "twenty-eight bytes and a dot."]
    scores = lm.score(texts)
    for text, score in zip(texts, scores, strict=True):
        expected = sum(by_hand(lm, [257, *text.encode()]))
        np.testing.assert_allclose(score.logprob, expected, rtol=1e-5)
        assert score.tokens == len(text.encode())
        if text:
            np.testing.assert_allclose(score.bits_per_byte, -expected / math.log(2) / score.tokens, rtol=1e-5)
    assert math.isnan(scores[2].bits_per_byte)


def test_long_texts_are_scored_in_windows_each_token_once(lm):
    text = "0123456789" * 5
    ids = [257, *text.encode()]
    expected, seen = 0.0, []
    for begin, end, first in scoring_windows(len(ids), 16):
        expected += sum(by_hand(lm, ids[begin:end])[first - begin - 1 :])
        seen += range(first, end)
        assert end - begin <= 16
        assert begin == 0 or first - begin >= 8
    assert seen == list(range(1, len(ids)))
    (score,) = lm.score([text], context_tokens=16)
    np.testing.assert_allclose(score.logprob, expected, rtol=1e-5)
    assert abs(score.logprob - lm.score([text], context_tokens=64)[0].logprob) > 1e-4
    assert list(scoring_windows(5, 2)) == [(0, 2, 1), (1, 3, 2), (2, 4, 3), (3, 5, 4)]


def test_logits_of_padded_rows(lm):
    ids = np.array([[257, 65, 66, 67], [257, 70, 1, 2]])
    logits = lm.logits(ids, lengths=[4, 2])
    assert logits.shape == (2, 4, 259)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[1, :2], lm.logits([[257, 70]])[0], atol=1e-5)
    changed = ids.copy()
    changed[1, 2:] = 99
    np.testing.assert_array_equal(lm.logits(changed, lengths=[4, 2])[1, :2], logits[1, :2])


def test_generate_takes_texts_and_ids(lm):
    a = lm.generate(["ab", "x"], max_tokens=5, temperature=0.8, seed=1)
    b = lm.generate([[257, 97, 98], [257, 120]], max_tokens=5, temperature=0.8, seed=1)
    assert a == b
    assert "".join(lm.stream("ab", max_tokens=5, temperature=0.8, seed=1)) == a[0].text
    assert len(lm.generate(["ab"], max_tokens=2, samples=2)) == 2


def test_on_a_mesh_it_says_and_scores_the_same(run, lm):
    spread = load(run, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
    assert spread.params["layers"]["0"]["mlp"]["up"].sharding.num_devices == 8
    np.testing.assert_allclose(spread.score(["some text"])[0].logprob, lm.score(["some text"])[0].logprob, rtol=1e-5)
    a, b = (m.generate(["ab"], max_tokens=5, seed=1)[0] for m in (spread, lm))
    assert a.ids == b.ids


def test_wrong_arguments_are_refused_by_name(lm):
    with pytest.raises(UserError, match=r"generate.temprature: no such field; did you mean 'temperature'"):
        lm.generate(["a"], temprature=0.5)
    with pytest.raises(UserError, match="(?s)generate.*stop"):
        lm.generate(["a"], max_tokens=4, stop="x")
    with pytest.raises(UserError, match="prompts: got a single one"):
        lm.generate("a")
    message = {"role": "user", "content": "hi"}
    with pytest.raises(UserError, match=r"prompts\[0\]: is a conversation, but the model has no chat template"):
        lm.generate([[message]])
    with pytest.raises(UserError, match="prompts: got a single one"):
        lm.generate([message])
    with pytest.raises(UserError, match=r"prompts\[1\]: is one message"):
        lm.generate(["a", message])
    with pytest.raises(UserError, match="exceed the context of 32"):
        lm.generate(["a"], max_tokens=31)
    with pytest.raises(UserError, match="not all in the vocabulary of 259"):
        lm.logits([[259]])
    with pytest.raises(UserError, match="whole numbers"):
        lm.logits([1, 2])
    with pytest.raises(UserError, match="lengths"):
        lm.logits([[1, 2]], lengths=[3])


CHAT_TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
REWARD_CONFIG = dataclasses.replace(CONFIG, vocab_size=CHAT_TOKENIZER.vocab_size, criteria=("overall", "truthful"))
REWARD_PARAMS = jax.jit(functools.partial(initialize, define_model(REWARD_CONFIG), 1))() | {
    "score_bias": jnp.array([0.5, -2.0])
}


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


# More than one batch of them, of several sizes, out of order.
CONVERSATIONS = [conversation("why?", "x" * (7 * n % 60)) for n in range(18)] + [conversation("a", "b", "c", "d")]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizers.save(CHAT_TOKENIZER, folder.parent)
    written = functools.partial(model_directory.write, inputs={}, config={}, facts={"row_length": 128})
    template = chat.load("chatml", CHAT_TOKENIZER)
    written(folder, REWARD_PARAMS, REWARD_CONFIG, folder.parent, chat_template=template)
    return folder


@pytest.fixture(scope="module")
def rm(reward_folder):
    return load(reward_folder)


def ids_of(messages):
    """The conversation up to the answer's <|im_end|>, without the newline that the template puts behind it."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    special = CHAT_TOKENIZER.special_ids
    ids, rest = [special["<s>"]], text[:-1]
    while rest:
        name = next((name for name in special if rest.startswith(name)), rest[0])
        ids += [special[name]] if name in special else list(name.encode())
        rest = rest[len(name) :]
    return ids


@jax.jit
def all_scores(ids):
    """[1, S, C] by the model as it is trained, without padding."""
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    forward = lambda m: m.scores(m(ids, jnp.ones_like(ids), positions)[0])
    return apply(define_model(REWARD_CONFIG), REWARD_PARAMS, forward)


def test_rewards_are_the_scores_at_the_answers_stop_tokens(rm):
    rewards = rm.rewards(CONVERSATIONS)
    assert (rewards.shape, rewards.dtype) == ((19, 2), np.float32)
    for index in (0, 1, 9, 17, 18):
        ids = ids_of(CONVERSATIONS[index])
        assert ids[-1] == CHAT_TOKENIZER.special_ids["<|im_end|>"]
        expected = all_scores(np.array([ids], np.int32))[0, -1]
        np.testing.assert_allclose(rewards[index], expected, atol=1e-5)
    np.testing.assert_array_equal(rm.reward(CONVERSATIONS), rewards[:, 0])
    np.testing.assert_array_equal(rm.reward(CONVERSATIONS, criterion="truthful"), rewards[:, 1])
    assert rm.reward(CONVERSATIONS).dtype == np.float32
    assert rm.rewards([]).shape == (0, 2)


def test_rewards_know_nothing_of_company_and_padding(rm):
    alone = np.concatenate([rm.rewards([each]) for each in CONVERSATIONS[:5]])
    np.testing.assert_allclose(alone, rm.rewards(CONVERSATIONS)[:5], atol=1e-5)

    def padded(length, fill):
        row = ids_of(CONVERSATIONS[1])
        places = np.arange(length, dtype=np.int32)[None]
        ids = np.full((1, length), fill, np.int32)
        ids[0, : len(row)] = row
        return np.asarray(last_scores(rm.definition, rm.params, ids, (places < len(row)).astype(np.int32), places))

    assert len(ids_of(CONVERSATIONS[1])) < 64
    np.testing.assert_array_equal(padded(64, 0), padded(64, 99))
    np.testing.assert_array_equal(padded(64, 0), padded(64, CHAT_TOKENIZER.special_ids["<|im_end|>"]))
    np.testing.assert_allclose(padded(64, 0), padded(256, 7), atol=1e-5)


def test_rewards_are_the_same_on_a_mesh(reward_folder, rm):
    spread = load(reward_folder, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
    np.testing.assert_allclose(spread.rewards(CONVERSATIONS), rm.rewards(CONVERSATIONS), atol=1e-5)


def test_a_reward_model_gives_rewards_only_and_says_so(rm, lm):
    question = conversation("why?")
    for method, call in {
        "logits": lambda: rm.logits([[1]]),
        "generate": lambda: rm.generate(["a"]),
        "stream": lambda: next(rm.stream("a")),
        "chat": lambda: rm.chat(question),
        "score": lambda: rm.score(["a"]),
    }.items():
        with pytest.raises(UserError, match=rf"^{method}: the model is a reward model.*`reward` or `rewards`"):
            call()
    for method in (lm.reward, lm.rewards):
        with pytest.raises(
            UserError, match="is a language model and has no rewards; load a reward model, or .*`score`"
        ):
            method([conversation("why?", "so.")])


def test_what_no_reward_can_be_given_for_is_refused(rm):
    answered = conversation("why?", "so.")
    with pytest.raises(UserError, match="conversations: got a single one"):
        rm.reward(answered)
    with pytest.raises(UserError, match=r"conversations\[1\]: got 'x'; a list of messages"):
        rm.reward([answered, "x"])
    with pytest.raises(UserError, match=r"conversations\[1\]: ends with a message of 'user'"):
        rm.reward([answered, conversation("a", "b", "c")])
    with pytest.raises(UserError, match=r"conversations\[0\]: messages\[0\].content"):
        rm.reward([[{"role": "user"}]])
    with pytest.raises(UserError, match=r"conversations\[0\]: messages: got \[\]"):
        rm.reward([[]])
    with pytest.raises(UserError, match=r"conversations\[0\]: has 1\d\d tokens, the context is 128"):
        rm.reward([conversation("why?", "x" * 120)])
    with pytest.raises(UserError, match="criterion: the model has no 'truthfull'; did you mean 'truthful'"):
        rm.reward([answered], criterion="truthfull")


def test_the_default_criterion_is_overall_or_the_only_one(monkeypatch):
    def default(*criteria):
        config = dataclasses.replace(REWARD_CONFIG, criteria=criteria)
        model = LanguageModel(config, {}, CHAT_TOKENIZER)
        monkeypatch.setattr(model, "rewards", lambda conversations: np.array([criteria]))
        return model.reward([conversation("why?", "so.")]).item()

    assert default("helpful") == "helpful"
    assert default("helpful", "overall") == "overall"
    with pytest.raises(UserError, match="criterion: the model has no 'overall'; give one of helpful, harmless"):
        default("helpful", "harmless")


def test_the_room_of_an_answer(lm):
    assert lm.room([1] * 20) == 12
    assert lm.room([1] * 20, 5) == 5
    assert lm.room([1] * 20, context_tokens=64) == 44
    with pytest.raises(UserError, match="the prompt has 32 tokens, and the context of 32 has no room"):
        lm.room([1] * 32)


def test_importing_jaxlm_imports_no_jax():
    code = "import sys, jaxlm; assert 'jax' not in sys.modules; print(jaxlm.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
