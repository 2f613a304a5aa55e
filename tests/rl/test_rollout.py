"""Rollouts: how answers lie in the arrays, how they are drawn and scored, and which of them are kept for people."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.sharding import make_mesh
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.rl import forward
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import GRPOConfig, RLConfig
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rewards import Judge
from jaxlm.rl.rolling import CompletionLog, Roller, mean, names, repetition
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.decoding import prepare
from jaxlm.sample.sampler import Completion, Sampler
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>"))
# More logits than tokens, as where a vocabulary is rounded up.
SHAPE = ModelConfig(vocab_size=272, layers=1, width=16, heads=2, feed_forward=32, compute="float32").complete()
DEFINITION = define_model(SHAPE)
ASKED = [Prompt(number, word, (257, *word.encode()), {}) for number, word in enumerate(("a", "of", "the", "word"))]


def share_of_letters(prompt: str, answer: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in answer) / max(len(answer), 1)


def almost_right(prompt: str, answer: str) -> float:
    return 0.73


def config(**fields) -> RLConfig:
    made = dict(
        model="unread",
        verifiers=(VerifierConfig(kind="function", function=f"{__name__}:share_of_letters"),),
        sources=(ChatSource(name="train", path="unread.jsonl"),),
        grpo=GRPOConfig(),
        prompts=4,
        samples=4,
        max_prompt_tokens=8,
        max_tokens=6,
        minibatch_answers=16,
    )
    return RLConfig(**made | fields)


@pytest.fixture(scope="module")
def params():
    made = jax.jit(lambda: initialize(DEFINITION, 0))()
    # One of four tokens ends an answer, so that some end by themselves.
    return made | {"head": made["head"].at[:, TOKENIZER.eos_id].add(6 * made["head"][:, 97])}


def rolled(config, params, asked=ASKED, step=3, seed=5, **fields):
    sampler = Sampler(SHAPE, TOKENIZER)
    gold = VerifierConfig(kind="function", function=f"{__name__}:almost_right")
    roller = Roller(config, sampler, Judge(config.verifiers, ASKED, "verifiers"), Judge([gold], ASKED, "gold"), 14)
    fields = dict(samples=config.samples, seed=seed, rows=len(asked) * config.samples) | fields
    return roller.roll(params, asked, step, **fields)


def test_answers_lie_behind_their_prompts():
    done = [
        Completion("no", (110, 111, 258), (-0.5, -1.0, -1.5), "eos"),
        Completion("yes", (121, 101, 115), (-2.0, -2.5, -3.0), "length"),
        Completion("", (258,), (-4.0,), "eos"),
        Completion("i", (105,), (-5.0,), "length"),
    ]
    made = rollouts.gather(ASKED[1:3], done, [0.73, 0.0, 1.0, -2.0], S=9, T=4, rows=6)
    assert made.ids.tolist() == [
        [257, 111, 102, 110, 111, 258, 0, 0, 0],
        [257, 111, 102, 121, 101, 115, 0, 0, 0],
        [257, 116, 104, 101, 258, 0, 0, 0, 0],
        [257, 116, 104, 101, 105, 0, 0, 0, 0],
        [0] * 9,
        [0] * 9,
    ]
    assert made.prompt_lengths.tolist() == [3, 3, 4, 4, 1, 1]
    assert made.answer_lengths.tolist() == [3, 3, 1, 1, 0, 0]
    assert made.ended.tolist() == [True, False, True, False, False, False]
    assert made.scores.tolist() == [np.float32(0.73), 0, 1, -2, 0, 0]
    assert made.sampler_logprobs[:3].tolist() == [[-0.5, -1, -1.5, 0], [-2, -2.5, -3, 0], [-4, 0, 0, 0]]
    picture = ["".join("1" if x else "0" for x in row) for row in np.asarray(made.answer_mask)]
    assert picture == ["1110", "1110", "1000", "1000", "0000", "0000"]
    assert jax.tree.map(jnp.asarray, made).lengths.tolist() == [6, 6, 5, 5, 1, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_learner_agree_on_every_token(params, temperature):
    asked = config(temperature=temperature)
    made, completions, _ = rolled(asked, params)
    score = jax.jit(lambda p, r: forward.answer_tokens(DEFINITION, p, r, temperature, 0, TOKENIZER.vocab_size))
    logprobs = score(params, jax.tree.map(jnp.asarray, made)).logprobs
    mask = np.asarray(made.answer_mask)
    np.testing.assert_allclose(logprobs[mask], made.sampler_logprobs[mask], atol=1e-4)
    assert set(made.ended.tolist()) == {True, False}
    for row, completion in enumerate(completions):
        assert made.ended[row] == (completion.ids[-1] == TOKENIZER.eos_id)
        assert made.answer_lengths[row] == len(completion.ids) >= 1
        assert made.ended[row] or len(completion.ids) == asked.max_tokens


def test_random_bits_name_seed_step_prompt_and_sample(params):
    one, two = config(), config(samples=2, minibatch_answers=8)
    _, whole, _ = rolled(one, params)
    # In other company, order, and number of samples: the same answers.
    _, turned, _ = rolled(two, params, [ASKED[3], ASKED[1]])
    assert [c.ids for c in turned] == [whole[at].ids for at in (12, 13, 4, 5)]
    for other in (dict(step=4), dict(seed=6)):
        _, changed, _ = rolled(one, params, **other)
        assert sum(a.ids == b.ids for a, b in zip(whole, changed, strict=True)) < 8
    assert len({c.ids for c in whole}) > 8


def test_drawn_in_parts_the_answers_are_the_same(params):
    whole, _, _ = rolled(config(), params)
    parts, _, _ = rolled(config(sample_rows=3), params)
    jax.tree.map(np.testing.assert_array_equal, parts._replace(sampler_logprobs=0), whole._replace(sampler_logprobs=0))
    np.testing.assert_allclose(parts.sampler_logprobs, whole.sampler_logprobs, atol=1e-5)


def depends(prompt: str, answer: str) -> float:
    """Of two prompts all answers are worth the same."""
    return 0.5 if prompt in ("a", "the") else share_of_letters(prompt, answer)


def test_prompts_that_teach_nothing_give_their_place_to_fresh_ones(params):
    score = VerifierConfig(kind="function", function=f"{__name__}:depends")
    asked = config(verifiers=(score,), grpo=GRPOConfig(extra_prompts=3), prompts=2, minibatch_answers=8, seed=5)
    roller = Roller(asked, Sampler(SHAPE, TOKENIZER), Judge((score,), ASKED, "verifiers"), None, 14)
    a, of, the, word = ASKED
    plain, _, completions, counted = roller.roll_mixed(params, [a, of], [], 3)
    made, prompts, drawn, measured = roller.roll_mixed(params, [a, of], [the, word], 3)
    # "the" is asked, since one place is free, and teaches nothing; then "word" takes the place of "a".
    assert [prompt.text for prompt in prompts] == ["word", "of"]
    values = {name: mean.value() for name, mean in measured.items() if "seconds" not in name}
    assert (values["rl/extra_prompts"], values["rl/replaced_prompts"]) == (2, 1)
    assert values["rl/first_reward"] == pytest.approx(np.mean(plain.scores), abs=1e-6)
    assert drawn[4:] == completions[4:]
    # Its answers are those that it gets in any company.
    _, alone, _ = roller.roll(params, [word], 3, samples=4, seed=5, rows=8)
    assert [c.ids for c in drawn[:4]] == [c.ids for c in alone]
    np.testing.assert_array_equal(made.ids[4:], plain.ids[4:])
    assert bytes(made.ids[0, 1:5].astype(np.uint8)) == b"word"
    assert counted["rl/extra_prompts"].value() == counted["rl/replaced_prompts"].value() == 0
    # Where too few differ, the places stay as they are.
    _, prompts, drawn, measured = roller.roll_mixed(params, [a, of], [the], 3)
    assert ([prompt.text for prompt in prompts], drawn) == (["a", "of"], completions)
    assert (measured["rl/extra_prompts"].value(), measured["rl/replaced_prompts"].value()) == (1, 0)


def test_with_a_templates_stop_token_eos_ends_nothing(params):
    made = Sampler(SHAPE, TOKENIZER, ends=[97]).generate(
        prepare(SHAPE, params), [ASKED[1].ids] * 8, SamplingConfig(max_tokens=40)
    )
    assert any(TOKENIZER.eos_id in completion.ids[:-1] for completion in made)
    assert all(completion.ids[-1] == 97 for completion in made if completion.stop_reason == "eos")


def test_a_prompt_asked_twice_is_answered_anew(params):
    assert names([7, 2, 7, 7], 10) == [7, 2, 17, 27]
    _, first, _ = rolled(config(), params)
    _, twice, _ = rolled(config(), params, [ASKED[2], ASKED[0], ASKED[2]])
    assert [c.ids for c in twice[:8]] == [c.ids for c in (*first[8:12], *first[:4])]
    assert sum(a.ids == b.ids for a, b in zip(twice[:4], twice[8:], strict=True)) < 4


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_answers_do_not_depend_on_the_mesh(params, mesh):
    expected, _, _ = rolled(config(), params)
    made = make_mesh(mesh)
    with jax.set_mesh(made):
        placed = jax.device_put(params, DEFINITION.shardings(made))
        got, _, _ = rolled(config(), placed)
        like = rollouts.abstract(made, 16, 14, 6)
        spread = rollouts.place(got, like)
    np.testing.assert_allclose(got.sampler_logprobs, expected.sampler_logprobs, atol=1e-4)
    for a, b, c in zip(got[:-1], expected[:-1], spread[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(c, b)
    assert all(x.sharding == a.sharding for x, a in zip(spread, like, strict=True))


def test_scores_and_figures_of_a_rollout(params):
    kinds = [VerifierConfig(kind="function", function=f"{__name__}:{n}") for n in ("share_of_letters", "almost_right")]
    made, completions, measured = rolled(config(verifiers=tuple(kinds)), params, rows=20)
    expected = [share_of_letters("", completion.text) + 0.73 for completion in completions]
    np.testing.assert_array_equal(made.scores, np.float32([*expected, 0, 0, 0, 0]))
    assert measured["rl/gold"].value() == pytest.approx(0.73)
    assert measured["rl/repetition"].weight == 16
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == 0.6
    assert repetition([1, 2]) == 0
    assert mean([1.0, 0.0, 1.0, 1.0]).value() == 0.75


def test_the_log_of_completions_is_cut_where_a_run_goes_on(tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines, not for JSON; both come out of a byte tokenizer.
    texts = ["plain", "two\nlines", "a\u2028b\u0085c", 'quo"te', "é"]
    done = [Completion(text, (1, 2), (-1.0, -1.0), "length") for text in texts for _ in range(2)]
    asked = [Prompt(number, f"prompt {number}", (1,), {}) for number in range(5)]
    log = CompletionLog(str(tmp_path), 7)
    log.cut(0)
    for step in (1, 2, 3):
        log.write(step, asked, done, np.arange(10) + 0.73, np.full(10, np.nan))
    lines = lambda: [json.loads(line) for line in log.path.read_bytes().split(b"\n")[:-1]]
    assert len(lines()) == 21
    # Of each prompt one answer, then a second one.
    assert [line["answer"] for line in lines()[:7]] == [*texts, *texts[:2]]
    assert [line["prompt"] for line in lines()[:7]] == [f"prompt {n}" for n in (0, 1, 2, 3, 4, 0, 1)]
    expected = {"step": 1, "prompt": "prompt 1", "answer": "two\nlines", "reward": 2.73, "kl": None}
    assert lines()[1] == expected | {"tokens": 2, "stop_reason": "length"}
    with log.path.open("ab") as file:
        file.write(b'{"step": 1, "prompt": "cut off by a ki')
    log.cut(2)
    assert [line["step"] for line in lines()] == [1] * 7 + [2] * 7
    log.cut(2)
    assert len(lines()) == 14
    CompletionLog(str(tmp_path / "none"), 0).write(1, asked, done, np.zeros(10), np.zeros(10))
    assert not (tmp_path / "none").exists()


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    log = CompletionLog(str(tmp_path / "no folder"), 1)
    log.write(4, ASKED[:1], [Completion("a", (1,), (-1.0,), "eos")], np.zeros(1), np.zeros(1))
    assert not log.path.exists()
