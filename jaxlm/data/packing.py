"""Documents into rows of fixed length: whole ones side by side, so that little is padding.

Best-fit decreasing, a window of documents at a time: the window's pieces are placed longest first, each into the row
with the least room that it fits. Rows stay open over the windows, so the short pieces of one fill what the last left.
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling", where it does better than cutting a stream of text.)
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxlm.data.rows import MAX_SEGMENTS, Piece, RowReader, RowWriter, encode

UNSHUFFLED = "unshuffled.array_record"
MAX_OPEN_ROWS = 1024
MIN_PIECE = 2  # tokens; a piece of one has no target


def split(ids: Sequence[int], document: int, row_length: int) -> list[Piece]:
    """A document as pieces of at most `row_length` tokens.

    Each piece begins with the last token of the one before it, whose loss mask is 0 there: so every token but the
    document's first is a target exactly once.

    >>> [piece.ids.tolist() for piece in split([1, 5, 6, 7, 8, 2], 0, row_length=4)]
    [[1, 5, 6, 7], [7, 8, 2]]
    """
    array = np.asarray(ids, np.int32)
    starts = range(0, max(1, len(array) - 1), row_length - 1)
    return [Piece(array[start : start + row_length], document) for start in starts]


def pack(pieces: Iterable[Piece], row_length: int, window: int) -> Iterator[list[Piece]]:
    """The pieces, each in one row. The rows depend on the order of the pieces and on nothing else."""
    rows: dict[int, list[Piece]] = {}
    room: list[tuple[int, int]] = []  # of each open row, (tokens left, row), sorted
    made = 0

    for group in _windows(pieces, window):
        for piece in sorted(group, key=lambda p: -len(p.ids)):
            size = len(piece.ids)
            assert size <= row_length, f"a piece of {size} tokens in rows of {row_length}"
            at = bisect.bisect_left(room, (size, -1))
            if at < len(room):
                left, row = room.pop(at)
            else:
                left, row, made = row_length, made, made + 1
                rows[row] = []
            rows[row].append(piece)
            slot = (left - size, row)
            if slot[0] < MIN_PIECE or len(rows[row]) == MAX_SEGMENTS:
                yield rows.pop(slot[1])
            else:
                bisect.insort(room, slot)
        while len(room) > MAX_OPEN_ROWS:
            yield rows.pop(room.pop(0)[1])
    for slot in room:
        yield rows.pop(slot[1])


class Written(NamedTuple):
    """What `write` came to."""

    rows: int
    tokens: int
    """all but padding"""
    target_tokens: int


def write(
    folder: epath.Path,
    pieces: Iterable[Piece],
    *,
    vocab_size: int,
    row_length: int,
    window: int,
    rows_per_file: int,
    seed: int,
) -> Written:
    """Packs pieces into folder/rows-00000.array_record, …, in an order of the rows that is drawn by the seed.

    First into one file, whose rows are then copied to the final ones: so memory holds one window of documents, however
    large the corpus. Shuffled, any first rows are a fair sample; packed order begins with the longest documents.
    """
    tokens = targets = 0
    unshuffled = RowWriter(folder / UNSHUFFLED)
    for row in pack(pieces, row_length, window):
        unshuffled.write(encode(row, vocab_size))
        tokens += sum(len(piece.ids) for piece in row)
        targets += sum(len(p.ids) - 1 if p.targets is None else int(p.targets[1:].sum()) for p in row)
    unshuffled.close()
    if unshuffled.rows:
        reader = RowReader([unshuffled.path])
        order = np.random.default_rng(seed).permutation(unshuffled.rows)
        for number, start in enumerate(range(0, unshuffled.rows, rows_per_file)):
            writer = RowWriter(folder / f"rows-{number:05d}.array_record")
            for index in order[start : start + rows_per_file]:
                writer.write(reader[int(index)])
            writer.close()
        reader.close()
    unshuffled.path.unlink()
    return Written(unshuffled.rows, tokens, targets)


def _windows(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == size:
            yield group
            group = []
    yield group
