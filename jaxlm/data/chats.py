"""Chats into rows: conversations of every format as packed segments, whose targets are the assistant's answers.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…" or messages, "completion": "…" or messages}

The rows lie in a folder like a pack stage's, so that the same loader mixes them with pretraining rows.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base import files, logging, manifest
from jaxlm.base.errors import Refused, UserError
from jaxlm.data import packing
from jaxlm.data.config import ChatRowsConfig, ChatSource
from jaxlm.data.rows import Piece
from jaxlm.text import readers, tally
from jaxlm.text.clean import Reason
from jaxlm.text.config import Split
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.chat import FILE_NAME as TEMPLATE_FILE
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
WINDOW = 8192  # chats that are sorted by length at a time
ROWS_PER_FILE = 65536


def messages_of(value: Mapping[str, Any]) -> Messages | Reason:
    """The conversation in a record, or the reason why it holds none; roles and contents are the template's business."""
    if "messages" in value:
        return _as_messages(value["messages"], "user")
    if "prompt" not in value or "completion" not in value:
        keys = f"has {', '.join(sorted(value)[:9])}; messages, or prompt with completion, are needed"
        return Reason("no_messages_and_no_prompt_with_completion", bad=True, detail=keys)
    prompt, completion = _as_messages(value["prompt"], "user"), _as_messages(value["completion"], "assistant")
    if isinstance(prompt, Reason) or isinstance(completion, Reason):
        return prompt if isinstance(prompt, Reason) else completion
    return prompt + completion


def _as_messages(value: Any, role: str) -> Messages | Reason:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return Reason("messages_not_a_list_of_objects", bad=True)
    return value


@dataclasses.dataclass
class Counts:
    """What the chats of one split came to."""

    documents: int = 0
    """chats"""
    truncated: int = 0
    """chats cut at the row's end: their last answer has no stop token there, and none is made up"""
    answers: int = 0
    """assistant messages with targets"""
    bytes: int = 0
    """UTF-8 bytes of the targets"""
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0


def write_rows(
    folder: epath.PathLike,
    sources: Sequence[ChatSource],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    config: ChatRowsConfig,
    row_length: int,
) -> manifest.Manifest:
    """Packs the sources into FOLDER/{train,heldout}/; a finished folder of the same chats and config is left as it is.

    Raises Refused where too many records are bad and where a chat has no token but targets, UserError where a split
    has no target at all.
    """
    folder = epath.Path(folder)
    drawn = [[source.name, source.split, source.heldout_share] for source in sources]
    made_with = dataclasses.asdict(config) | {"row_length": row_length, "sources": drawn}
    read_from = {"chat_template": template.hash, "tokenizer": tokenizer.hash}
    read_from |= {name: found for source in sources for name, found in readers.inputs(source).items()}
    if (folder / "manifest.json").exists():
        known = manifest.read(folder, "rows")
        if known.config == made_with and manifest.same_inputs(known.inputs, read_from):
            return known
    files.clear(folder, ("manifest.json", "report.json", "rejects.jsonl.gz", "*/rows-*.array_record"))
    packer = _Packer(template, tokenizer, config, row_length)
    facts: dict[str, Any] = {}
    with tally.rejects(folder / "rejects.jsonl.gz") as packer.rejects:
        # Held-out chats first: a train chat that repeats one of them is the one that is dropped.
        for split in ("heldout", "train"):
            chosen = [source for source in sources if split in source.splits]
            if chosen:
                facts[split] = packer.pack(folder / split, split, chosen)
    report = tally.report(packer.tallies)
    files.write_json(folder / "report.json", report)
    tally.refuse_bad(packer.tallies, config.max_bad_share, folder / "rejects.jsonl.gz")
    for split, counts in facts.items():
        if not counts["target_tokens"]:
            raise UserError(
                f"sources: no {split} chat has an answer to learn from ({_listed(report['dropped'])}; row_length is "
                f"{row_length}); {folder}/report.json has examples"
            )
    tokenizers.save(tokenizer, folder / "tokenizer")
    files.write_bytes(folder / TEMPLATE_FILE, template.source.encode())
    logging.logger.info("chats: read %d, kept %d, dropped %s", report["read"], report["kept"], report["dropped"])
    return manifest.write(
        folder,
        "rows",
        contents=[*facts, "tokenizer", TEMPLATE_FILE, "report.json", "rejects.jsonl.gz"],
        inputs=read_from,
        config=made_with,
        facts={
            "row_length": row_length,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "pad_id": tokenizer.pad_id,
            **facts,
        },
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing was dropped"


class _Packer:
    """Reads, encodes and packs one split after the other."""

    rejects: tally.Rejects

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, config: ChatRowsConfig, row_length: int):
        self.template, self.tokenizer, self.config, self.row_length = template, tokenizer, config, row_length
        self.token_bytes = tokenizer.token_bytes()
        self.tallies: dict[str, tally.Tally] = {}
        self.heldout: set[bytes] = set()

    def pack(self, folder: epath.Path, split: Split, sources: Sequence[ChatSource]) -> dict[str, Any]:
        counts = Counts()
        with logging.progress(f"chats {split}") as progress:
            written = packing.write(
                folder,
                self._pieces(sources, split, counts, progress),
                vocab_size=self.tokenizer.vocab_size,
                row_length=self.row_length,
                window=WINDOW,
                rows_per_file=ROWS_PER_FILE,
                seed=self.config.seed,
            )
        counts.rows, counts.tokens, counts.target_tokens = written
        positions = max(counts.rows * self.row_length, 1)
        return dataclasses.asdict(counts) | {"padding_share": 1 - counts.tokens / positions}

    def _pieces(
        self, sources: Sequence[ChatSource], split: Split, counts: Counts, progress: logging.Progress
    ) -> Iterator[Piece]:
        for source in sources:
            counted = self.tallies.setdefault(source.name, tally.Tally())
            for record in readers.read_split(source, split, self.config.max_record_bytes):
                progress.advance(1, source.name)
                value, shown = record.value, record.raw
                piece = value if isinstance(value, Reason) else self._piece(value, split, record.where, counts)
                if isinstance(piece, Reason):
                    shown = shown or f"{piece.detail} {value}".strip()
                    counted.count(record.where, piece, shown)
                    if piece.bad:
                        self.rejects.write(record.where, piece, shown)
                    continue
                counted.count(record.where, None, "")
                yield piece

    def _piece(self, value: Mapping[str, Any], split: Split, where: str, counts: Counts) -> Piece | Reason:
        """A record's tokens and targets, cut at the row's end; or the reason against it."""
        messages = messages_of(value)
        if isinstance(messages, Reason):
            return messages
        try:
            encoded = self.template.encode(messages)
        except UserError as error:
            return Reason("refused_by_the_chat_template", bad=True, detail=str(error))
        ids, targets = encoded.ids, encoded.targets.copy()
        targets[0] = False
        if len(ids) > 1 and targets[1:].all():
            raise Refused(f"{where}: every token is a target: the chat template sets nothing in front of the answer")
        if not targets.any():
            return Reason("no_assistant_message")
        same = hashlib.sha256(ids.tobytes()).digest()
        if split == "heldout":
            self.heldout.add(same)
        elif same in self.heldout:
            return Reason("is_held_out")
        if len(ids) > self.row_length:
            if self.config.long_chats == "drop":
                return Reason("longer_than_a_row")
            ids, targets = ids[: self.row_length], targets[: self.row_length]
            if not targets.any():
                return Reason("answer_beyond_the_row")
            counts.truncated += 1
        number, counts.documents = counts.documents, counts.documents + 1
        counts.answers += len(np.unique(encoded.messages[: len(ids)][targets]))
        counts.bytes += int(self.token_bytes[ids[targets]].sum())
        return Piece(ids, number, targets)
