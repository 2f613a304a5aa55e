"""Counts of what became of the records: kept + dropped by reason = read, always; and a file of those that were bad."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import Refused, UserError
from jaxlm.text.clean import Reason, Rule

EXAMPLES = 3
EXAMPLE_CHARACTERS = 200
REJECT_CHARACTERS = 100_000  # of a bad record are kept aside


class Tally:
    """The counts of one source. Every record goes through `judge` or `count` once."""

    def __init__(self):
        self.read = 0
        self.kept = 0
        self.bad = 0
        self.first_bad = ""
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def judge(self, where: str, outcome: str | Reason, raw: str, rules: list[tuple[str, Rule]]) -> str | Reason:
        """The text that the rules leave of a record, or the first reason against it. `raw` is what a bad one says."""
        shown = raw if isinstance(outcome, Reason) else outcome
        changed = []
        for name, rule in rules:
            if isinstance(outcome, Reason):
                break
            before, outcome = outcome, rule(outcome)
            if outcome != before and not isinstance(outcome, Reason):
                changed.append(name)
        self.count(where, outcome if isinstance(outcome, Reason) else None, shown)
        if not isinstance(outcome, Reason):
            self.changed.update(changed)
        return outcome

    def count(self, where: str, reason: Reason | None, shown: str) -> None:
        """One more record, kept where there is no reason against it; `shown` is what its example says."""
        self.read += 1
        if reason is None:
            self.kept += 1
            return
        self.dropped[reason.name] += 1
        self.bad += reason.bad
        if reason.bad and not self.first_bad:
            self.first_bad = f"{where}: {reason.name}: {reason.detail or shown[:80]}"
        examples = self.examples.setdefault(reason.name, [])
        if len(examples) < EXAMPLES:
            examples.append({"where": where, "text": shown[:EXAMPLE_CHARACTERS]})

    def report(self) -> dict:
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "dropped": dict(self.dropped.most_common()),
            "changed": dict(self.changed.most_common()),
            "examples": self.examples,
        }


class Rejects:
    """The bad records, each with its place and reason: {"where", "reason", "record"} a line."""

    def __init__(self, lines: gzip.GzipFile):
        self._lines = lines

    def write(self, where: str, reason: Reason, raw: str) -> None:
        reject = {"where": where, "reason": reason.name, "record": raw[:REJECT_CHARACTERS]}
        self._lines.write(json.dumps(reject, ensure_ascii=False).encode() + b"\n")


@contextmanager
def rejects(path: epath.Path) -> Iterator[Rejects]:
    """Opens a file of bad records, rejects.jsonl.gz; the same records give the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as lines:
            yield Rejects(lines)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def report(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """The counts in all and by source."""
    dropped = sum((tally.dropped for tally in tallies.values()), Counter())
    made = {
        "read": sum(tally.read for tally in tallies.values()),
        "kept": sum(tally.kept for tally in tallies.values()),
        "dropped": dict(dropped.most_common()),
        "sources": {name: tally.report() for name, tally in tallies.items()},
    }
    assert made["kept"] + dropped.total() == made["read"], made
    return made


def refuse_bad(tallies: Mapping[str, Tally], max_share: float, path: epath.Path) -> None:
    """Raises Refused for a source of which more than `max_share` is bad, UserError for an empty one.

    `path` is the file that holds the bad records.
    """
    for name, tally in tallies.items():
        if tally.read == 0:
            raise UserError(f"sources.{name}: holds no record at all")
        if tally.bad > max_share * tally.read:
            reasons = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.items())
            raise Refused(
                f"sources.{name}: {tally.bad} of {tally.read} records are bad ({reasons}), more than "
                f"max_bad_share={max_share}; the first is {tally.first_bad}; {path} holds them all"
            )
