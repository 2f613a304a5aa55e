"""A model on what it was not trained on: packed rows, texts, chats; bits per byte by source and language."""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxlm.base import files, logging, manifest
from jaxlm.base.errors import UserError
from jaxlm.data import rows as token_rows
from jaxlm.data.config import ChatSource
from jaxlm.data.loader import RowSource
from jaxlm.evaluate import answers
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.evaluate.likelihood import by_label, figures, pack_texts, xz_bits_per_byte
from jaxlm.evaluate.subject import Records, Subject
from jaxlm.text import documents, readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import SourceConfig

MAX_RECORD_BYTES = 2**30
OBJECTS = tuple(ending for kind in ("jsonl", "parquet", "array_record") for ending in readers.ENDINGS[kind])


def of_rows(config: EvaluateConfig, subject: Subject) -> dict[str, Any]:
    """The figures of the held-out rows; with the documents xz's beside them, and those of each source and language."""
    source = RowSource(config.rows, "heldout")
    if source.tokenizer_hash != subject.tokenizer.hash:
        raise UserError(f"rows: {config.rows} was packed with another tokenizer than the model's; pack it again")
    names = sorted(name for name in source.manifest.files if name.startswith("heldout/"))
    reader = token_rows.RowReader([source.folder / name for name in names])
    decoded = (token_rows.decode(reader[index]) for index in range(len(reader)))
    sums = subject.measure(decoded, source.row_length)
    result = figures(sums)
    if not config.documents:
        return result
    made_with = manifest.read(config.documents, "documents", "documents")
    if made_with.hash not in source.manifest.inputs.values():
        raise UserError(f"documents: {config.rows} was not packed from {config.documents}; give the folder that it was")
    languages = {known["name"]: known.get("language", "") for known in made_with.config["sources"]}
    found = list(documents.read(config.documents, "heldout"))
    labels = {
        number: {"source": document.source, "language": languages.get(document.id.rpartition(":")[0], "")}
        for number, document in enumerate(found)
    }
    texts = [document.text for document in found]
    size = sum(len(text.encode()) for text in texts)
    if size != result["bytes"]:
        logging.logger.warning(
            "held-out rows: their tokens stand for %d bytes, the documents have %d; bits per byte are over the first "
            "(the tokenizer rewrites text, or pack left out BOS or long documents)",
            result["bytes"],
            size,
        )
    return result | by_label(sums, labels) | {"xz_bits_per_byte": xz_bits_per_byte(texts), "document_bytes": size}


def of_texts(pattern: str, text_field: str, subject: Subject) -> dict[str, Any]:
    """The figures of texts, with xz's beside them, by the "source" and "language" of records that have them."""
    found = list(read_texts(pattern, text_field))
    texts = [text for text, _ in found]
    sums = subject.measure(pack_texts(texts, subject.tokenizer, subject.row_length), subject.row_length)
    labels = {number: label for number, (_, label) in enumerate(found)}
    return figures(sums) | by_label(sums, labels) | {"xz_bits_per_byte": xz_bits_per_byte(texts)}


def of_chats(config: EvaluateConfig, source: ChatSource, subject: Subject, records: Records) -> dict[str, Any]:
    """Figures of the answers' text, and of what the model answers itself; "cut": how many are longer than a row."""
    template = subject.chat()
    found = answers.read(source, config.kinds)
    languages = [str(chat.record.get("language", source.language)) for chat in found]
    labels = {number: {"language": language} for number, language in enumerate(languages)}
    encoded = [template.encode(chat.messages) for chat in found]
    sums = subject.measure(
        answers.pack(encoded, subject.row_length, subject.tokenizer.token_bytes()), subject.row_length
    )
    result = figures(sums) | by_label(sums, labels)
    if cut := sum(len(one.ids) > subject.row_length for one in encoded):
        result["cut"] = cut
        told = "chats: %d of %s are longer than %d tokens and were measured up to there; raise row_length"
        logging.logger.warning(told, cut, source.name, subject.row_length)
    asked = found[: config.answers]
    if not asked:
        return result
    said = subject.generate([template.prompt(chat.messages[:-1]) for chat in asked], config.sampling)
    path = epath.Path(config.workdir) / f"answers-{source.name}.jsonl"
    lines = [
        json.dumps({"prompt": answers.question(c), "answer": a.text, "stop_reason": a.stop_reason}, ensure_ascii=False)
        for c, a in zip(asked, said, strict=True)
    ]
    files.write_bytes(path, "".join(line + "\n" for line in lines).encode())
    told = records.figures(source.name, said, languages[: len(asked)])
    return result | {"answers": told | answers.scores_of(asked, said, config.verifiers)}


def read_texts(pattern: str, text_field: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(text, its labels) of files; raises UserError naming file and line for one that cannot be read as text."""
    source, found = text_source(pattern, text_field), False
    for where, outcome, labels in _labelled(source, pattern.endswith(OBJECTS)):
        if isinstance(outcome, Reason):
            raise UserError(f"texts: {where}: {outcome.name}: it must be a text to be measured")
        if outcome:
            found = True
            yield outcome, labels
    if not found:
        raise UserError(f"texts: {pattern}: holds no text")


def _labelled(source: SourceConfig, objects: bool) -> Iterator[tuple[str, str | Reason, dict[str, str]]]:
    if not objects:
        for record in readers.read(source, MAX_RECORD_BYTES):
            yield record.where, record.outcome, {}
        return
    for where, value, _ in readers.read_objects(source, MAX_RECORD_BYTES):
        given = {} if isinstance(value, Reason) else value
        labels = {key: str(given[key]) for key in ("source", "language") if key in given}
        yield where, readers.text_of(value, source.text_field), labels


def text_source(pattern: str, text_field: str) -> SourceConfig:
    return SourceConfig(name="texts", path=pattern, split="heldout", text_field=text_field)
