"""Prompts: what is read, what is dropped and why, and which of them a step asks."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.data.config import ChatSource
from jaxlm.rl import prompts
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))


def encode(text: str) -> list[int]:
    return [257, *TOKENIZER.encode(text)]


def source(tmp_path: Path, *records, name: str = "train") -> ChatSource:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return ChatSource(name=name, path=str(path))


def test_plain_texts(tmp_path):
    given = source(tmp_path, {"prompt": "1 + 1 =", "target": "2"}, {"prompt": "é"})
    one, two = prompts.read([given], "train", None, encode, 16)
    assert one == (0, "1 + 1 =", (257, *b"1 + 1 ="), {"prompt": "1 + 1 =", "target": "2"}, f"{given.path}:1")
    assert (two.number, two.text, two.ids) == (1, "é", (257, 0xC3, 0xA9))


def test_conversations_end_where_the_assistant_is_to_write(tmp_path):
    template = chat.load("chatml", TOKENIZER)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    answered = [*asked, {"role": "assistant", "content": "So."}]
    records = [
        {"messages": asked},
        {"messages": answered},
        {"prompt": asked, "completion": "So."},
        {"prompt": "Why?"},
        {"messages": [*answered, {"role": "user", "content": "How?"}]},
    ]
    made = prompts.read([source(tmp_path, *records)], "train", template, encode, 500)
    assert [prompt.text for prompt in made] == ["Why?", "Why?", "Why?", "Why?", "How?"]
    assert made[0].ids == made[1].ids == made[2].ids == tuple(template.prompt(asked))
    assert made[3].ids == tuple(template.prompt(asked[1:]))
    opened = b"assistant\n"
    assert all(bytes(i for i in prompt.ids[-len(opened) :]) == opened for prompt in made)
    assert all(prompt.ids.count(257) == 1 for prompt in made)
    assert [prompt.record for prompt in made] == records


def test_every_record_is_a_prompt_or_dropped_for_a_reason(tmp_path, capsys):
    long = {"prompt": "x" * 16}
    made = prompts.read([source(tmp_path, {"prompt": "x" * 15}, long, {"prompt": "y"})], "train", None, encode, 16)
    # Numbers name random numbers: they go on without a gap.
    assert [(p.number, len(p.ids), p.where[-2:]) for p in made] == [(0, 16, ":1"), (1, 2, ":3")]
    with pytest.raises(UserError, match="no prompt is left; dropped {'longer_than_max_prompt_tokens': 1}"):
        prompts.read([source(tmp_path, long)], "train", None, encode, 16)
    with pytest.raises(UserError, match="sources.empty: holds no record"):
        prompts.read([source(tmp_path, name="empty")], "train", None, encode, 16)
    good = [{"prompt": "x"}] * 150
    bad = ["{broken", {"text": "no prompt"}]
    assert len(prompts.read([source(tmp_path, *good, bad[0])], "train", None, encode, 16)) == 150
    with pytest.raises(Refused, match="sources.train: 2 of 152 records are bad.*malformed_json"):
        prompts.read([source(tmp_path, *good, *bad)], "train", None, encode, 16)
    chats = source(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(Refused, match="conversation_for_a_model_without_chat_template"):
        prompts.read([chats], "train", None, encode, 16)
    alone = source(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(Refused, match="refused_by_the_chat_template"):
        prompts.read([alone], "train", chat.load("chatml", TOKENIZER), encode, 100)


@pytest.mark.parametrize("count", [3, 40, 64])
def test_a_steps_prompts_are_a_function_of_the_step(count):
    asked = [prompts.Prompt(number, "", (1,), {}) for number in range(40)]
    order = prompts.Order(asked, count, seed=3)
    drawn = [prompt.number for step in range(120 // count + 1) for prompt in order.at(step)]
    epochs = [drawn[at : at + 40] for at in range(0, 120, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch in an order of its own"
    later = itertools.islice(prompts.Order(asked, count, seed=3).from_step(17), 2)
    assert list(later) == [(step, order.at(step)) for step in (17, 18)]
    assert [prompt.number for prompt in prompts.Order(asked, 40, seed=4).at(0)] != epochs[0]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_fresh_prompts_are_none_of_the_steps_and_a_function_of_it(count):
    asked = [prompts.Prompt(number, "", (1,), {}) for number in range(20)]
    order = prompts.Order(asked, 6, seed=3)
    for step in range(12):
        fresh = [prompt.number for prompt in order.fresh(step, count)]
        taken = {prompt.number for prompt in order.at(step)}  # 5 where an epoch begins with what the last one ended
        assert len(fresh) == len(set(fresh)) == min(count, 20 - len(taken))
        assert not taken & set(fresh)
    assert order.fresh(9, count) == prompts.Order(asked, 6, seed=3).fresh(9, count)
    assert order.fresh(9, 7) != order.fresh(10, 7)
    assert order.fresh(9, 0) == []


def test_the_next_prompt_stands_where_one_is_excluded():
    asked = [prompts.Prompt(number, "", (1,), {}) for number in range(10)]
    numbers = lambda order: [prompt.number for step in range(5) for prompt in order.at(step)]
    whole = numbers(prompts.Order(asked, 4, seed=3))
    found = numbers(prompts.Order(asked, 4, seed=3, exclude=("4", "5", "9")))
    assert found == [{4: 6, 5: 6, 9: 0}.get(number, number) for number in whole]
    with pytest.raises(ConfigError, match="exclude: got '12'; a prompt's number, 0 to 9, is needed"):
        prompts.Order(asked, 4, seed=3, exclude=("12",))
    with pytest.raises(ConfigError, match="exclude: names every prompt"):
        prompts.Order(asked[:2], 4, seed=3, exclude=("0", "1"))


def test_a_share_is_held_out_and_the_splits_are_all(tmp_path):
    one = source(tmp_path, *({"prompt": f"{number}"} for number in range(400)))
    share = dataclasses.replace(one, heldout_share=0.2)
    train, heldout = ({p.text for p in prompts.read([share], split, None, encode, 16)} for split in share.splits[::-1])
    assert train | heldout == {str(number) for number in range(400)}
    assert not train & heldout
    assert 50 < len(heldout) < 110  # 80, of a standard deviation of 8
    whole = dataclasses.replace(one, name="other", split="heldout")
    assert len(prompts.read([one, whole], "train", None, encode, 16)) == 400


def test_a_rollout_of_more_prompts_than_there_are_is_told(tmp_path, caplog):
    some = prompts.read([source(tmp_path, *({"prompt": f"{n}"} for n in range(3)))], "train", None, encode, 16)
    prompts.Order(some, 3, seed=0)
    assert "rollout" not in caplog.text
    prompts.Order(some, 8, seed=0)
    assert "prompts: a rollout takes 8, and the sources have 3: some are asked several times" in caplog.text
