"""How well a model predicts documents: loss, accuracy, bits per byte, each with its uncertainty; and xz beside it.

    sums = measure(definition, params, rows, row_length=1024, bytes_of=tokenizer.token_bytes(), batch_rows=8)
    figures(sums)["bits_per_byte"]                # {"value": 1.92, "interval": [1.85, 1.99]}

Bits per byte are the nats of all targets, end-of-text tokens included, over ln 2 and the UTF-8 bytes that the targets
stand for, which are the documents' own bytes. A document longer than a row is read in pieces, each of which knows only
the last token of the piece before: figures depend on the row length, and are compared at the same one.
"""

import dataclasses
import itertools
import lzma
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.base.logging import Progress
from jaxlm.data import packing
from jaxlm.data import rows as token_rows
from jaxlm.data.rows import Piece
from jaxlm.evaluate.intervals import ratio
from jaxlm.model.weights import Definition, Params
from jaxlm.sample.scoring import token_scores
from jaxlm.tokenizer.tokenizer import Tokenizer

# Documents whose pieces are sorted by length at a time, as in data/config.py.
PACKING_WINDOW = 1024


@dataclasses.dataclass
class DocumentSums:
    """Sums over the targets of one document."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    correct: int = 0


def measure(
    definition: Definition,
    params: Params,
    rows: Iterable[Sequence[Piece]],
    *,
    row_length: int,
    bytes_of: np.ndarray,
    batch_rows: int,
    progress: Progress | None = None,
) -> dict[int, DocumentSums]:
    """Document number → its sums, over packed rows of any number of documents.

    `bytes_of` is the tokenizer's `token_bytes()`. The targets are a piece's own, or every token but its first.
    """
    sums: dict[int, DocumentSums] = defaultdict(DocumentSums)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_rows)):
        made = [token_rows.expand(pieces, row_length, 0) for pieces in [*batch, *[[]] * (batch_rows - len(batch))]]
        ids, segments, positions = (
            np.stack([row[name] for row in made]) for name in ("ids", "segment_ids", "positions")
        )
        scores = jax.device_get(token_scores(definition, params, ids, segments, positions))
        if progress is not None:
            progress.advance(len(batch))
        for number, pieces in enumerate(batch):
            start = 0
            for piece in pieces:
                counted = np.ones(len(piece.ids) - 1, bool) if piece.targets is None else piece.targets[1:]
                targets = slice(start + 1, start + len(piece.ids))
                document = sums[piece.document]
                document.nats -= float(np.sum(scores.logprobs[number, targets][counted], dtype=np.float64))
                document.tokens += int(counted.sum())
                document.bytes += int(bytes_of[piece.ids[1:]][counted].sum())
                document.correct += int(scores.correct[number, targets][counted].sum())
                start += len(piece.ids)
    return dict(sums)


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, row_length: int) -> Iterator[list[Piece]]:
    """The texts as rows, as the pack stage makes them: BOS (where there is one), the text, EOS."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pieces = (
        piece
        for number, text in enumerate(texts)
        for piece in packing.split([*before, *tokenizer.encode(text), tokenizer.eos_id], number, row_length)
    )
    return packing.pack(pieces, row_length, PACKING_WINDOW)


def figures(sums: dict[int, DocumentSums]) -> dict[str, Any]:
    """Counts, and each figure with its 95 % interval over documents (None for a single one)."""
    each = list(sums.values())
    columns = {
        f.name: np.array([getattr(d, f.name) for d in each], np.float64) for f in dataclasses.fields(DocumentSums)
    }
    return {
        "documents": len(each),
        "tokens": int(columns["tokens"].sum()),
        "bytes": int(columns["bytes"].sum()),
        "loss": ratio(columns["nats"], columns["tokens"]),
        "bits_per_byte": ratio(columns["nats"] / math.log(2), columns["bytes"]),
        "accuracy": ratio(columns["correct"], columns["tokens"]),
    }


def by_label(sums: Mapping[int, DocumentSums], labels: Mapping[int, Mapping[str, str]]) -> dict[str, Any]:
    """ "by_source" and "by_language": name → documents, bytes and bits per byte, where there are several names.

    `labels` are the documents' own, such as {0: {"source": "books", "language": "ru"}}.
    """
    found = {}
    for kind in ("source", "language"):
        groups: dict[str, dict[int, DocumentSums]] = defaultdict(dict)
        for number, document in sums.items():
            groups[labels.get(number, {}).get(kind, "")][number] = document
        if len(groups) > 1:
            each = {name: figures(some) for name, some in sorted(groups.items())}
            kept = ("documents", "bytes", "bits_per_byte")
            found[f"by_{kind}"] = {name or "unknown": {key: f[key] for key in kept} for name, f in each.items()}
    return found


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits a byte of the texts, one after the other, as `xz -9` packs them."""
    compressor = lzma.LZMACompressor(preset=9)
    given = packed = 0
    for text in texts:
        content = text.encode()
        given += len(content)
        packed += len(compressor.compress(content))
    packed += len(compressor.flush())
    return 8 * packed / given
