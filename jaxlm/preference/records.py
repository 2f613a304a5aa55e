"""Ranking records as the stages that learn from them take them: read, counted, encoded into prompts with pairs."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxlm.base import files
from jaxlm.base.config import check
from jaxlm.base.errors import ConfigError, JaxlmError, UserError, nearest
from jaxlm.base.logging import logger
from jaxlm.feedback import rankings
from jaxlm.feedback.records import RankingRecord, pairs_of
from jaxlm.preference.ranked import Pair, Prompt, RankingBatches
from jaxlm.reward import losses
from jaxlm.reward.config import AnnotatorWeight, RankingSource, RewardConfig
from jaxlm.text import tally
from jaxlm.tokenizer import chat
from jaxlm.train.processes import from_first

DATA = "data.json"


def read_records(
    workdir: str, sources: Sequence[RankingSource], max_bad_share: float
) -> dict[str, list[RankingRecord]]:
    """Split → records, counted in WORKDIR/data.json. Raises Refused where too many are bad; those lie in
    WORKDIR/rejects.jsonl.gz."""
    path = epath.Path(workdir) / "rejects.jsonl.gz"
    found: dict[str, list[RankingRecord]] = {"train": [], "heldout": []}
    tallies = {}
    # Every process reads them, the first one writes.
    with tally.rejects(path if jax.process_index() == 0 else epath.Path(os.devnull)) as rejects:
        for source in sources:
            records, tallies[source.name] = rankings.load(source, rejects)
            for record in records:
                found[source.split_of(record.prompt_id)].append(record)
    report = tally.report(tallies)
    from_first(lambda: files.write_json(epath.Path(workdir) / DATA, report))
    tally.refuse_bad(tallies, max_bad_share, path)
    logger.info("rankings: read %d, kept %d, dropped %s", report["read"], report["kept"], report["dropped"])
    both = {r.prompt_id for r in found["train"]} & {r.prompt_id for r in found["heldout"]}
    if both:
        raise UserError(f"sources: {len(both)} prompts are in train and in heldout, such as {sorted(both)[:3]}")
    return found


def describe(workdir: str, batches: RankingBatches, heldout: RankingBatches | None) -> None:
    """Says what of the records is learnt from, and puts it beside their counts: WORKDIR/data.json, under "packing"."""
    packed = {"train": batches.packing()} | ({"heldout": heldout.packing()} if heldout else {})
    logger.info(
        "%d prompts with %d pairs (%.1f %% of the tokens are padding), %d held out; left out: %s",
        packed["train"]["prompts"],
        packed["train"]["pairs"],
        100 * packed["train"]["padding_share"],
        packed["heldout"]["prompts"] if heldout else 0,
        packed["train"].get("left_out", "none"),
    )
    path = epath.Path(workdir) / DATA
    from_first(lambda: files.write_json(path, files.read_json(path) | {"packing": packed}))


class Encoder:
    """Records → prompts of token ids and weighted pairs."""

    def __init__(
        self,
        template: chat.ChatTemplate,
        criteria: Sequence[str],
        annotators: Sequence[AnnotatorWeight] = (),
        margin: float = 0.0,
    ):
        """`margin`: by how much the better answer should score higher, a tier of distance."""
        self.template, self.criteria, self.margin = template, criteria, margin
        self.weights = {annotator.name: annotator.weight for annotator in annotators}
        self.names: dict[str, list[str]] = {"annotator": [], "kind": []}
        """What the numbers in pairs stand for."""

    def prompts(
        self, records: Sequence[RankingRecord], wanted: Callable[[str], bool], apart: bool = False
    ) -> list[Prompt]:
        """The prompts as the `wanted` annotators see them; `apart`: a pair of two annotators counts as two."""
        return [self.prompt(record, wanted, apart) for record in records]

    def split(
        self, records: dict[str, list[RankingRecord]], heldout_annotators: Sequence[str], field: str = "criteria"
    ) -> tuple[list[Prompt], list[Prompt]]:
        """(to train on, to measure): held-out annotators are measured on the train records too.

        Raises ConfigError for an annotator or a criterion (of the config's `field`) that no record names: a misspelt
        annotator would be trained on.
        """
        annotations = [a for some in records.values() for record in some for a in record.annotations]
        annotators, ranked = {a.annotator for a in annotations}, {name for a in annotations for name in a.rankings}
        _require_known("heldout_annotators", "is by", heldout_annotators, annotators)
        _require_known("annotators", "is by", self.weights, annotators)
        _require_known(field, "ranks by", self.criteria, ranked)
        apart = lambda name: name in heldout_annotators
        together = self.prompts(records["train"], lambda name: not apart(name))
        measured = self.prompts(records["heldout"], lambda name: True, apart=True)
        return together, measured + self.prompts(records["train"] if heldout_annotators else [], apart, apart=True)

    def prompt(self, record: RankingRecord, wanted: Callable[[str], bool], apart: bool) -> Prompt:
        try:
            messages = list(record.messages)
            prefix = len(self.template.prompt(messages))
            answers = [self.answer(messages, completion.content) for completion in record.completions]
        except JaxlmError as error:
            raise UserError(f"{record.where}: {error}") from None
        place = {completion.id: number for number, completion in enumerate(record.completions)}
        pairs = []
        for number, criterion in enumerate(self.criteria):
            weighted = losses.pair_weights(
                (
                    self.weights.get(annotation.annotator, 1.0),
                    [(*pair, annotation.annotator if apart else "") for pair in pairs_of(annotation, criterion)],
                )
                for annotation in record.annotations
                if wanted(annotation.annotator)
            )
            for (better, worse, distance, annotator), weight in weighted.items():
                made_by = record.completions[place[worse]].policy or "unknown"
                pairs.append(
                    Pair(
                        place[better],
                        place[worse],
                        number,
                        weight,
                        distance,
                        margin=self.margin * distance,
                        annotator=_index(self.names["annotator"], annotator),
                        kind=_index(self.names["kind"], made_by),
                    )
                )
        ids, targets = zip(*answers, strict=True)
        return Prompt(record.prompt_id, ids, pairs, prefix, targets)

    def answer(self, messages: list[Any], content: str) -> tuple[np.ndarray, np.ndarray]:
        """The conversation with this answer, up to its stop token, and which of the tokens are this answer's own.

        What the template writes after the stop token is no part of it, and earlier answers are the prompt's.
        """
        encoded = self.template.encode([*messages, {"role": chat.ASSISTANT, "content": content}])
        own = encoded.targets & (encoded.messages == len(messages))
        if not own.any():
            raise UserError("chat_template: does not tell which tokens are the last answer's")
        end = int(np.flatnonzero(own)[-1]) + 1
        return encoded.ids[:end], own[:end]


def _require_known(field: str, does: str, asked: Iterable[str], known: set[str]) -> None:
    for name in asked:
        check(name in known, field, f"no record {does} {name!r}{nearest(name, sorted(known)[:99])}")


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def reference_answers(
    config: RewardConfig, given: Sequence[RankingRecord], prompts: Sequence[Prompt]
) -> list[np.ndarray]:
    """The first answers of `reference_policy`, or of all, that fit into a row."""
    found = [
        answer
        for record, prompt in zip(given, prompts, strict=True)
        for completion, answer in zip(record.completions, prompt.answers, strict=True)
        if config.reference_policy in ("", completion.policy) and len(answer) <= config.row_length
        if prompt.name not in config.exclude
    ]
    if not found:
        raise ConfigError("reference_policy", f"no answer is of policy {config.reference_policy!r}")
    return found[: config.reference_answers]
