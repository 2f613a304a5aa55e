"""Ranking records: what is read, what is put aside and why, and that writing gives back what was read."""

import copy
import dataclasses
import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.feedback import rankings
from jaxlm.feedback.records import Annotation, RankingRecord, pairs_of, to_json
from jaxlm.preference.records import read_records
from jaxlm.reward.config import RankingSource
from jaxlm.text.clean import Reason
from jaxlm.text.config import SourceConfig
from jaxlm.text.tally import rejects

USER = {"role": "user", "content": "Who are you?"}
RECORD = {
    "source": {"kept": ["as", 1, None]},
    "prompt_id": "p1",
    "messages": [{"role": "system", "content": "Be brief."}, USER | {"name": "kept"}],
    "completions": [
        {"id": "a", "content": "A program.", "policy": "sft-3"},
        {"id": "b", "content": "Ein Programm für Sie.", "policy": "sft-3", "tokens": 7},
        {"id": "c", "content": "", "policy": None},
        {"id": "d", "content": "A program, and no person.", "policy": "ann", "parent": "a"},
    ],
    "annotations": [
        {
            "id": "1",
            "annotator": "ann",
            "role": "trainer",
            "rankings": {"overall": [["b"], ["a", "d"]], "truthful": []},
            "ratings": {"a": {"helpful": 4, "harmless": 1.5}},
            "flags": [{"completion": "b", "kind": "hallucination", "start": 4, "end": 12, "note": "kept"}],
            "shown": ["d", "a", "b"],
            "started": "2025-01-31T12:00:00Z",
            "ended": "2025-01-31T12:03:20.5+00:00",
            "comment": "",
            "status": "submitted",
            "seconds_idle": 3,
        },
        {"id": "2", "annotator": "lea", "role": "lead", "status": "approved", "reviews": "1"},
        {"id": "3", "annotator": "gpt", "role": "judge", "status": "draft", "rankings": {"overall": [["a"], ["b"]]}},
    ],
    "where": "kept too",
    "raw": 0,
}
PAIR = {"prompt": "Who are you?", "chosen": "A program.", "rejected": "Why?", "margin": 2}


def source(path):
    return SourceConfig(name="mine", path=str(path))


def lines(path, *values):
    path.write_bytes(b"".join((v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in values))
    return source(path)


def record_of(value):
    record = rankings.parse(value)
    assert isinstance(record, RankingRecord)
    return record


def changed(change):
    value = copy.deepcopy(RECORD)
    change(value, value["annotations"][0])
    return value


def test_a_record_as_it_is_read(tmp_path):
    ((_, record, _),) = rankings.read(lines(tmp_path / "one.jsonl", RECORD))
    assert isinstance(record, RankingRecord)
    assert (record.prompt_id, record.where) == ("p1", f"{tmp_path}/one.jsonl:1")
    assert [c.id for c in record.completions] == ["a", "b", "c", "d"]
    assert (record.completions[3].policy, record.completions[3].parent) == ("ann", "a")
    first, second, third = record.annotations
    assert first.rankings == {"overall": (("b",), ("a", "d")), "truthful": ()}
    assert first.ratings == {"a": {"helpful": 4, "harmless": 1.5}}
    flag = first.flags[0]
    assert record.completions[1].content[flag.start : flag.end] == "Programm"
    assert (second.reviews, second.rankings, third.trains) == ("1", {}, False)


def test_pairs_leave_out_ties_what_is_not_ranked_and_what_does_not_train():
    record = record_of(RECORD)
    first, _, draft = record.annotations
    assert pairs_of(first, "overall") == [("b", "a", 1), ("b", "d", 1)]
    assert pairs_of(first, "truthful") == pairs_of(first, "harmless") == []
    assert pairs_of(draft, "overall") == []
    assert pairs_of(dataclasses.replace(draft, status="approved"), "overall") == [("a", "b", 1)]
    deep = dataclasses.replace(first, rankings={"overall": (("c",), ("a", "d"), ("b",))})
    assert pairs_of(deep, "overall") == [("c", "a", 1), ("c", "d", 1), ("c", "b", 2), ("a", "b", 1), ("d", "b", 1)]
    trained = {s: Annotation(id="1", annotator="a", role="lead", status=s).trains for s in ("approved", "returned")}
    assert trained == {"approved": True, "returned": False}


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_is_read_is_written_again_with_keys_that_nobody_knows(tmp_path, ending):
    other = RECORD | {"prompt_id": "p2", "annotations": []}
    del (bare := dict(other))["annotations"]
    values = [RECORD, other, bare | {"prompt_id": "p3"}]
    records, tally = rankings.load(lines(tmp_path / "in.jsonl", *values))
    assert (tally.read, tally.kept, tally.bad) == (3, 3, 0)
    out = tmp_path / f"out.jsonl{ending}"
    rankings.write(out, records)
    content = out.read_bytes()
    written = (gzip.decompress(content) if ending else content).decode().splitlines()
    assert [json.loads(line) for line in written] == values
    assert [list(json.loads(line)) for line in written] == [list(value) for value in values], "the order of keys too"
    assert rankings.load(source(out))[0] == records
    rankings.write(out, records)
    assert out.read_bytes() == content
    with pytest.raises(UserError, match=r"out\.txt: rankings are written as \.jsonl or \.jsonl\.gz"):
        rankings.write(tmp_path / "out.txt", records)


def test_a_changed_field_is_written():
    first = record_of(RECORD).annotations[0]
    one = dataclasses.replace(first, status="returned", reviews="2", rankings={"overall": (("c", "a"),)}, raw=first.raw)
    assert to_json(one) == RECORD["annotations"][0] | {
        "status": "returned",
        "reviews": "2",
        "rankings": {"overall": [["c", "a"]]},
    }


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "pair",
    [
        PAIR,
        PAIR | {"prompt": [USER], "chosen": [assistant("A program.")], "rejected": [USER, assistant("Why?")]},
        {"messages": [USER], "chosen": "A program.", "rejected": [assistant("Why?")], "margin": 2},
    ],
)
def test_a_pair_is_a_record_of_two(pair):
    record = record_of(pair)
    assert record.messages == (USER,)
    assert [(c.id, c.content) for c in record.completions] == [("chosen", "A program."), ("rejected", "Why?")]
    assert pairs_of(record.annotations[0], "overall") == [("chosen", "rejected", 1)]
    written = to_json(record)
    assert written["margin"] == 2
    assert "prompt" not in written
    assert record_of(written) == record


def test_pairs_of_one_prompt_share_its_id_unless_they_have_their_own(tmp_path):
    pairs = [PAIR, PAIR | {"chosen": "I!"}, PAIR | {"prompt": "And I?"}, PAIR | {"prompt_id": "mine", "prompt": "?"}]
    records, _ = rankings.load(lines(tmp_path / "pairs.jsonl", *pairs))
    ids = [record.prompt_id for record in records]
    assert len(set(ids)) == 3
    assert ids[0] == ids[1]
    assert ids[3] == "mine"
    rankings.write(tmp_path / "records.jsonl", records)
    assert rankings.load(source(tmp_path / "records.jsonl"))[0] == records


LONE = json.dumps(PAIR | {"chosen": "\ud83d"}).encode()
BAD = [
    ("malformed_json", b'{"prompt_id": "x"', ""),
    ("not_json", b'{"prompt_id": NaN}', "not JSON compliant"),
    ("broken_utf8", b'{"prompt_id": "caf\xe9"}', ""),
    ("lone_surrogate", LONE, "surrogates not allowed"),
    ("not_a_json_object", [RECORD], ""),
    ("missing_field", {}, "completions: is missing"),
    ("missing_field", lambda r, a: r.pop("prompt_id"), "prompt_id: is missing"),
    ("missing_field", lambda r, a: r.update(prompt_id=""), "prompt_id: is empty"),
    ("missing_field", lambda r, a: a.pop("status"), "annotations[0].status: is missing"),
    ("missing_field", lambda r, a: r["completions"][1].pop("content"), "completions[1].content: is missing"),
    ("wrong_type", lambda r, a: r.update(prompt_id=7), "prompt_id: is 7; a string is needed"),
    ("wrong_type", lambda r, a: r.update(annotations=None), "annotations: is None; a list is needed"),
    ("wrong_type", lambda r, a: r["messages"][0].update(content=["text"]), "messages[0].content: is ['text']"),
    ("wrong_type", lambda r, a: a["rankings"].update(overall="ab"), "annotations[0].rankings.overall: is 'ab'"),
    ("wrong_type", lambda r, a: a["rankings"].update(overall=["a", "b"]), "overall[0]: is 'a'; a list is needed"),
    ("wrong_type", lambda r, a: a["ratings"]["a"].update(helpful=True), "ratings.a.helpful: is True; a number"),
    ("wrong_type", lambda r, a: a["flags"][0].update(start=1.0), "flags[0].start: is 1.0; a whole number"),
    ("no_messages", lambda r, a: r.update(messages=[]), "messages: is empty"),
    ("duplicate_completion", lambda r, a: r["completions"][1].update(id="a"), "completions: 'a' stands there twice"),
    ("duplicate_annotation", lambda r, a: a.update(id="2"), "annotations: '2' stands there twice"),
    ("duplicate_completion", lambda r, a: a["shown"].append("a"), "annotations[0].shown: 'a' stands there twice"),
    ("fewer_than_2_completions", lambda r, a: r.update(completions=r["completions"][:1]), "completions: has 1"),
    ("more_than_9_ranked", None, "rankings.overall: ranks 10 completions; 9 are the most"),
    ("unknown_completion", lambda r, a: a["rankings"]["overall"].append(["z"]), "overall: names 'z', which is no"),
    ("unknown_completion", lambda r, a: a["ratings"].update(z={}), "ratings: names 'z'"),
    ("unknown_completion", lambda r, a: a["flags"][0].update(completion="z"), "flags[0].completion: names 'z'"),
    ("unknown_completion", lambda r, a: a["shown"].append("z"), "shown: names 'z'"),
    ("unknown_completion", lambda r, a: r["completions"][3].update(parent="d"), "completion 'd': parent: names 'd'"),
    ("completion_in_two_tiers", lambda r, a: a["rankings"]["overall"].append(["b"]), "overall: ranks 'b' twice"),
    ("completion_in_two_tiers", lambda r, a: a["rankings"]["overall"][1].append("a"), "overall: ranks 'a' twice"),
    ("empty_tier", lambda r, a: a["rankings"]["overall"].insert(1, []), "overall[1]: is empty"),
    ("unknown_status", lambda r, a: a.update(status="done"), "status: is 'done'; one of draft, submitted"),
    ("unknown_role", lambda r, a: a.update(role="boss"), "role: is 'boss'; one of trainer, lead"),
    ("time_not_utc", lambda r, a: a.update(started="2025-01-31T12:00:00"), "started: is '2025-01-31T12:00:00'; a time"),
    ("time_not_utc", lambda r, a: a.update(ended="2025-01-31T12:00:00+01:00"), "annotations[0].ended: is"),
    ("time_not_utc", lambda r, a: a.update(ended="yesterday"), "annotations[0].ended: is 'yesterday'"),
    ("ended_before_started", lambda r, a: a.update(ended="2025-01-31T11:59:59Z"), "lies before 2025-01-31T12:00:00Z"),
    ("offset_outside_of_text", lambda r, a: a["flags"][0].update(end=22), "flags[0].start, end: 4 to 22 lie not"),
    ("offset_outside_of_text", lambda r, a: a["flags"][0].update(start=12), "12 to 12 lie not within 21 characters"),
    ("unknown_review", lambda r, a: r["annotations"][1].update(reviews="9"), "annotation '2': reviews '9'"),
    ("unknown_review", lambda r, a: a.update(reviews="1"), "annotation '1': reviews '1'"),
    ("missing_field", {"prompt": "?", "chosen": "a"}, "rejected: is missing"),
    ("missing_field", {"chosen": "a", "rejected": "b"}, "prompt: is missing"),
    ("prompt_and_messages", PAIR | {"messages": [USER]}, "one of the two is needed"),
    ("chosen_is_rejected", PAIR | {"rejected": "A program."}, "letter by letter"),
    ("wrong_type", PAIR | {"rejected": None}, "rejected: is None; a list is needed"),
    ("not_one_answer", PAIR | {"chosen": [USER]}, "chosen: one message of the assistant must follow the prompt's"),
    ("not_one_answer", PAIR | {"chosen": [assistant("a"), USER, assistant("b")]}, "found: assistant, user, assistant"),
]


def many_ranked():
    completions = [{"id": str(i), "content": str(i)} for i in range(10)]
    annotation = RECORD["annotations"][2] | {"rankings": {"overall": [[str(i)] for i in range(10)]}}
    return {"prompt_id": "p", "messages": [USER], "completions": completions, "annotations": [annotation]}


@pytest.mark.parametrize(("reason", "change", "problem"), BAD, ids=[f"{i} {row[0]}" for i, row in enumerate(BAD)])
def test_what_breaks_a_rule_is_put_aside_by_reason_and_place(tmp_path, reason, change, problem):
    line = changed(change) if callable(change) else many_ranked() if change is None else change
    found = list(rankings.read(lines(tmp_path / "a.jsonl", PAIR, line, PAIR | {"chosen": "Me."})))
    assert [isinstance(one.outcome, RankingRecord) for one in found] == [True, False, True]
    where, outcome, raw = found[1]
    assert (where, outcome.name, outcome.bad) == (f"{tmp_path}/a.jsonl:2", reason, True)
    assert problem in outcome.detail
    assert raw


def test_nine_can_be_ranked_among_more():
    value = many_ranked()
    annotation = value["annotations"][0] | {"status": "approved"}
    annotation["rankings"]["overall"].pop()
    record = record_of(value | {"annotations": [annotation]})
    assert len(pairs_of(record.annotations[0], "overall")) == 9 * 8 / 2


def test_bad_records_are_counted_by_reason_and_kept_aside(tmp_path):
    values = [
        PAIR,
        b"{",
        PAIR,
        RECORD,
        changed(lambda r, a: r.update(prompt_id=7)),
        RECORD | {"messages": [USER]},
        b"[",
    ]
    chosen = lines(tmp_path / "a.jsonl", *values)
    with rejects(epath.Path(tmp_path) / "rejects.jsonl.gz") as kept_aside:
        records, tally = rankings.load(chosen, kept_aside)
    assert len(records) == tally.kept == 2
    assert (tally.read, tally.bad) == (7, 4)
    assert tally.dropped == {"malformed_json": 2, "wrong_type": 1, "duplicate_record": 1, "prompt_id_of_two_prompts": 1}
    example = tally.examples["wrong_type"][0]
    assert example["where"] == f"{tmp_path}/a.jsonl:5"
    assert example["text"].startswith('prompt_id: is 7; a string is needed {"source":')
    assert tally.examples["duplicate_record"][0]["text"].startswith(f"is the same as {tmp_path}/a.jsonl:1")
    written = [json.loads(line) for line in gzip.decompress((tmp_path / "rejects.jsonl.gz").read_bytes()).splitlines()]
    assert [(one["where"].rpartition(":")[2], one["reason"]) for one in written] == [
        ("2", "malformed_json"),
        ("5", "wrong_type"),
        ("6", "prompt_id_of_two_prompts"),
        ("7", "malformed_json"),
    ]
    assert json.loads(written[1]["record"]) == values[4]


def test_parquet_holds_records_too(tmp_path):
    record = record_of(PAIR)
    pq.write_table(pa.Table.from_pylist([to_json(record)]), tmp_path / "a.parquet")
    assert rankings.load(source(tmp_path / "a.parquet"))[0] == [record]
    pq.write_table(pa.table({"prompt_id": [datetime.datetime(2025, 1, 31)], "chosen": ["a"]}), tmp_path / "b.parquet")
    ((_, reason, raw),) = rankings.read(source(tmp_path / "b.parquet"))
    assert (reason.name, reason.detail) == ("not_json", "Object of type datetime is not JSON serializable")
    assert "2025-01-31" in raw


def test_a_prompts_rankings_are_held_out_together(tmp_path):
    records = [RECORD | {"prompt_id": f"p{number % 50}", "extra": number} for number in range(100)]
    lines(tmp_path / "r.jsonl", *records)
    given = RankingSource(name="mine", path=str(tmp_path / "r.jsonl"), heldout_share=0.3)
    found = read_records(str(tmp_path), [given], 0.0)
    train, heldout = ({record.prompt_id for record in found[split]} for split in ("train", "heldout"))
    assert len(found["train"]) + len(found["heldout"]) == 100
    assert not train & heldout
    assert 5 <= len(heldout) <= 25  # 15, of a standard deviation of 3.2


def test_a_pair_whose_prompt_is_in_its_answers():
    """TRL calls it an implicit prompt."""
    system = {"role": "system", "content": "Be brief."}
    say = lambda text: {"role": "assistant", "content": text}
    found = rankings.parse({"chosen": [system, USER, say("A program.")], "rejected": [system, USER, say("Why?")]})
    assert isinstance(found, RankingRecord)
    assert [dict(message) for message in found.messages] == [system, USER]
    assert [completion.content for completion in found.completions] == ["A program.", "Why?"]
    same = rankings.parse({"prompt": [system, USER], "chosen": "A program.", "rejected": "Why?"})
    assert isinstance(same, RankingRecord)
    assert found.prompt_id == same.prompt_id
    for wrong, detail in (
        ({"chosen": "Hi! A program.", "rejected": "Hi! Why?"}, "prompt: is missing"),
        ({"chosen": [say("x")], "rejected": [say("y")]}, "messages: is empty"),
        ({"chosen": [USER, say("x")], "rejected": [system, say("y")]}, "rejected: one message of the assistant"),
        ({"prompt": "Hi", "completion": "A", "label": True}, "label: judges one answer; rankings or pairs"),
    ):
        reason = rankings.parse(wrong)
        assert isinstance(reason, Reason)
        assert reason.bad
        assert reason.detail.startswith(detail)
