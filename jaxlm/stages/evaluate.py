"""Evaluation: a model on held-out rows and on texts → bits per byte, loss, accuracy.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=evaluate

Time: a forward pass over the texts, about a third of a training step's time a token. Result: WORKDIR/results.json,

    {"heldout": {"documents", "tokens", "bytes", "xz_bits_per_byte",
                 "loss": {"value", "interval"}, "bits_per_byte": {...}, "accuracy": {...}},
     "texts": {"GLOB": {...}}}

with 95 % intervals over documents, and beside each what `xz -9` makes of the same documents concatenated.
"""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import rows as token_rows
from jaxlm.data.config import ChatSource
from jaxlm.data.loader import RowSource
from jaxlm.data.rows import Piece
from jaxlm.evaluate import answers
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.evaluate.likelihood import figures, measure, pack_texts, xz_bits_per_byte
from jaxlm.hub.find import find_model
from jaxlm.hub.language_model import LanguageModel, load
from jaxlm.sample.sampler import Sampler
from jaxlm.text import documents, readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import SourceConfig
from jaxlm.tokenizer import chat

Config = EvaluateConfig
MAX_RECORD_BYTES = 2**30


def validate(config: EvaluateConfig, device_count: int) -> None:
    """Raises ConfigError for a mesh that does not divide the devices."""
    config.mesh.sizes(device_count)


def inputs(config: EvaluateConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    model = find_model(config.model, "model")
    read = {str(model): manifest.read(model).hash}
    if config.rows:
        read[config.rows] = manifest.read(config.rows, "rows", "rows").hash
    if config.documents:
        read[config.documents] = manifest.read(config.documents, "documents", "documents").hash
    for pattern in config.texts:
        read |= readers.inputs(_source(pattern, config.text_field))
    for source in config.chats:
        read |= readers.inputs(source)
    return read


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Writes WORKDIR/results.json; returns the summary, whose figure is that of the held-out rows (or first texts)."""
    began = time.monotonic()
    validate(config, jax.device_count())
    workdir = epath.Path(config.workdir)
    files.clear(workdir, ("manifest.json", "results.json"))
    read_from = inputs(config)
    model = find_model(config.model, "model")
    lm = load(model, mesh=sharding.make_mesh(config.mesh))
    results: dict[str, Any] = {}
    if config.rows:
        results["heldout"] = evaluate_rows(config, lm)
        _show("held-out rows", results["heldout"])
    row_length = config.row_length or lm.context_tokens
    if (config.texts or config.chats) and not row_length:
        raise ConfigError("row_length", f"must be given: {model} does not say on how long rows it was trained")
    for pattern in config.texts:
        texts = list(read_texts(pattern, config.text_field))
        packed = pack_texts(texts, lm.tokenizer, row_length)
        result = _measure(config, lm, packed, row_length) | {"xz_bits_per_byte": xz_bits_per_byte(texts)}
        results.setdefault("texts", {})[pattern] = result
        _show(pattern, result)
    for source in config.chats:
        result = evaluate_chats(config, lm, source, row_length)
        results.setdefault("chats", {})[source.name] = result
        _show(source.name, result)

    seconds = time.monotonic() - began
    all_results = [results["heldout"]] if config.rows else []
    all_results += [*results.get("texts", {}).values(), *results.get("chats", {}).values()]
    first = all_results[0]
    beside = f" (xz -9: {first['xz_bits_per_byte']:.3f})" if "xz_bits_per_byte" in first else ""
    summary = {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(result["tokens"] for result in all_results) / seconds, 1),
        "figure": f"{first['bits_per_byte']['value']:.3f} bits per byte{beside}",
    }
    files.write_json(workdir / "results.json", results)
    manifest.write(
        workdir,
        "evaluation",
        contents=["results.json", *(f"answers-{source.name}.jsonl" for source in config.chats if config.answers)],
        inputs=read_from,
        config=configs.identity(config),
        facts={"results": results, "summary": summary},
    )
    return summary


def evaluate_rows(config: EvaluateConfig, lm: LanguageModel) -> dict[str, Any]:
    """The figures of the held-out rows, with xz's beside them where the documents are given."""
    source = RowSource(config.rows, "heldout")
    if source.tokenizer_hash != lm.tokenizer.hash:
        raise UserError(f"rows: {config.rows} was packed with another tokenizer than the model's; pack it again")
    names = sorted(name for name in source.manifest.files if name.startswith("heldout/"))
    reader = token_rows.RowReader([source.folder / name for name in names])
    decoded = (token_rows.decode(reader[index]) for index in range(len(reader)))
    result = _measure(config, lm, decoded, source.row_length)
    if not config.documents:
        return result
    made_from = manifest.read(config.documents, "documents", "documents").hash
    if made_from not in source.manifest.inputs.values():
        raise UserError(f"documents: {config.rows} was not packed from {config.documents}; give the folder that it was")
    texts = [document.text for document in documents.read(config.documents, "heldout")]
    size = sum(len(text.encode()) for text in texts)
    if size != result["bytes"]:
        logging.logger.warning(
            "held-out rows: their tokens stand for %d bytes, the documents have %d; bits per byte are over the first "
            "(the tokenizer rewrites text, or pack left out BOS or long documents)",
            result["bytes"],
            size,
        )
    return result | {"xz_bits_per_byte": xz_bits_per_byte(texts), "document_bytes": size}


def evaluate_chats(config: EvaluateConfig, lm: LanguageModel, source: ChatSource, row_length: int) -> dict[str, Any]:
    """Figures of the answers' text, and of what the model answers itself."""
    template = chat.load(config.chat_template, lm.tokenizer) if config.chat_template else lm.chat_template
    if template is None:
        raise ConfigError("chat_template", f"{config.model} has none; plain asks it in plain text")
    found = answers.read(source, config.kinds)
    packed = answers.pack(found, template, row_length, lm.tokenizer.token_bytes())
    result = _measure(config, lm, packed, row_length)
    asked = found[: config.answers]
    if asked:
        sampler = Sampler(lm.config, lm.tokenizer, row_length, (lm.tokenizer.eos_id, *template.stop_ids))
        with jax.set_mesh(lm.mesh):
            said = answers.answer(asked, template, lambda ids: sampler.generate(lm.params, ids, config.sampling))
        result |= {"answers": answers.scores_of(asked, said, config.verifiers)}
        path = epath.Path(config.workdir) / f"answers-{source.name}.jsonl"
        lines = [
            json.dumps(
                {"prompt": answers.question(c), "answer": a.text, "stop_reason": a.stop_reason}, ensure_ascii=False
            )
            for c, a in zip(asked, said, strict=True)
        ]
        files.write_bytes(path, "".join(line + "\n" for line in lines).encode())
    return result


def read_texts(pattern: str, text_field: str) -> Iterator[str]:
    """The texts of files; raises UserError naming file and line for one that cannot be read as text."""
    found = False
    for record in readers.read(_source(pattern, text_field), MAX_RECORD_BYTES):
        if isinstance(record.outcome, Reason):
            raise UserError(f"texts: {record.where}: {record.outcome.name}: it must be a text to be measured")
        if record.outcome:
            found = True
            yield record.outcome
    if not found:
        raise UserError(f"texts: {pattern}: holds no text")


def _source(pattern: str, text_field: str) -> SourceConfig:
    return SourceConfig(name="texts", path=pattern, split="heldout", text_field=text_field)


def _measure(config: EvaluateConfig, lm: LanguageModel, rows: Iterator[list[Piece]], row_length: int) -> dict[str, Any]:
    mesh = lm.mesh
    assert mesh is not None
    pieces = sharding.batch_pieces(mesh.shape)
    with jax.set_mesh(mesh), logging.progress("evaluate") as progress:
        sums = measure(
            lm.definition,
            lm.params,
            rows,
            row_length=row_length,
            bytes_of=lm.tokenizer.token_bytes(),
            batch_rows=math.ceil(config.batch_rows / pieces) * pieces,
            progress=progress,
        )
    return figures(sums)


def _show(name: str, result: dict[str, Any]) -> None:
    def value(key: str) -> str:
        interval = result[key]["interval"]
        half = f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else ""
        return f"{result[key]['value']:.3f}{half}"

    xz = f" (xz -9: {result['xz_bits_per_byte']:.3f})" if "xz_bits_per_byte" in result else ""
    logging.logger.info(
        "%s: %s bits per byte%s, loss %s nats a token, accuracy %s; %d documents, %d tokens, %d bytes",
        name,
        value("bits_per_byte"),
        xz,
        value("loss"),
        value("accuracy"),
        result["documents"],
        result["tokens"],
        result["bytes"],
    )
    for score, found in result.get("answers", {}).items():
        low, high = found["interval"] or (math.nan, math.nan)
        logging.logger.info("%s: answers: %s %.3f (%.3f to %.3f)", name, score, found["value"], low, high)
