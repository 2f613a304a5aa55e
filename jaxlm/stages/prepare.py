"""Documents from raw sources: read, mended, filtered, without duplicates and without what is held out.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=prepare

Time: about 2.5 MB of mostly ASCII text a second on one core. Result, in WORKDIR:

    train/part-00000.jsonl.gz ...  heldout/part-00000.jsonl.gz ...   {"text", "source", "id"} a line
    report.json                    kept + dropped by reason = read, in all and by source, with examples
    rejects.jsonl.gz               the records that could not be read as text, with where they stand
    manifest.json

Held-out sources are read first: a train document that repeats one of theirs is the one that is dropped.
"""

import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest
from jaxlm.base.errors import UserError
from jaxlm.text import clean, readers, tally
from jaxlm.text.clean import Reason, Rule
from jaxlm.text.config import PrepareConfig, SourceConfig, Split
from jaxlm.text.decontaminate import HeldoutIndex
from jaxlm.text.dedup import Deduplicator
from jaxlm.text.documents import Document, ShardWriter
from jaxlm.text.tally import Rejects, Tally

Config = PrepareConfig
OUTPUTS = ("manifest.json", "report.json", "rejects.jsonl.gz", "train/part-*.jsonl.gz", "heldout/part-*.jsonl.gz")


def validate(config: PrepareConfig, device_count: int) -> None:
    """Raises UserError for a source that is not there."""
    for source in config.sources:
        if source.format not in ("python", "tfds"):
            files.expand(source.path, f"sources.{source.name}.path")


def inputs(config: PrepareConfig) -> dict[str, str]:
    """What the stage reads → a hash or version of each."""
    return {name: found for source in config.sources for name, found in readers.inputs(source).items()}


def main(config: PrepareConfig) -> dict[str, Any]:
    """Makes WORKDIR's documents. Raises Refused when too many records of a source are bad."""
    began = time.monotonic()
    validate(config, 1)
    workdir = epath.Path(config.workdir)
    files.clear(workdir, OUTPUTS)
    read_from = inputs(config)

    duplicates, heldout = Deduplicator(), HeldoutIndex(config.ngram_words)
    rules: list[tuple[str, Rule]] = [*clean.rules(config), ("duplicates", duplicates)]
    tallies: dict[str, Tally] = {}
    facts: dict[str, Any] = {}
    with tally.rejects(workdir / "rejects.jsonl.gz") as rejects, logging.progress("prepare") as progress:
        for split in ("heldout", "train"):
            if split == "train" and config.ngram_words:
                rules = [*rules, ("decontamination", heldout.rule(config.max_overlap_share))]
            with ShardWriter(workdir / split, config.shard_bytes) as shards:
                for source in (s for s in config.sources if split in s.splits):
                    counts = tallies.setdefault(source.name, Tally())
                    for document in _documents(source, split, config.max_record_bytes, rules, counts, rejects):
                        shards.write(document)
                        if split == "heldout" and config.ngram_words:
                            heldout.add(document.text)
                        progress.advance(1, source.name)
            facts[split] = shards.facts()

    report = tally.report(tallies)
    files.write_json(workdir / "report.json", report)
    tally.refuse_bad(tallies, config.max_bad_share, workdir / "rejects.jsonl.gz")
    for split in {split for source in config.sources for split in source.splits}:
        if not facts[split]["documents"]:
            why = ", ".join(f"{name} {count}" for name, count in report["dropped"].items()) or "nothing was read"
            raise UserError(f"sources: no {split} document is left ({why}); {workdir}/report.json has examples")

    seconds = time.monotonic() - began
    kept = {split: facts[split]["documents"] for split in facts}
    summary = {
        "seconds": round(seconds, 2),
        "tokens_per_second": None,
        "figure": f"{kept['train']} + {kept['heldout']} documents, {facts['train']['bytes'] / 1e6:.1f} MB",
    }
    logging.logger.info("prepare: read %d, kept %d, dropped %s", report["read"], report["kept"], report["dropped"])
    facts |= {"read": report["read"], "kept": report["kept"], "dropped": report["dropped"], "summary": summary}
    manifest.write(
        workdir,
        "documents",
        contents=[*(split for split in kept if kept[split]), "report.json", "rejects.jsonl.gz"],
        inputs=read_from,
        config=configs.identity(config),
        facts=facts,
    )
    return summary


def _documents(
    source: SourceConfig, split: Split, max_bytes: int, rules: list[tuple[str, Rule]], counts: Tally, rejects: Rejects
) -> Iterator[Document]:
    """The split's documents of a source that the rules keep; its bad records go to `rejects`."""
    for number, record in enumerate(readers.read(source, max_bytes)):
        if source.split_of(number) != split:
            continue
        outcome = counts.judge(record.where, record.outcome, record.raw, rules)
        if not isinstance(outcome, Reason):
            yield Document(outcome, record.source, f"{source.name}:{number}")
        elif outcome.bad:
            rejects.write(record.where, outcome, record.raw)
