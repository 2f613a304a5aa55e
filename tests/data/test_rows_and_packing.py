import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import packing, rows
from jaxlm.data.config import PackConfig
from jaxlm.data.rows import Piece


def document(number, length):
    """Tokens that occur nowhere else, so that each can be traced."""
    return [number * 10_000 + i for i in range(length)]


def packed(lengths, row_length=16, window=8):
    pieces = [piece for n, size in enumerate(lengths) for piece in packing.split(document(n, size), n, row_length)]
    return list(packing.pack(pieces, row_length, window))


def test_a_row_as_a_picture():
    row = rows.expand([Piece(np.array([7, 8, 9]), 0), Piece(np.array([4, 5]), 1)], row_length=8, pad_id=3)
    assert row["ids"].tolist() == [7, 8, 9, 4, 5, 3, 3, 3]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row["loss_mask"].astype(int).tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert [row[name].dtype.name for name in row] == ["int32", "int32", "int32", "bool"]
    assert rows.expand([], 4, pad_id=3)["segment_ids"].tolist() == [0, 0, 0, 0]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 60), max_size=60), row_length=st.integers(8, 20), window=st.integers(1, 70))
def test_every_token_but_the_first_of_a_document_is_a_target_once(lengths, row_length, window):
    targets, segments = Counter(), defaultdict(int)
    for pieces in packed(lengths, row_length, window):
        row = rows.expand(pieces, row_length, pad_id=-1)
        targets.update(row["ids"][row["loss_mask"]].tolist())
        for number, piece in enumerate(pieces, 1):
            segments[piece.document] += 1
            inside = row["ids"][row["segment_ids"] == number]
            assert inside.tolist() == piece.ids.tolist()
            assert np.diff(inside).tolist() == [1] * (len(inside) - 1), "a piece is a run of its document"
    expected = [token for n, size in enumerate(lengths) for token in document(n, size)[1:]]
    assert targets == Counter(expected)
    for n, size in enumerate(lengths):
        assert (segments[n] == 1) == (size <= row_length), "only documents longer than a row are cut"


@settings(deadline=None)
@given(
    ids=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), max_size=5),
    vocab_size=st.sampled_from([2**16, 2**16 + 1, 2**20]),
)
def test_stored_rows_come_back(ids, vocab_size):
    pieces = [Piece(np.array(piece, np.int32), 70_000 + n) for n, piece in enumerate(ids)]
    stored = rows.encode(pieces, vocab_size)
    assert len(stored) == 4 + 8 * len(pieces) + (2 if vocab_size <= 2**16 else 4) * sum(map(len, ids))
    back = rows.decode(stored)
    assert [(p.ids.tolist(), p.document) for p in back] == [(p.ids.tolist(), p.document) for p in pieces]
    assert all(p.ids.dtype == np.int32 for p in back)


def test_a_row_of_a_later_layout_is_refused():
    stored = bytearray(rows.encode([Piece(np.array([1, 2]), 0)], 100))
    stored[0] = 9
    with pytest.raises(UserError, match="rows of layout 9; this jaxlm reads up to 2"):
        rows.decode(bytes(stored))


@pytest.mark.parametrize(("median", "row_length"), [(100, 512), (400, 1024), (1500, 1024), (300, 2048)])
def test_padding_is_under_three_percent_on_text_like_lengths(median, row_length):
    lengths = np.random.default_rng(0).lognormal(np.log(median), 1.0, 3000).astype(int) + 2
    made = packed(lengths, row_length, window=1000)
    used = sum(len(piece.ids) for row in made for piece in row)
    assert 1 - used / (len(made) * row_length) < 0.03


def test_packing_repeats_exactly_and_holds_no_more_rows_open_than_it_says(monkeypatch):
    lengths = np.random.default_rng(0).integers(9, 12, 500)  # no two fit into a row of 16
    first = [[p.document for p in row] for row in packed(lengths)]
    assert first == [[p.document for p in row] for row in packed(lengths)]
    assert len(first) == 500
    monkeypatch.setattr(packing, "MAX_OPEN_ROWS", 3)
    assert sorted(first) == sorted([p.document for p in row] for row in packed(lengths))


def test_a_piece_goes_where_it_leaves_least():
    lengths = [10, 12, 4, 5]  # rows of 16 with 6 and 4 left: 5 goes to the first, 4 to the second
    assert sorted(sorted(p.document for p in row) for row in packed(lengths)) == [[0, 3], [1, 2]]


def test_files_repeat_exactly_and_damage_is_found(tmp_path):
    stored = [rows.encode([Piece(np.arange(n, n + 400) % 1000, n)], 1000) for n in range(200)]
    for name in ("a", "b"):
        writer = rows.RowWriter(epath.Path(tmp_path) / f"{name}.array_record")
        for record in stored:
            writer.write(record)
        writer.close()
    a, b = (epath.Path(tmp_path) / f"{name}.array_record" for name in "ab")
    content = a.read_bytes()
    assert content == b.read_bytes()
    reader = rows.RowReader([a, b])
    assert [reader[i] for i in (0, 199, 200, 399)] == [stored[0], stored[199], stored[0], stored[199]]
    b.write_bytes(content[:9_000] + bytes([content[9_000] ^ 1]) + content[9_001:])
    reader = rows.RowReader([b])
    with pytest.raises(UserError, match=r"b\.array_record: cannot be read"):
        [reader[i] for i in range(200)]
    b.write_bytes(content[:70_000])
    with pytest.raises(UserError, match=r"b\.array_record: cannot be read"):
        rows.RowReader([b])


def test_rows_on_a_bucket_are_refused_with_the_way_out():
    with pytest.raises(UserError, match="mount the bucket"):
        rows.RowReader([epath.Path("gs://bucket/rows-00000.array_record")])


def test_a_failed_write_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        rows.RowWriter(epath.Path(tmp_path) / "file" / "rows.array_record")


@pytest.mark.parametrize(
    ("field", "value"), [("row_length", 4), ("window_documents", 0), ("rows_per_file", 0), ("documents", "")]
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}: "):
        dataclasses.replace(PackConfig(documents="a", tokenizer="b"), **{field: value})
