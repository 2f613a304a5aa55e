"""What a ranking record is (DESIGN, section 4): a prompt, its completions, what annotators say of them.

Keys that are not known here are kept in `raw`, so that a record is written as it was read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxlm.base.config import default_of

Role = Literal["trainer", "lead", "expert", "judge"]
Status = Literal["draft", "submitted", "approved", "returned"]
TRAINING: tuple[Status, ...] = ("submitted", "approved")

Tiers = tuple[tuple[str, ...], ...]
"""Ids of completions, the best first; those of one tier are tied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A JSON object with what of it is not known here."""

    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """The object as it was read: its other keys, and the order of all, are written again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(Item):
    id: str
    content: str
    policy: str | None = None
    """What made it: a model, a person."""
    parent: str | None = None
    """The completion that this one mends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag(Item):
    """A finding in the characters `start` to `end` (exclusive) of a completion's content."""

    completion: str
    kind: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation(Item):
    """What one annotator says of a prompt's completions."""

    id: str
    annotator: str
    role: Role
    status: Status
    rankings: Mapping[str, Tiers] = dataclasses.field(default_factory=dict)
    """criterion → tiers"""
    ratings: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """completion → criterion → number"""
    flags: tuple[Flag, ...] = ()
    shown: tuple[str, ...] = ()
    """The completions in the order in which the annotator saw them."""
    started: str | None = None
    """UTC, ISO 8601."""
    ended: str | None = None
    comment: str | None = None
    reviews: str | None = None
    """The annotation that this one reviews."""

    @property
    def trains(self) -> bool:
        return self.status in TRAINING


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingRecord(Item):
    """A prompt, its completions, and what was said of them."""

    prompt_id: str
    messages: tuple[Mapping[str, Any], ...]
    completions: tuple[Completion, ...]
    annotations: tuple[Annotation, ...] = ()
    where: str = dataclasses.field(default="", compare=False)
    """file:line"""


def pairs_of(annotation: Annotation, criterion: str) -> list[tuple[str, str, int]]:
    """(better id, worse id, how many tiers apart) of all untied pairs; none of an annotation that does not train.

    >>> pairs_of(annotation, "overall")                    # of [["b"], ["a", "d"]]
    [('b', 'a', 1), ('b', 'd', 1)]
    """
    tiers = annotation.rankings.get(criterion, ()) if annotation.trains else ()
    return [
        (better, worse, low - high)
        for high in range(len(tiers))
        for low in range(high + 1, len(tiers))
        for better in tiers[high]
        for worse in tiers[low]
    ]


def to_json(item: Item) -> dict[str, Any]:
    """The JSON object of a record or of a part of it: fields with their default only where they were read."""
    known: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if field.name not in ("raw", "where") and (field.name in item.raw or value != default_of(field)):
            known[field.name] = _plain(value)
    return {name: known.get(name, value) for name, value in item.raw.items()} | known


def _plain(value: Any) -> Any:
    if isinstance(value, Item):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, tuple | list) else value
