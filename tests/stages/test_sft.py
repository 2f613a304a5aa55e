"""Instruction tuning on made-up chats: what becomes a row and a target, what is learnt, what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_runs import lines_of, pretrained, written

import jaxlm
from jaxlm.base.config import override
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.data.config import ChatRowsConfig, ChatSource, MixtureSource
from jaxlm.data.loader import RowSource
from jaxlm.evaluate import answers
from jaxlm.model.transformer import define_model
from jaxlm.stages import sft
from jaxlm.stages.config import SFTConfig
from jaxlm.train import losses, model_directory
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "owl": "hoo", "pig": "oink"}


def chat(animal: str, turns: int = 1) -> dict:
    messages = []
    for turn in range(turns):
        name = [*SOUNDS][([*SOUNDS].index(animal) + turn) % len(SOUNDS)]
        messages.append({"role": "user", "content": f"{name}?"})
        messages.append({"role": "assistant", "content": SOUNDS[name]})
    return {"messages": messages}


@pytest.fixture(scope="module")
def base(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=4, layers=2)


@pytest.fixture
def config(base, tmp_path) -> SFTConfig:
    train = [chat(animal, turns) for animal in SOUNDS for turns in (1, 2) for _ in range(10)]
    train += [{"prompt": f"{animal}?", "completion": sound} for animal, sound in SOUNDS.items()]
    return SFTConfig(
        workdir=str(tmp_path / "sft"),
        model=base,
        sources=(
            ChatSource(name="train", path=written(tmp_path / "train.jsonl", train)),
            ChatSource(name="heldout", path=written(tmp_path / "heldout.jsonl", [chat("cow", 3)]), split="heldout"),
        ),
        row_length=128,
        batch_rows=8,
        steps=100,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=5),
        loop=LoopConfig(log_every_steps=10, evaluate_every_steps=50, checkpoint=CheckpointConfig(every_steps=50)),
    )


def with_train(config: SFTConfig, tmp_path: Path, records: list, **fields) -> SFTConfig:
    source = ChatSource(name="train", path=written(tmp_path / "other.jsonl", records))
    return dataclasses.replace(config, sources=(source,), **fields)


@pytest.mark.slow
def test_the_assistant_is_learnt_answers_and_ends(config):
    sft.main(config)
    lm = jaxlm.load(config.workdir)
    for animal, sound in SOUNDS.items():
        question = [{"role": "user", "content": f"{animal}?"}]
        made = lm.generate([question], max_tokens=20, temperature=0)[0]
        assert (made.text, made.stop_reason) == (sound, "eos")
        assert lm.chat(question, temperature=0) == sound
    talk = [*chat("cat")["messages"], {"role": "user", "content": "dog?"}]
    assert lm.chat(talk, temperature=0) == "woof"
    evaluated = [line for line in lines_of(config.workdir) if "eval/loss" in line]
    assert evaluated[-1]["eval/loss"] < 0.5
    # What the loss counts of the held-out chat: three answers with their stop tokens.
    sounds = "moo" + "quack" + "hoo"
    facts = json.loads((Path(config.workdir) / "rows/manifest.json").read_text())["facts"]["heldout"]
    assert (facts["target_tokens"], facts["bytes"], facts["answers"]) == (len(sounds) + 3, len(sounds), 3)


def test_rows_hold_the_chats_and_their_targets_are_the_answers(config):
    sft.main(dataclasses.replace(config, steps=1))
    model = model_directory.read(f"{config.workdir}/model")
    tokenizer = model.tokenizer()
    seen = []
    source = RowSource(f"{config.workdir}/rows", "train")
    for number in range(len(source)):
        row = source[number]
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            ids, targets = row["ids"][inside], row["loss_mask"][inside]
            pieces = "".join(tokenizer.piece(int(i)) if t else " " for i, t in zip(ids, targets, strict=True))
            seen.append(tuple(pieces.split()))
            assert list(row["positions"][inside]) == list(range(len(ids)))
    expected = [(f"{a}<|im_end|>",) for a in SOUNDS.values()] * 11
    around = [*SOUNDS.values(), "meow"]
    expected += [(f"{a}<|im_end|>", f"{b}<|im_end|>") for a, b in itertools.pairwise(around)] * 10
    assert sorted(seen) == sorted(expected)


def test_packed_chats_have_the_losses_of_each_alone(config):
    sft.main(dataclasses.replace(config, steps=1))
    model = model_directory.read(f"{config.workdir}/model")
    definition = define_model(model.config)
    params = model.load_params(definition)
    row = RowSource(f"{config.workdir}/rows", "train")[0]
    together = losses.row_sums(params, {k: jnp.asarray(v[None]) for k, v in row.items()}, definition)
    alone = 0.0
    for segment in range(1, row["segment_ids"].max() + 1):
        inside = np.flatnonzero(row["segment_ids"] == segment)
        one = {name: np.zeros_like(value) for name, value in row.items()}
        for name, value in row.items():
            one[name][: len(inside)] = value[inside] if name != "segment_ids" else 1
        alone += losses.row_sums(params, {k: jnp.asarray(v[None]) for k, v in one.items()}, definition).loss
    np.testing.assert_allclose(together.loss, alone, rtol=1e-5)


def test_every_record_is_kept_or_dropped_for_a_reason(config, tmp_path):
    long_answer = {"prompt": "cat?", "completion": "x" * 300}
    records = [
        chat("cat"),
        chat("cow", 3),
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        long_answer,
        {"prompt": "y" * 300, "completion": "too far"},
        "{broken",
        {"text": "no chat"},
        {"messages": [{"role": "assistant"}]},
    ]
    lenient = ChatRowsConfig(max_bad_share=0.5)
    sources = (ChatSource(name="train", path=written(tmp_path / "t.jsonl", records)), config.sources[1])
    sft.main(dataclasses.replace(config, sources=sources, chats=lenient, steps=1))
    report = json.loads((Path(config.workdir) / "rows/report.json").read_text())["sources"]["train"]
    assert (report["read"], report["kept"], report["bad"]) == (8, 2, 3)
    assert report["dropped"] == {
        "is_held_out": 1,
        "no_assistant_message": 1,
        "answer_beyond_the_row": 1,
        "malformed_json": 1,
        "no_messages_and_no_prompt_with_completion": 1,
        "refused_by_the_chat_template": 1,
    }
    assert "content" in report["examples"]["refused_by_the_chat_template"][0]["text"]
    facts = json.loads((Path(config.workdir) / "rows/manifest.json").read_text())["facts"]
    assert facts["train"]["truncated"] == 1
    source = RowSource(f"{config.workdir}/rows", "train")
    stop = model_directory.read(f"{config.workdir}/model").tokenizer().special_ids["<|im_end|>"]
    full = next(source[n] for n in range(len(source)) if (source[n]["segment_ids"] == 1).all())
    assert full["loss_mask"][-1]
    assert full["ids"][-1] == ord("x"), "cut where the row ends, with no end made up"
    assert stop not in full["ids"][full["loss_mask"]]
    with pytest.raises(Refused, match=r"sources.train: 3 of 8 records are bad \(.*malformed_json 1.*more than max_bad"):
        sft.main(dataclasses.replace(config, sources=sources, steps=1, workdir=config.workdir + "-strict"))


def test_a_share_of_the_chats_is_held_out_of_training(config, tmp_path):
    many = [{"prompt": f"{number}?", "completion": "moo"} for number in range(60)]
    share = dataclasses.replace(ChatSource(name="mine", path=written(tmp_path / "m.jsonl", many)), heldout_share=0.25)
    sft.main(dataclasses.replace(config, sources=(share,), steps=1))
    facts = json.loads((Path(config.workdir) / "rows/manifest.json").read_text())["facts"]
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == 60
    assert 5 <= facts["heldout"]["documents"] <= 25  # 15, of a standard deviation of 3.4
    report = json.loads((Path(config.workdir) / "rows/report.json").read_text())
    assert (report["read"], report["kept"]) == (60, 60)
    assert any("eval/loss" in line for line in lines_of(config.workdir))
    # An evaluation of the same source reads what was held out of it, and of another source everything.
    asked = {chat.messages[0]["content"] for chat in answers.read(share, ())}
    assert len(asked) == facts["heldout"]["documents"]
    assert len(answers.read(dataclasses.replace(share, heldout_share=0.0), ())) == 60


def test_fields_of_documents_are_not_taken_for_chats(config):
    for field in ("text_field", "part_characters"):
        with pytest.raises(ConfigError, match=rf"sources\.train\.{field}: no such field"):
            override(config, {f"sources.train.{field}": "4"})


def test_masks_of_zeros_and_of_ones_are_refused(config, tmp_path):
    silent = with_train(config, tmp_path, [{"messages": [{"role": "user", "content": "?"}]}] * 3)
    with pytest.raises(
        UserError, match=r"no train chat has an answer to learn from \(no_assistant_message 3; row_length is 128\)"
    ):
        sft.main(silent)
    template = tmp_path / "all.jinja"
    template.write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    one = with_train(config, tmp_path, [{"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(Refused, match="other.jsonl:1: every token is a target"):
        sft.main(dataclasses.replace(one, chat_template=str(template), workdir=config.workdir + "-ones"))


@pytest.mark.slow
def test_stopped_and_gone_on_is_never_stopped(config):
    whole = dataclasses.replace(config, steps=12, workdir=config.workdir + "-whole")
    sft.main(whole)
    loop = dataclasses.replace(config.loop, checkpoint=CheckpointConfig(every_steps=4))
    parts = dataclasses.replace(config, steps=12, loop=loop)
    sft.main(dataclasses.replace(parts, loop=dataclasses.replace(loop, stop_at_step=5)))
    sft.main(parts)
    definition = define_model(model_directory.read(f"{whole.workdir}/model").config)
    a, b = (model_directory.read(f"{c.workdir}/model").load_params(definition) for c in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_pretraining_rows_are_mixed_in_and_general_chats_are_measured(config, packed_rows, tmp_path):
    general = ChatSource(name="g", path=written(tmp_path / "g.jsonl", [chat("pig", 2)]), split="heldout", general=True)
    mixed = dataclasses.replace(
        config,
        row_length=64,
        sources=(*config.sources[:1], general),
        pretraining=(MixtureSource(path=packed_rows, weight=1.0),),
        epochs=1.0,
        steps=0,
        optimizer=OptimizerConfig(ema=0.9),
    )
    sft.main(mixed)
    rows = json.loads((Path(config.workdir) / "rows/manifest.json").read_text())["facts"]["train"]["rows"]
    last = lines_of(mixed.workdir)[-1]
    assert last["step"] == -(-2 * rows // 8), "an epoch of the chats, with as many rows of the other kind"
    assert last["eval/general_loss"] > 0


def test_what_does_not_fit_is_refused_by_field(config, packed_rows, tmp_path):
    with pytest.raises(ConfigError, match="sources: none has split='train'"):
        dataclasses.replace(config, sources=config.sources[1:])
    with pytest.raises(ConfigError, match="format: got 'text'"):
        ChatSource(name="x", path="x.txt", format="text")
    with pytest.raises(ConfigError, match="general: is measured only"):
        ChatSource(name="x", path="x.jsonl", general=True)
    with pytest.raises(UserError, match="model: .*no such folder"):
        sft.main(dataclasses.replace(config, model=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"has rows of 64 tokens, .* has rows of 128"):
        sft.main(dataclasses.replace(config, pretraining=(MixtureSource(path=packed_rows),)))
    with pytest.raises(ConfigError, match="batch_rows: 12 rows do not divide among 8 parts"):
        sft.main(dataclasses.replace(config, batch_rows=12))
