"""Texts to train a tokenizer on or to measure it by, and how well it fits them."""

import hashlib
from collections.abc import Iterable

from jaxlm.base.logging import progress
from jaxlm.text import documents
from jaxlm.tokenizer.tokenizer import Tokenizer


def sample(source: Iterable[documents.Document], total_bytes: int, sample_bytes: int, seed: int) -> list[str]:
    """Texts of about `sample_bytes` in all, each chosen by a hash of the seed and its id."""
    limit = min(1.0, sample_bytes / max(1, total_bytes)) * 2**64

    def chosen(document: documents.Document) -> bool:
        digest = hashlib.blake2b(f"{seed} {document.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < limit

    return [document.text for document in source if chosen(document)]


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Bytes a token over whole documents, and how many of these do not come back as they were."""
    size = tokens = changed = 0
    with progress("measure", len(texts)) as bar:
        for text in texts:
            ids = tokenizer.encode(text)
            changed += tokenizer.decode(ids) != text
            size += len(text.encode())
            tokens += len(ids)
            bar.advance(1)
    return {
        "documents": len(texts),
        "documents_changed": changed,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
    }
