"""Ranked answers, as people and judges give them: one JSON object a line (DESIGN, section 4).

    {"prompt_id": "7", "messages": [{"role": "user", "content": "Who are you?"}],
     "completions": [{"id": "a", "content": "A program."}, {"id": "b", "content": "Why?"}, {"id": "c", "content": ""}],
     "annotations": [{"id": "1", "annotator": "ann", "role": "trainer", "status": "submitted",
                      "rankings": {"overall": [["a"], ["b", "c"]]}}]}

Tiers come best first, so ties are explicit; a completion in no tier forms no pair. A line with a "chosen" and a
"rejected" answer is read as a record of these two. What breaks a rule becomes a `Reason`, with what is wrong and where.
`records.py` says what a record is.
"""

import datetime
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.feedback.records import Annotation, Completion, Flag, RankingRecord, Role, Status, Tiers, to_json
from jaxlm.text import readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import Source
from jaxlm.text.tally import Rejects, Tally

MOST_RANKED = 9
MAX_BYTES = 2**24  # of a record


class Found(NamedTuple):
    """A record of a file."""

    where: str
    """file:line"""
    outcome: RankingRecord | Reason
    raw: str
    """What a record that was put aside says; empty for a good one."""


def read(source: Source, max_bytes: int = MAX_BYTES) -> Iterator[Found]:
    """All records of a source of objects (JSONL, ArrayRecord, Parquet, TFDS), in an order that does not change.

    A record that stands there twice is put aside, and is not bad. Raises UserError for files that cannot be read.
    """
    seen: dict[str, str] = {}
    for where, value, raw in readers.read_objects(source, max_bytes):
        outcome = value if isinstance(value, Reason) else _among(parse(value, where), value, seen)
        bad = isinstance(outcome, Reason)
        yield Found(where, outcome, (raw or json.dumps(value, default=str)) if bad else "")


def load(
    source: Source, rejects: Rejects | None = None, max_bytes: int = MAX_BYTES
) -> tuple[list[RankingRecord], Tally]:
    """The good records of a source, and the counts of all by reason; bad ones go to `rejects`."""
    records, tally = [], Tally()
    for where, outcome, raw in read(source, max_bytes):
        if isinstance(outcome, RankingRecord):
            records.append(outcome)
            tally.count(where, None, "")
            continue
        tally.count(where, outcome, f"{outcome.detail} {raw}".strip())
        if rejects and outcome.bad:
            rejects.write(where, outcome, raw)
    return records, tally


def write(path: epath.PathLike, records: Iterable[RankingRecord]) -> None:
    """JSONL, compressed where the name ends in .gz; what `read` gave comes out as it was, a pair as a record of two."""
    if not str(path).endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: rankings are written as .jsonl or .jsonl.gz")
    content = "".join(json.dumps(to_json(record), ensure_ascii=False) + "\n" for record in records).encode()
    # Without a time stamp, the same records make the same file.
    files.write_bytes(path, gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)


def parse(value: Mapping[str, Any], where: str = "") -> RankingRecord | Reason:
    """The record of a JSON object, or the first reason against it, whose detail says which part is wrong, and how."""
    pair = "completions" not in value and ("chosen" in value or "rejected" in value)
    try:
        _require_json(value)
        if "completion" in value and "label" in value:
            raise _Bad("judged_alone", "label: judges one answer; rankings or pairs of a prompt's answers are needed")
        return _from_pair(value, where) if pair else _from_ranking(value, where)
    except _Bad as bad:
        return Reason(bad.reason, bad=True, detail=bad.problem)


def _among(record: RankingRecord | Reason, value: Mapping[str, Any], seen: dict[str, str]) -> RankingRecord | Reason:
    """The record, or why it does not fit those `seen` before: hashes → file:line, prompts → messages."""
    if isinstance(record, Reason):
        return record
    first = seen.setdefault(f"record {files.hash_json(value)}", record.where)
    if first != record.where:
        return Reason("duplicate_record", detail=f"is the same as {first}")
    messages = files.hash_json(record.messages)
    if seen.setdefault(f"prompt {record.prompt_id}", messages) != messages:
        problem = f"prompt_id: {record.prompt_id!r} stands with other messages before"
        return Reason("prompt_id_of_two_prompts", bad=True, detail=problem)
    return record


class _Bad(Exception):
    """Which rule a record breaks, and where in it."""

    def __init__(self, reason: str, problem: str):
        super().__init__(reason, problem)
        self.reason, self.problem = reason, problem


def _require_json(value: Mapping[str, Any]) -> None:
    """What Python reads as JSON, and other formats hold, is more than JSON and UTF-8 can say."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise _Bad("lone_surrogate", str(error)) from None
    except (TypeError, ValueError) as error:
        raise _Bad("not_json", str(error)) from None


_KINDS = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def _of(value: Any, kind: type, at: str) -> Any:
    """`value`, which must be of a kind of JSON."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise _Bad("wrong_type", f"{at}: is {value!r:.80}; {_KINDS[kind]} is needed")
    return value


def _take(value: Mapping[str, Any], name: str, kind: type, at: str, default: Any = ...) -> Any:
    """A field, which must be there unless it has a default; null stands for a default of None."""
    if name not in value and default is ...:
        raise _Bad("missing_field", f"{at}{name}: is missing")
    if name not in value or (value[name] is None and default is None):
        return default
    return _of(value[name], kind, f"{at}{name}")


def _objects(value: Mapping[str, Any], name: str, at: str, default: Any = ...) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, each with its place, such as "flags[0]."."""
    for i, one in enumerate(_take(value, name, list, at, default)):
        yield _of(one, dict, f"{at}{name}[{i}]"), f"{at}{name}[{i}]."


def _from_ranking(value: Mapping[str, Any], where: str) -> RankingRecord:
    completions = [_completion(one, at) for one, at in _objects(value, "completions", "")]
    known = _distinct([c.id for c in completions], "completion", "completions")
    if len(completions) < 2:
        raise _Bad("fewer_than_2_completions", f"completions: has {len(completions)}; there is nothing to rank")
    for completion in completions:
        if completion.parent is not None:
            _known(completion.parent, known - {completion.id}, f"completion {completion.id!r}: parent")
    contents = {c.id: c.content for c in completions}
    annotations = [_annotation(one, contents, at) for one, at in _objects(value, "annotations", "", [])]
    ids = _distinct([a.id for a in annotations], "annotation", "annotations")
    for annotation in annotations:
        if annotation.reviews not in (ids | {None}) - {annotation.id}:
            raise _Bad(
                "unknown_review", f"annotation {annotation.id!r}: reviews {annotation.reviews!r}, none of the others"
            )
    return RankingRecord(
        prompt_id=_id(value, "prompt_id", ""),
        messages=_messages(_take(value, "messages", list, ""), "messages"),
        completions=tuple(completions),
        annotations=tuple(annotations),
        where=where,
        raw=value,
    )


def _completion(value: Mapping[str, Any], at: str) -> Completion:
    return Completion(
        id=_id(value, "id", at),
        content=_take(value, "content", str, at),
        policy=_take(value, "policy", str, at, None),
        parent=_take(value, "parent", str, at, None),
        raw=value,
    )


def _annotation(value: Mapping[str, Any], contents: Mapping[str, str], at: str) -> Annotation:
    """An annotation of the completions whose `contents` these are."""
    role, status = _take(value, "role", str, at), _take(value, "status", str, at)
    for field, found, allowed in (("role", role, get_args(Role)), ("status", status, get_args(Status))):
        if found not in allowed:
            raise _Bad(f"unknown_{field}", f"{at}{field}: is {found!r}; one of {', '.join(allowed)} is needed")
    rankings = _take(value, "rankings", dict, at, {}).items()
    shown = tuple(_of(id, str, f"{at}shown") for id in _take(value, "shown", list, at, []))
    for id in _distinct(shown, "completion", f"{at}shown"):
        _known(id, contents, f"{at}shown")
    started, ended = (_time(_take(value, field, str, at, None), f"{at}{field}") for field in ("started", "ended"))
    if started and ended and ended < started:
        raise _Bad("ended_before_started", f"{at}ended: {value['ended']} lies before {value['started']}")
    return Annotation(
        id=_id(value, "id", at),
        annotator=_id(value, "annotator", at),
        role=role,
        status=status,
        rankings={name: _tiers(given, contents, f"{at}rankings.{name}") for name, given in rankings},
        ratings=_ratings(_take(value, "ratings", dict, at, {}), contents, f"{at}ratings"),
        flags=tuple(_flag(one, contents, place) for one, place in _objects(value, "flags", at, [])),
        shown=shown,
        started=value.get("started"),
        ended=value.get("ended"),
        comment=_take(value, "comment", str, at, None),
        reviews=_take(value, "reviews", str, at, None),
        raw=value,
    )


def _tiers(value: Any, contents: Mapping[str, str], at: str) -> Tiers:
    tiers = tuple(tuple(_of(tier, list, f"{at}[{i}]")) for i, tier in enumerate(_of(value, list, at)))
    ranked = [_of(id, str, at) for tier in tiers for id in tier]
    if () in tiers:
        raise _Bad("empty_tier", f"{at}[{tiers.index(())}]: is empty")
    for id in ranked:
        _known(id, contents, at)
        if ranked.count(id) > 1:
            raise _Bad("completion_in_two_tiers", f"{at}: ranks {id!r} twice")
    if len(ranked) > MOST_RANKED:
        raise _Bad("more_than_9_ranked", f"{at}: ranks {len(ranked)} completions; {MOST_RANKED} are the most")
    return tiers


def _ratings(value: Mapping[str, Any], contents: Mapping[str, str], at: str) -> Mapping[str, Mapping[str, float]]:
    for id, given in value.items():
        _known(id, contents, at)
        for criterion, number in _of(given, dict, f"{at}.{id}").items():
            if not math.isfinite(_of(number, float, f"{at}.{id}.{criterion}")):
                raise _Bad("wrong_type", f"{at}.{id}.{criterion}: is {number}; a finite number is needed")
    return value


def _flag(value: Mapping[str, Any], contents: Mapping[str, str], at: str) -> Flag:
    completion = _take(value, "completion", str, at)
    _known(completion, contents, f"{at}completion")
    start, end, size = _take(value, "start", int, at), _take(value, "end", int, at), len(contents[completion])
    if not 0 <= start < end <= size:
        raise _Bad("offset_outside_of_text", f"{at}start, end: {start} to {end} lie not within {size} characters")
    return Flag(completion=completion, kind=_id(value, "kind", at), start=start, end=end, raw=value)


def _messages(value: Sequence[Any], at: str) -> tuple[Mapping[str, Any], ...]:
    for message, place in _objects({at: value}, at, ""):
        _id(message, "role", place)
        _take(message, "content", str, place)
    if not value:
        raise _Bad("no_messages", f"{at}: is empty; a prompt needs one message at least")
    return tuple(value)


def _from_pair(value: Mapping[str, Any], where: str) -> RankingRecord:
    """{"prompt" | "messages", "chosen", "rejected"}: strings, or lists of messages, an answer's with the prompt or not.

    Without a "prompt_id" the prompt's own hash serves, so that all pairs of a prompt share one. Where neither stands,
    the prompt is all of `chosen` but its last message.
    """
    if "messages" in value and "prompt" in value:
        raise _Bad("prompt_and_messages", "prompt: stands beside messages; one of the two is needed")
    if "messages" not in value and "prompt" not in value and isinstance(value.get("chosen"), list):
        value = {**value, "messages": value["chosen"][:-1]}
    name = "messages" if "messages" in value else "prompt"
    given = value.get(name)
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else _take(value, name, list, "")
    messages = _messages(prompt, name)
    chosen, rejected = (_answer(value, field, messages) for field in ("chosen", "rejected"))
    if chosen == rejected:
        raise _Bad("chosen_is_rejected", "chosen: is the rejected answer, letter by letter")
    annotation = {"id": "pair", "annotator": "pair", "role": "trainer", "status": "submitted"}
    record = {
        "prompt_id": f"prompt-{files.hash_json(prompt)[:16]}",
        **{key: kept for key, kept in value.items() if key not in ("prompt", "messages", "chosen", "rejected")},
        "messages": prompt,
        "completions": [{"id": "chosen", "content": chosen}, {"id": "rejected", "content": rejected}],
        "annotations": [annotation | {"rankings": {"overall": [["chosen"], ["rejected"]]}}],
    }
    return _from_ranking(record, where)


def _answer(value: Mapping[str, Any], at: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The content of an answer that is given as a string, or as messages with those of the prompt or without."""
    if isinstance(value.get(at), str):
        return value[at]
    given = [(m["role"], m["content"]) for m in _messages(_take(value, at, list, ""), at)]
    before = [(m["role"], m["content"]) for m in messages]
    own = given[len(before) :] if given[: len(before)] == before else given
    if [role for role, _ in own] != ["assistant"]:
        roles = ", ".join(role for role, _ in own) or "none"
        raise _Bad("not_one_answer", f"{at}: one message of the assistant must follow the prompt's; found: {roles}")
    return own[0][1]


def _id(value: Mapping[str, Any], name: str, at: str) -> str:
    found = _take(value, name, str, at)
    if not found:
        raise _Bad("missing_field", f"{at}{name}: is empty")
    return found


def _distinct(ids: Sequence[str], what: str, at: str) -> set[str]:
    for id in ids:
        if ids.count(id) > 1:
            raise _Bad(f"duplicate_{what}", f"{at}: {id!r} stands there twice")
    return set(ids)


def _known(id: str, known: Any, at: str) -> None:
    if id not in known:
        raise _Bad("unknown_completion", f"{at}: names {id!r}, which is no completion here")


def _time(value: str | None, at: str) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(value) if value is not None else None
    except ValueError:
        time = datetime.datetime.min
    if time is not None and time.utcoffset() != datetime.timedelta(0):
        raise _Bad("time_not_utc", f"{at}: is {value!r}; a time like 2025-01-31T12:00:00Z is needed")
    return time
