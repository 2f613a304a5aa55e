"""Exact duplicates."""

import hashlib

from jaxlm.text.clean import Reason


class Deduplicator:
    """A rule that drops a document whose text, apart from white space, it has seen before.

    It holds 16 bytes of hash a document, about 100 bytes in Python: ten million documents take 1 GB.
    """

    def __init__(self):
        self._seen: set[bytes] = set()

    def __call__(self, text: str) -> str | Reason:
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if digest in self._seen:
            return Reason("duplicate")
        self._seen.add(digest)
        return text
