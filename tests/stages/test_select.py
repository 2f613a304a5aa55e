"""From a model's answers to chats that sft reads: sample, select, sft on a small untrained model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from stage_runs import lines_of, written

import jaxlm
from jaxlm.base import manifest
from jaxlm.base.errors import UserError
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.rl.config import CriterionWeight, SelectConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages import run, sample, select, sft
from jaxlm.stages.config import RunConfig, SFTConfig
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import model_directory
from jaxlm.train.config import ScheduleConfig

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
SHAPE = dict(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, feed_forward=32, compute="float32")
TEXTS = ["Why?", "How?", "Is an é a letter?"]
RECORDS: list[dict[str, Any]] = [
    {"prompt": TEXTS[0], "target": "x"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[1]}], "target": "y"},
    {"prompt": TEXTS[2], "target": "z", "prompt_id": 9},
]


def share_of_letters(prompt: str, answer: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in answer) / max(len(answer), 1)


LETTERS = VerifierConfig(kind="function", function=f"{__name__}:share_of_letters")


def model(folder: Path, tokenizer: Any = TOKENIZER, template: str = "chatml", **shape: Any) -> str:
    config = ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size} | shape).complete()
    params = jax.jit(lambda: initialize(define_model(config), 1 if "criteria" in shape else 0))()
    if "head" in params:  # one of four tokens ends an answer
        end = tokenizer.special_ids["<|im_end|>"]
        params["head"] = params["head"].at[:, end].add(8 * params["head"][:, 97])
    tokenizers.save(tokenizer, folder / "tokenizer")
    made: Any = dict(inputs={}, config={}, facts={"row_length": 128}, chat_template=chat.load(template, tokenizer))
    model_directory.write(folder / "model", params, config, folder / "tokenizer", **made)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, a reward model, and answers of the one."""
    root = tmp_path_factory.mktemp("select")
    model(root / "policy")
    model(root / "reward", criteria=("overall", "short"))
    written(root / "prompts.jsonl", RECORDS)
    sample.main(answers(root, "samples"))
    return root


def answers(root: Path, name: str, **sampling: Any) -> SampleConfig:
    return SampleConfig(
        workdir=str(root / name),
        model=str(root / "policy"),
        prompts_file=str(root / "prompts.jsonl"),
        chat=True,
        sampling=SamplingConfig(**dict(max_tokens=8, samples=5, seed=3) | sampling),
    )


def config(root: Path, workdir: Path, **fields: Any) -> SelectConfig:
    criteria = (CriterionWeight(name="overall", weight=2.0), CriterionWeight(name="short", weight=-1.0))
    given: dict[str, Any] = dict(
        workdir=str(workdir), samples=str(root / "samples"), reward_model=str(root / "reward"), criteria=criteria
    )
    return SelectConfig(**given | fields)


def test_the_best_of_n_by_reward_model_and_verifiers(root, tmp_path):
    asked = config(root, tmp_path / "best", verifiers=(dataclasses.replace(LETTERS, weight=0.5),))
    summary = select.main(asked)
    drawn = lines_of(root / "samples", "completions.jsonl")
    assert len(drawn) == 15
    asking = lambda line: line.get("messages") or [{"role": "user", "content": line["prompt"]}]
    conversations = [[*asking(line), {"role": "assistant", "content": line["text"]}] for line in drawn]
    rewards = jaxlm.load(root / "reward").rewards(conversations)
    scores = 2 * rewards[:, 0] - rewards[:, 1] + 0.5 * np.array([share_of_letters("", line["text"]) for line in drawn])
    best = []
    for prompt in range(3):
        ended = [at for at in range(5 * prompt, 5 * prompt + 5) if drawn[at]["stop_reason"] != "length"]
        best += [max(ended, key=lambda at: scores[at])] if ended else []
    kept = lines_of(asked.workdir, "chats.jsonl")
    assert [line["messages"] for line in kept] == [conversations[at] for at in best]
    assert [line["sample"] for line in kept] == [at % 5 for at in best]
    np.testing.assert_allclose([line["score"] for line in kept], scores[best], atol=1e-5)
    assert {line["prompt_id"] for line in kept} <= {0, 1, 9}

    report = json.loads((tmp_path / "best/report.json").read_text())
    cut = sum(line["stop_reason"] == "length" for line in drawn)
    assert (report["prompts"], report["answers_a_prompt"], report["cut_off"]) == (3, 5, cut)
    assert 0 < cut < 15
    assert len(kept) >= 2
    assert [line["n"] for line in report["best_of"]] == [1, 2, 4, 5]
    assert report["best_of"][0]["score"] == pytest.approx(scores.mean(), abs=1e-5)
    assert report["best_of"][-1]["score"] == pytest.approx(scores.reshape(3, 5).max(axis=1).mean(), abs=1e-5)
    made = manifest.read(asked.workdir, "chats")
    manifest.verify(asked.workdir, made)
    assert set(made.files) == {"chats.jsonl", "report.json"}
    assert made.inputs == select.inputs(asked)
    assert made.facts["summary"] == summary


def test_the_result_depends_on_no_batch(root, tmp_path):
    wanted = config(root, tmp_path / "one")
    select.main(wanted)
    sample.main(dataclasses.replace(answers(root, "few", batch_rows=2), workdir=str(tmp_path / "few")))
    again = config(root, tmp_path / "two", samples=str(tmp_path / "few"))
    select.main(again)
    for name in ("chats.jsonl", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rejection_sampling_keeps_what_passes(root, tmp_path):
    asked = config(
        root,
        tmp_path / "above",
        reward_model="",
        criteria=SelectConfig.criteria,
        verifiers=(LETTERS,),
        keep="above",
        threshold=0.3,
    )
    select.main(asked)
    kept = lines_of(asked.workdir, "chats.jsonl")
    drawn = lines_of(root / "samples", "completions.jsonl")
    good = [x for x in drawn if x["stop_reason"] != "length" and share_of_letters("", x["text"]) >= 0.3]
    texts = {(line["prompt_id"], line["text"]) for line in good}
    assert {(line["prompt_id"], line["messages"][-1]["content"]) for line in kept} == texts
    assert 1 <= len(kept) == len(texts) < 15
    with pytest.raises(UserError, match=r"threshold: no answer is left of 3 prompts' 5 each"):
        select.main(dataclasses.replace(asked, threshold=7.0))


def test_sft_learns_from_what_was_kept(root, tmp_path):
    sampled = dataclasses.replace(answers(root, "samples"), workdir="", name="sample")
    chosen = dataclasses.replace(config(root, tmp_path, samples="@sample"), workdir="", name="best")
    tuned = SFTConfig(
        name="sft",
        model=str(root / "policy"),
        sources=(ChatSource(name="best", path="@best/chats.jsonl"),),
        row_length=64,
        batch_rows=8,
        steps=2,
        schedule=ScheduleConfig(peak=1e-3, warmup_steps=1),
    )
    summaries = run.main(RunConfig(workdir=str(tmp_path), stages=(sampled, chosen, tuned)))
    assert "answers kept" in summaries["best"]["figure"]
    facts = manifest.read(tmp_path / "sft/rows").facts["train"]
    assert facts["documents"] == len(lines_of(tmp_path / "best", "chats.jsonl"))
    assert facts["answers"] == facts["documents"]
    assert (tmp_path / "sft/model/manifest.json").exists()
    assert sft.inputs(dataclasses.replace(tuned, sources=(ChatSource(name="b", path=f"{tmp_path}/best/chats.jsonl"),)))


def test_what_reads_text_otherwise_is_refused(root, tmp_path):
    other = ByteTokenizer((*TOKENIZER.special_ids, "<more>"))
    one = dict(criteria=("overall", "short"))
    for problem, fields in {
        "samples: .* holds model, but samples is needed": dict(samples=str(root / "policy/model")),
        "reward_model: .* is a language model": dict(reward_model=str(root / "policy")),
        "another tokenizer than that of the model that answered": dict(
            reward_model=model(tmp_path / "tokens", other, **one)
        ),
        "another chat template than that of the model": dict(
            reward_model=model(tmp_path / "template", template=custom_template(tmp_path), **one)
        ),
        "criteria: the reward model has no 'honest'": dict(criteria=(CriterionWeight(name="honest"),)),
        "verifiers: prompt 0 of .*: has no field 'answer'": dict(
            verifiers=(VerifierConfig(kind="exact", target_field="answer"),)
        ),
    }.items():
        with pytest.raises(UserError, match=problem):
            select.main(config(root, tmp_path / "out", **fields))
    plain = dict(workdir=str(tmp_path / "plain"), chat=False, prompts_file="", prompts=("a",))
    sample.main(dataclasses.replace(answers(root, "x"), **plain))
    with pytest.raises(UserError, match="was not drawn as a chat's answers"):
        select.main(config(root, tmp_path / "out", samples=str(tmp_path / "plain")))
    assert not (tmp_path / "out/manifest.json").exists()


def custom_template(folder: Path) -> str:
    """ChatML with another word in front."""
    source = chat.load("chatml", TOKENIZER).source
    path = folder / "template.jinja"
    path.write_text("{# another #}" + source)
    return str(path)
