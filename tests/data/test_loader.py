import json
import threading

import numpy as np
import pytest
from etils import epath

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import rows
from jaxlm.data.loader import Loader, RowSource, heldout_batches
from jaxlm.data.rows import Piece

ROW_LENGTH = 8


def make_rows(folder, first_token, train=10, heldout=3, row_length=ROW_LENGTH, tokenizer="abc"):
    """A pack folder whose row i is full of the token first_token + i."""
    folder = epath.Path(folder)
    facts = {"row_length": row_length, "pad_id": 0, "tokenizer_hash": tokenizer}
    for split, count in (("train", train), ("heldout", heldout)):
        if count:
            writer = rows.RowWriter(folder / split / "rows-00000.array_record")
            for i in range(count):
                writer.write(rows.encode([Piece(np.full(row_length, first_token + i), i)], 1000))
            writer.close()
            facts[split] = {"rows": count}
    contents = [split for split in ("train", "heldout") if split in facts]
    manifest.write(folder, "rows", contents=contents, inputs={}, config={}, facts=facts)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("rows")
    return [make_rows(made / "a", 100), make_rows(made / "b", 200, train=7), make_rows(made / "c", 300, train=1)]


def tokens(batch):
    return batch["ids"][:, 0].tolist()


def test_a_batch_is_a_function_of_the_step(folders):
    sources = [(folders[0], 2.0), (folders[1], 1.0)]
    loader = Loader(sources, "train", global_batch=6, seed=1)
    in_order = [tokens(loader.batch(step)) for step in range(12)]
    again = Loader(sources, "train", global_batch=6, seed=1)
    assert [tokens(again.batch(step)) for step in reversed(range(12))] == in_order[::-1]
    assert [tokens(Loader(sources, "train", global_batch=6, seed=2).batch(s)) for s in range(12)] != in_order
    batch = loader.batch(3)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "ids": ((6, 8), "int32"),
        "segment_ids": ((6, 8), "int32"),
        "positions": ((6, 8), "int32"),
        "loss_mask": ((6, 8), "bool"),
    }
    for rows_of_step in in_order:
        assert sum(token < 200 for token in rows_of_step) == 4, "weights 2:1"


def test_each_epoch_holds_every_row_once_in_another_order(folders):
    loader = Loader([(folders[0], 1.0)], "train", global_batch=5, seed=0)
    epochs = [tokens(loader.batch(2 * e)) + tokens(loader.batch(2 * e + 1)) for e in range(4)]
    assert all(sorted(epoch) == list(range(100, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert loader.epochs(3) == [1.5]


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_the_global_batch_is_the_same_on_any_number_of_processes(folders, process_count):
    sources = [(folder, 1.0) for folder in folders]
    whole = Loader(sources, "train", global_batch=6, seed=0)
    parts = [
        Loader(
            sources,
            "train",
            global_batch=6,
            seed=0,
            own=range(6)[p * 6 // process_count : (p + 1) * 6 // process_count],
        )
        for p in range(process_count)
    ]
    for step in (0, 1, 17, 1_000_000):
        joined = np.concatenate([part.batch(step)["ids"] for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(step)["ids"])
    whole_held = list(heldout_batches(RowSource(folders[0], "heldout"), 6))
    held = [
        list(
            heldout_batches(
                RowSource(folders[0], "heldout"), 6, own=range(6)[p * 6 // process_count : (p + 1) * 6 // process_count]
            )
        )
        for p in range(process_count)
    ]
    np.testing.assert_array_equal(np.concatenate([h[0][0]["ids"] for h in held]), whole_held[0][0]["ids"])
    assert {h[0][1] for h in held} == {3}


def test_changed_weights_go_on_in_each_source_where_it_was(folders):
    sources = [(folders[0], 1.0), (folders[1], 1.0)]
    steady = Loader(sources, "train", global_batch=4, seed=0)
    changing = steady.with_history(((0, (1, 1)), (3, (3, 1)), (5, (0, 1))))
    assert [tokens(changing.batch(s)) for s in range(3)] == [tokens(steady.batch(s)) for s in range(3)]
    seen = [token for step in range(8) for token in tokens(changing.batch(step))]
    for folder, low in ((folders[0], 100), (folders[1], 200)):
        alone = Loader([(folder, 1.0)], "train", global_batch=1, seed=0)
        own = [token for token in seen if low <= token < low + 100]
        if low == 100:  # the first source's own order, whatever stands beside it
            assert own == [tokens(alone.batch(i))[0] for i in range(len(own))]
        size = len(RowSource(folder, "train"))
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size, "no row twice before all have come"
    assert all(token >= 200 for step in (5, 6, 7) for token in tokens(changing.batch(step)))


def test_the_iterator_gives_the_same_batches_from_any_step_and_ends_its_thread(folders):
    loader = Loader([(folders[0], 1.0)], "train", global_batch=4, seed=0, prefetch=3)
    before = threading.active_count()
    batches = loader.batches(5)
    for expected in range(5, 12):
        step, batch = next(batches)
        assert step == expected
        np.testing.assert_array_equal(batch["ids"], loader.batch(step)["ids"])
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(folders, monkeypatch):
    loader = Loader([(folders[0], 1.0)], "train", global_batch=4, seed=0)
    good = loader.batch

    def fails_at_two(step):
        if step == 2:
            raise UserError("the disk is gone")
        return good(step)

    monkeypatch.setattr(loader, "batch", fails_at_two)
    batches = loader.batches(0)
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(UserError, match="the disk is gone"):
        next(batches)


def test_heldout_rows_come_once_in_order_and_padding_counts_for_nothing(folders):
    source = RowSource(folders[0], "heldout")
    made = list(heldout_batches(source, 2))
    assert [real for _, real in made] == [2, 1]
    assert [tokens(batch) for batch, _ in made] == [[100, 101], [102, 0]]
    last = made[1][0]
    assert not last["loss_mask"][1].any()
    assert not last["segment_ids"][1].any()
    assert len(list(heldout_batches(source, 2, limit=1))) == 1


def test_sources_that_do_not_fit_are_refused(folders, tmp_path):
    def loader(*paths, **fields):
        return Loader([(path, 1.0) for path in paths], "train", **{"global_batch": 4, "seed": 0, **fields})

    longer = make_rows(tmp_path / "longer", 0, row_length=16)
    with pytest.raises(UserError, match=r"longer: has rows of 16 tokens, .* has rows of 8"):
        loader(folders[0], longer)
    other = make_rows(tmp_path / "other", 0, tokenizer="xyz")
    with pytest.raises(UserError, match="other: was packed with another tokenizer"):
        loader(folders[0], other)
    with pytest.raises(UserError, match="holds no heldout rows"):
        RowSource(make_rows(tmp_path / "empty", 0, heldout=0), "heldout")
    with pytest.raises(ConfigError, match="batch_rows: got 0; at least 1 is needed"):
        loader(folders[0], global_batch=0)
    with pytest.raises(ConfigError, match="history: has 1 weights a step for 2 sources"):
        loader(*folders[:2]).with_history(((0, (1.0,)),))
    with pytest.raises(ConfigError, match="data: is empty"):
        loader()
    with pytest.raises(UserError, match="does not exist"):
        loader(str(tmp_path / "gone"))


def test_cut_and_missing_files_are_named(tmp_path):
    folder = make_rows(tmp_path / "rows", 0)
    path = tmp_path / "rows" / "train" / "rows-00000.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train/rows-00000\.array_record: is missing or is not the \d+ bytes"):
        RowSource(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train/rows-00000\.array_record: is missing"):
        RowSource(folder, "train")
    values = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        RowSource(folder, "heldout")
