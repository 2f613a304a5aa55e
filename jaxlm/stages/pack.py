"""Rows of tokens from documents and a tokenizer.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=pack

Time: 1 to 2 MB of text a second on one core, most of it the tokenizer's. Result, in WORKDIR:

    train/rows-00000.array_record ...  heldout/rows-00000.array_record ...    see data/rows.py
    tokenizer/                         a copy of the tokenizer
    manifest.json                      rows, tokens, bytes, padding share, documents split
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import rows
from jaxlm.data.config import PackConfig
from jaxlm.data.packing import UNSHUFFLED, split, write
from jaxlm.text import documents
from jaxlm.text.config import Split
from jaxlm.tokenizer.tokenizer import KINDS, Tokenizer, load, save

Config = PackConfig
OUTPUTS = (
    "manifest.json",
    *(f"{split}/{name}" for split in ("train", "heldout") for name in ("rows-*.array_record", UNSHUFFLED)),
    *(f"tokenizer/{name}" for name in KINDS),
)


@dataclasses.dataclass
class Counts:
    """What one split came to."""

    documents: int = 0
    split_documents: int = 0
    dropped_documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the packed text"""
    text_tokens: int = 0
    """tokens that stand for text, each once"""
    rows: int = 0
    tokens: int = 0
    """all but padding; the overlap of split documents' pieces is counted in both"""
    target_tokens: int = 0
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    """documents of up to 16, 32, 64, … tokens, each among those of the least number that holds it"""


def validate(config: PackConfig, device_count: int) -> None:
    """Nothing beyond the config: its inputs may be made by earlier stages of the same run."""


def inputs(config: PackConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    return {
        config.documents: manifest.read(config.documents, "documents", "documents").hash,
        config.tokenizer: load(config.tokenizer).hash,
    }


def main(config: PackConfig) -> dict[str, Any]:
    """Makes WORKDIR's rows."""
    began = time.monotonic()
    workdir = epath.Path(config.workdir)
    made_from = manifest.read(config.documents, "documents", "documents")
    manifest.verify(config.documents, made_from)
    tokenizer = load(config.tokenizer)
    if config.add_bos and tokenizer.bos_id is None:
        raise ConfigError("add_bos", f"the tokenizer {config.tokenizer} has no <s>; set add_bos=False")
    read_from = inputs(config)
    files.clear(workdir, OUTPUTS)

    facts: dict[str, Any] = {}
    for part in ("train", "heldout"):
        total = made_from.facts[part]["documents"]
        if total:
            counts = _pack_split(config, tokenizer, part, total)
            if not counts.rows:
                raise UserError(f"{config.documents}: no {part} document fits into a row; raise row_length")
            facts[part] = dataclasses.asdict(counts) | {
                "lengths": dict(sorted(counts.lengths.items())),
                "padding_share": 1 - counts.tokens / (counts.rows * config.row_length),
                "bytes_per_token": counts.bytes / counts.text_tokens,
            }
    save(tokenizer, workdir / "tokenizer")

    seconds = time.monotonic() - began
    packed = sum(facts[part]["tokens"] for part in facts)
    figure = f"{facts['train']['rows']} rows, padding {facts['train']['padding_share']:.2%}"
    summary = {"seconds": round(seconds, 2), "tokens_per_second": round(packed / seconds, 1), "figure": figure}
    manifest.write(
        workdir,
        "rows",
        contents=[*facts, "tokenizer"],
        inputs=read_from,
        config=configs.identity(config),
        facts={
            "row_length": config.row_length,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "pad_id": tokenizer.pad_id,
            "bytes_per_token": facts["train"]["bytes_per_token"],
            **facts,
            "summary": summary,
        },
    )
    return summary


def _pack_split(config: PackConfig, tokenizer: Tokenizer, part: Split, total: int) -> Counts:
    counts = Counts()
    written = write(
        epath.Path(config.workdir) / part,
        _pieces(config, tokenizer, part, total, counts),
        vocab_size=tokenizer.vocab_size,
        row_length=config.row_length,
        window=config.window_documents,
        rows_per_file=config.rows_per_file,
        seed=config.seed,
    )
    counts.rows, counts.tokens, counts.target_tokens = written
    told = counts.documents, counts.split_documents, counts.dropped_documents, counts.rows
    logging.logger.info("pack: %s: %d documents (%d split, %d dropped) in %d rows", part, *told)
    return counts


def _pieces(config: PackConfig, tokenizer: Tokenizer, part: Split, total: int, counts: Counts) -> Iterator[rows.Piece]:
    before = [tokenizer.bos_id] if config.add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if config.add_eos else []
    with logging.progress(f"pack {part}", total) as progress:
        for number, document in enumerate(documents.read(config.documents, part)):
            progress.advance(1)
            text = tokenizer.encode(document.text)
            ids = [*before, *text, *after]
            long = len(ids) > config.row_length
            if len(ids) < 2 or (long and config.long_documents == "drop"):
                counts.dropped_documents += 1
                continue
            counts.documents += 1
            bound = 1 << max(4, (len(ids) - 1).bit_length())
            counts.lengths[bound] = counts.lengths.get(bound, 0) + 1
            counts.split_documents += long
            counts.bytes += len(document.text.encode())
            counts.text_tokens += len(text)
            yield from split(ids, number, config.row_length)
