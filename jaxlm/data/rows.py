"""Rows of tokens, in memory and on disk.

A row is `row_length` tokens, cut into segments, each a document or a piece of one, with padding at the end:

    ids          <s> a  b  c </s> <s> d  e </s> <pad> <pad>
    segment_ids   1  1  1  1  1    2  2  2  2    0     0        attention stays within a segment
    positions     0  1  2  3  4    0  1  2  3    0     0
    loss_mask     0  1  1  1  1    0  1  1  1    0     0        1: this token is a target, predicted from the one before

On disk a row is a header, its segments' lengths and documents, and its ids; the rest follows from these. Chats, of
which only the answers are targets, add a bit a token.
"""

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Bool, Int32

from jaxlm.base import files
from jaxlm.base.errors import UserError

_HEADER = struct.Struct("<BBH")  # version of this layout, bytes an id, number of segments
_VERSION, _WITH_TARGETS = 1, 2
MAX_SEGMENTS = 2**16 - 1


class Piece(NamedTuple):
    """A document's tokens, or a part of them: one segment of a row."""

    ids: np.ndarray
    document: int
    """Its place among the documents of its split, from 0."""
    targets: np.ndarray | None = None
    """bool, a token each: which of them are targets; None: all but the first. The first never is one."""


class Row(TypedDict):
    """Also the form of a batch, whose arrays are [B, S]."""

    ids: Int32[np.ndarray, " S"]
    segment_ids: Int32[np.ndarray, " S"]
    positions: Int32[np.ndarray, " S"]
    loss_mask: Bool[np.ndarray, " S"]


def encode(pieces: Sequence[Piece], vocab_size: int) -> bytes:
    """A row as it stands on disk: ids take 2 bytes each in a vocabulary of up to 65,536.

    Either all pieces have `targets` or none has.
    """
    bits = [piece.targets for piece in pieces if piece.targets is not None]
    assert len(bits) in (0, len(pieces))
    width = 2 if vocab_size <= 2**16 else 4
    kind = "<u2" if width == 2 else "<u4"
    return b"".join(
        [
            _HEADER.pack(_WITH_TARGETS if bits else _VERSION, width, len(pieces)),
            np.array([len(piece.ids) for piece in pieces], "<u4").tobytes(),
            np.array([piece.document for piece in pieces], "<u4").tobytes(),
            *(np.asarray(piece.ids).astype(kind).tobytes() for piece in pieces),
            np.packbits(np.concatenate(bits)).tobytes() if bits else b"",
        ]
    )


def decode(record: bytes) -> list[Piece]:
    """The inverse of `encode`; ids are int32."""
    version, width, count = _HEADER.unpack_from(record)
    if version not in (_VERSION, _WITH_TARGETS):
        raise UserError(
            f"rows of layout {version}; this jaxlm reads up to {_WITH_TARGETS}: pack again, or update jaxlm"
        )
    lengths, documents = np.frombuffer(record, "<u4", 2 * count, _HEADER.size).reshape(2, count)
    ends = np.cumsum(lengths)
    total, begin = int(lengths.sum()), _HEADER.size + 8 * count
    ids = np.frombuffer(record, "<u2" if width == 2 else "<u4", total, begin).astype(np.int32)
    targets = None
    if version == _WITH_TARGETS:
        targets = np.unpackbits(np.frombuffer(record, np.uint8, offset=begin + width * total), count=total).astype(bool)
    return [
        Piece(ids[end - n : end], int(d), None if targets is None else targets[end - n : end])
        for end, n, d in zip(ends, lengths, documents, strict=True)
    ]


def expand(pieces: Sequence[Piece], row_length: int, pad_id: int, excluded: Sequence[bool] = ()) -> Row:
    """The arrays that training takes. No pieces give a row of padding; `excluded` ones are padding in their place."""
    row = Row(
        ids=np.full(row_length, pad_id, np.int32),
        segment_ids=np.zeros(row_length, np.int32),
        positions=np.zeros(row_length, np.int32),
        loss_mask=np.zeros(row_length, np.bool_),
    )
    start = 0
    for number, piece in enumerate(pieces, 1):
        end = start + len(piece.ids)
        if excluded and excluded[number - 1]:
            start = end
            continue
        row["ids"][start:end] = piece.ids
        row["segment_ids"][start:end] = number
        row["positions"][start:end] = np.arange(end - start)
        row["loss_mask"][start + 1 : end] = True if piece.targets is None else piece.targets[1:]
        start = end
    return row


class RowWriter:
    """An ArrayRecord file of encoded rows."""

    def __init__(self, path: epath.Path):
        self.path, self.rows = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One record a group: the fastest random access. Its compression still saves a third over bare uint16.
            self._writer = ArrayRecordWriter(_local(path), "group_size:1")
        except (OSError, RuntimeError) as error:
            raise _cannot_write(path, error) from error

    def write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except (OSError, RuntimeError) as error:
            raise _cannot_write(self.path, error) from error
        self.rows += 1

    def close(self) -> None:
        try:
            self._writer.close()
        except (OSError, RuntimeError) as error:
            raise _cannot_write(self.path, error) from error


class RowReader:
    """Encoded rows of one or more ArrayRecord files, by random access; safe to use from several threads."""

    def __init__(self, paths: Sequence[epath.Path]):
        self._names = ", ".join(path.name for path in paths)
        self._folder = paths[0].parent
        try:
            self._source = ArrayRecordDataSource([_local(path) for path in paths])
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._source[index]
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        self._source.__exit__(None, None, None)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self._folder}: {self._names}: cannot be read: {error}; pack again")


def _local(path: epath.Path) -> str:
    """ArrayRecord opens files itself and knows local ones only."""
    name = os.fspath(path)
    if "://" in name:
        raise UserError(f"{name}: token rows must stand on a file system; mount the bucket (Cloud Storage FUSE)")
    return name


def _cannot_write(path: epath.Path, error: Exception) -> UserError:
    if isinstance(error, OSError):
        return files.cannot_write(path, error)
    return UserError(f"{path}: cannot be written: {error}")
