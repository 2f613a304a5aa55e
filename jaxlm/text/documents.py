"""Folders of clean documents: SPLIT/part-00000.jsonl.gz, an object a line: {"text", "source", "id"}."""

import contextlib
import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.text.config import Split


class Document(NamedTuple):
    text: str
    source: str
    """The source's name, or what a function of the format python says."""
    id: str
    """SOURCE:NUMBER, the number being the record's place among all that was read of the source."""


class ShardWriter:
    """Writes one split's documents, a new shard every `shard_bytes` of text, and counts them.

    The shards hold no time stamp, so the same documents give the same files; `sha256` is that of the uncompressed
    lines and so does not depend on the zlib version either.
    """

    def __init__(self, folder: epath.Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.sources: dict[str, dict[str, int]] = {}
        self._digest = hashlib.sha256()
        self._shard = -1
        self._left = 0
        self._file = self._gzip = None

    def write(self, document: Document) -> None:
        size = len(document.text.encode())
        line = json.dumps(document._asdict(), ensure_ascii=False).encode() + b"\n"
        try:
            if self._left <= 0:
                self._next_shard()
            assert self._gzip is not None
            self._gzip.write(line)
        except OSError as error:
            raise files.cannot_write(self.folder, error) from error
        self._left -= size
        self._digest.update(line)
        counts = self.sources.setdefault(document.source, {"documents": 0, "characters": 0, "bytes": 0})
        counts["documents"] += 1
        counts["characters"] += len(document.text)
        counts["bytes"] += size

    def facts(self) -> dict:
        """Counts in all and by source, and the corpus's sha256."""
        total = {key: sum(s[key] for s in self.sources.values()) for key in ("documents", "characters", "bytes")}
        return total | {"sha256": self._digest.hexdigest(), "sources": dict(sorted(self.sources.items()))}

    def _next_shard(self) -> None:
        self.close()
        self._shard += 1
        self._left = self.shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"part-{self._shard:05d}.jsonl.gz").open("wb")
        self._gzip = gzip.GzipFile(filename="", mode="wb", fileobj=self._file, compresslevel=6, mtime=0)

    def close(self) -> None:
        """Ends the shard; the file is closed even where a full disk keeps gzip from writing its end."""
        open_files, self._file, self._gzip = (self._file, self._gzip), None, None
        try:
            with contextlib.ExitStack() as stack:
                for file in open_files:
                    if file is not None:
                        stack.callback(file.close)
        except OSError as error:
            raise files.cannot_write(self.folder, error) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read(folder: epath.PathLike, split: Split) -> Iterator[Document]:
    """The documents of a split of a prepare folder, in order. Nothing for a split that is not there."""
    for path in sorted((epath.Path(folder) / split).glob("part-*.jsonl.gz")):
        done = 0
        try:
            with path.open("rb") as file, gzip.open(file) as lines:
                for line in lines:
                    yield Document(**json.loads(line))
                    done += 1
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise UserError(f"{path}: is damaged after document {done} ({error}); run prepare again") from error
