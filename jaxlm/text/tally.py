"""Counts of what became of the records: kept + dropped by reason = read, always."""

from collections import Counter

from jaxlm.text.clean import Reason, Rule

EXAMPLES = 3
EXAMPLE_CHARACTERS = 200


class Tally:
    """The counts of one source. Every record goes through `judge` once."""

    def __init__(self):
        self.read = 0
        self.kept = 0
        self.bad = 0
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def judge(self, where: str, outcome: str | Reason, raw: str, rules: list[tuple[str, Rule]]) -> str | Reason:
        """The text that the rules leave of a record, or the first reason against it. `raw` is what a bad one says."""
        self.read += 1
        shown = raw if isinstance(outcome, Reason) else outcome
        changed = []
        for name, rule in rules:
            if isinstance(outcome, Reason):
                break
            before, outcome = outcome, rule(outcome)
            if outcome != before and not isinstance(outcome, Reason):
                changed.append(name)
        if isinstance(outcome, Reason):
            self.dropped[outcome.name] += 1
            self.bad += outcome.bad
            examples = self.examples.setdefault(outcome.name, [])
            if len(examples) < EXAMPLES:
                examples.append({"where": where, "text": shown[:EXAMPLE_CHARACTERS]})
        else:
            self.kept += 1
            self.changed.update(changed)
        return outcome

    def report(self) -> dict:
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "dropped": dict(self.dropped.most_common()),
            "changed": dict(self.changed.most_common()),
            "examples": self.examples,
        }
