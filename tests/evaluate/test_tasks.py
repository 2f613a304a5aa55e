"""Task files: what they ask, how their answers are scored, and what is refused by file and line."""

import dataclasses
import json
import math

import numpy as np
import pytest
from subjects import TOKENIZER, chatml, subject, target_text

from jaxlm.base.errors import UserError
from jaxlm.evaluate import task_metrics, tasks
from jaxlm.evaluate.subject import Records
from jaxlm.evaluate.toxicity import WordLists
from jaxlm.sample.config import SamplingConfig

CAPITALS = [
    {"country": "Peru", "choices": ["Lima", "Quito"], "target": "Lima", "language": "en"},
    {"country": "Ecuador", "choices": ["Lima", "Quito"], "target": 1, "language": "en"},
    {"country": "Франция", "choices": ["Рим", "Париж", "Лима"], "target": 1, "language": "ru"},
]


def write(folder, records, name="capitals", **fields):
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text("".join(lines))
    task = {"prompt": "Q: {{ country }}?\nA:", "data": f"{name}.jsonl", "metric": "multiple_choice"} | fields
    (folder / f"{name}.json").write_text(json.dumps(task))
    return str(folder / f"{name}.json")


def measured(path, tmp_path, model, **sampling):
    (task,) = tasks.load([path])
    records = Records(tmp_path, WordLists())
    found = task_metrics.measure(task, model, SamplingConfig(temperature=0.0, **sampling), records)
    lines = [json.loads(line) for line in (tmp_path / records.names[0]).read_text().splitlines()]
    return found, lines


def test_multiple_choice_by_hand(tmp_path):
    # Every byte costs 1 nat, but for "i", which costs 0.1.  " Lima" 4.1, " Quito" 5.1; by bytes of the choice
    # 4.1/4 = 1.025, 5.1/5 = 1.02.  In Russian each letter takes 2 bytes: Рим 7, Париж 11, Лима 9; 7/6, 1.1, 9/8.
    path = write(tmp_path / "tasks", CAPITALS)
    found, lines = measured(path, tmp_path, subject(lambda c: 0.1 if c == "i" else 1.0))
    assert lines[0]["logprobs"] == pytest.approx([-4.1, -5.1])
    assert lines[0]["per_byte"] == pytest.approx([-1.025, -1.02])
    assert lines[2]["logprobs"] == pytest.approx([-7.0, -11.0, -9.0])
    assert lines[2]["per_byte"] == pytest.approx([-7 / 6, -1.1, -1.125])
    assert (found["n"], found["metric"]) == (3, "multiple_choice")
    assert found["accuracy_raw"]["value"] == pytest.approx(1 / 3)  # the shortest: Lima, Lima, Рим
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)  # Quito, Quito, Париж
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert {name: f["value"] for name, f in found["by_language"].items()} == {"en": 0.5, "ru": 1.0}
    assert (lines[1]["prompt"], lines[1]["target"]) == ("Q: Ecuador?\nA:", 1)
    assert lines[1]["where"].endswith("capitals.jsonl:2")


def test_ties_share_the_credit():
    assert task_metrics.credit(np.array([-1.0, -2.0, -1.0]), 0) == 0.5
    assert task_metrics.credit(np.array([-1.0, -1.0 - 1e-7]), 1) == 0.5
    assert task_metrics.credit(np.array([-1.0, -2.0]), 1) == 0


def test_what_is_a_target():
    model = subject(template=chatml())
    assert target_text(model.continuation("Q: 1?\nA:", " one", 0)) == " one"
    assert target_text(model.continuation("", "one", 0)) == "one"
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    again = [*messages, {"role": "user", "content": "2?"}]
    assert target_text(model.answer(again, "two", 0)) == "two"
    long = dataclasses.replace(model, row_length=10).continuation("x" * 100, " one", 7)
    assert TOKENIZER.decode(long.ids.tolist()) == "xxxxxx one"
    assert (target_text(long), long.document) == (" one", 7)


def test_a_token_over_the_border_belongs_to_the_answer():
    class Pairs:
        """Two letters a token, from the text's beginning."""

        bos_id = None
        special_ids = {}  # noqa: RUF012

        def encode(self, text):
            return [int.from_bytes(text[at : at + 2].encode()) for at in range(0, len(text), 2)]

    model = dataclasses.replace(subject(), tokenizer=Pairs())
    assert model.continuation("abc", "def", 0).targets.tolist() == [False, True, True]  # ab | cd ef
    assert model.continuation("abcd", "ef", 0).targets.tolist() == [False, False, True]


def test_verifiers_score_what_the_model_says(tmp_path):
    sums = [{"a": 2, "b": 3, "target": "5"}, {"a": 2, "b": 2, "target": "4"}, {"a": 1, "b": 9, "target": "10"}]
    answers = {"2+3=": " 5\nQ: more", "2+2=": " five, you idiot", "1+9=": " 1 1 1 1 1 1 1 1 1 1"}
    path = write(tmp_path / "t", sums, "sums", prompt="{{ a }}+{{ b }}=", metric="number", stop=["\n"], max_tokens=17)
    found, lines = measured(path, tmp_path, subject(answer=answers.__getitem__))
    assert [line["score"] for line in lines] == [1, 0, 0]
    assert [line["answer"] for line in lines] == ["5", "five, you idiot", "1 1 1 1 1 1 1 1 1 1"]
    assert found["score"]["value"] == pytest.approx(1 / 3)
    assert found["ended"]["value"] == pytest.approx(2 / 3)
    assert found["toxic"]["value"] == pytest.approx(1 / 3)
    # 17 bytes " 1 1 ... 1 " make 14 4-grams, 2 of them different.
    assert found["repetition"]["value"] == pytest.approx(12 / 14 / 3)
    wanted = write(tmp_path / "t", sums, "other", prompt="{{ a }}+{{ b }}=", metric={"kind": "regex"}, max_tokens=17)
    assert measured(wanted, tmp_path, subject(answer=answers.__getitem__))[0]["metric"] == "regex"


def test_bits_per_byte_of_the_target(tmp_path):
    records = [{"q": "a", "target": "xy"}, {"q": "b", "target": "xyz"}]
    path = write(tmp_path / "t", records, prompt="{{ q }}", metric="bits_per_byte", separator="")
    found, _ = measured(path, tmp_path, subject(lambda c: 2.0 if c == "z" else 1.0))
    assert found["bits_per_byte"]["value"] == pytest.approx((2 + 4) / 5 / math.log(2))


def test_shots_and_system_stand_before_the_question(tmp_path):
    path = write(tmp_path / "t", CAPITALS, shots=1, system="Be short.", chat=True)
    (task,) = tasks.load([path])
    assert [example.record["country"] for example in task.examples] == ["Ecuador", "Франция"]
    assert task.text(task.examples[0]) == "Be short.\n\nQ: Peru?\nA: Lima\n\nQ: Ecuador?\nA:"
    assert [(m["role"], m["content"]) for m in task.messages(task.examples[0])] == [
        ("system", "Be short."), ("user", "Q: Peru?\nA:"), ("assistant", "Lima"), ("user", "Q: Ecuador?\nA:"),
    ]  # fmt: skip
    shown = write(tmp_path / "t", CAPITALS, "other", shots=1, shot_answer="It is {{ choices[0] }}.", limit=1)
    (task,) = tasks.load([shown])
    assert len(task.examples) == 1
    assert task.text(task.examples[0]).startswith("Q: Peru?\nA: It is Lima.\n\n")


def test_chat_is_asked_where_there_is_a_template(tmp_path):
    prompt = "{% if chat %}{{ country }}?{% else %}Q: {{ country }}?\nA:{% endif %}"
    path = write(tmp_path / "t", CAPITALS, prompt=prompt, chat=True)
    for template, expected in ((chatml(), "Peru?"), (None, "Q: Peru?\nA:")):
        found, lines = measured(path, tmp_path, subject(template=template))
        assert lines[0]["prompt"] == expected
        assert lines[0]["logprobs"] == [-4.0, -5.0] if template else [-5.0, -6.0]
        assert found["n"] == 3


def test_folders_toml_and_shipped_tasks(tmp_path):
    write(tmp_path / "t", CAPITALS)
    (tmp_path / "t" / "plain.toml").write_text(
        'prompt = "{{ country }}"\ndata = "capitals.jsonl"\nmetric = {kind = "number", marker = "####"}\n'
    )
    assert [task.name for task in tasks.load([str(tmp_path / "t")])] == ["capitals", "plain"]
    assert len(tasks.inputs([str(tmp_path / "t")])) == 3
    (truthful,) = tasks.load(["truthful"])
    assert [sum(e.language == language for e in truthful.examples) for language in ("en", "ru")] == [20, 20]
    assert all(len(set(truthful.choices(example)[0])) == 3 for example in truthful.examples)
    example = truthful.examples[0]
    assert truthful.text(example) == f"Q: {example.record['question']}\nA:"
    assert truthful.messages(example) == [{"role": "user", "content": example.record["question"]}]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metric": "exakt"}, "metric: got 'exakt'; one of multiple_choice, bits_per_byte, exact, "),
        ({"shot": 3}, "shot: no such field; did you mean 'shots'"),
        ({"prompt": "{{ contry }}"}, "prompt: fails for .*capitals.jsonl:1: .*'contry' is undefined"),
        ({"prompt": "{% if %}"}, "prompt: line 1 is not a template"),
        ({"prompt": "{{ ''.__class__.__mro__ }}"}, "prompt: fails for .*SecurityError"),
        ({"data": "other.jsonl"}, "no such file or folder: .*other.jsonl"),
        ({"shots": 3}, "data: capitals.jsonl has 3 records, all of them shots"),
        ({"choices_field": "country"}, "capitals.jsonl:1: country is 'Peru'; a list of two or more texts"),
        ({"target_field": "country"}, "capitals.jsonl:1: country is 'Peru'; a choice's number from 0, or its text"),
        ({"target_field": "right"}, "capitals.jsonl:1: has no field 'right'"),
        ({"metric": {"kind": "number"}}, "capitals.jsonl:1: target: .*got 'Lima'; a number such as"),
    ],
)
def test_wrong_tasks_are_refused_with_the_mend(tmp_path, fields, problem):
    path = write(tmp_path / "t", CAPITALS, **fields)
    with pytest.raises(UserError, match=problem):
        measured(path, tmp_path, subject())


def test_two_tasks_of_a_name_are_refused(tmp_path):
    first, second = write(tmp_path / "a", CAPITALS), write(tmp_path / "b", CAPITALS)
    with pytest.raises(UserError, match="2 are called 'capitals'"):
        tasks.load([first, second])
    with pytest.raises(UserError, match="tasks: no such file or folder: truthfull; truthful comes with jaxlm"):
        tasks.load(["truthfull"])


def test_a_prompt_that_loses_its_beginning_is_counted_and_told(tmp_path, caplog):
    long = CAPITALS[0] | {"country": "x" * 300}
    path = write(tmp_path / "tasks", [long, CAPITALS[1]])
    found, lines = measured(path, tmp_path, subject())
    assert found["cut"] == 2, "both choices of the first"
    assert "capitals: 2 texts are longer than 256 tokens, and their prompts lost their beginning" in caplog.text
    assert lines[0]["logprobs"] == pytest.approx([-5.0, -6.0]), "the choices are whole"
    found, _ = measured(write(tmp_path / "short", CAPITALS), tmp_path, subject())
    assert "cut" not in found


@pytest.mark.parametrize("characters", [254, 255, 300])
def test_an_answer_that_does_not_fit_into_a_row_is_refused(tmp_path, characters):
    """A row of 256 holds the answer and the token before it, by which its first token is predicted."""
    path = write(tmp_path / "tasks", [{"country": "Peru", "target": "y" * characters}], metric="bits_per_byte")
    if characters == 254:  # with the blank before it, 255
        assert measured(path, tmp_path, subject())[1][0]["bits"] == pytest.approx(255 / math.log(2))
    else:
        with pytest.raises(UserError, match="capitals.json: row_length: 256 tokens are too few for an answer of"):
            measured(path, tmp_path, subject())
