import time

import pytest
from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.text.documents import Document, ShardWriter, read

DOCUMENTS = [Document(f"текст {i}\n" * 20, f"source{i % 2}", f"a:{i}") for i in range(10)]


def write(folder, shard_bytes=1000):
    with ShardWriter(epath.Path(folder) / "train", shard_bytes) as shards:
        for document in DOCUMENTS:
            shards.write(document)
    return shards.facts()


def test_what_is_written_is_read_in_order_and_counted(tmp_path):
    facts = write(tmp_path)
    assert list(read(tmp_path, "train")) == DOCUMENTS
    assert list(read(tmp_path, "heldout")) == []
    assert len(list((tmp_path / "train").iterdir())) == 3  # 260 bytes each, a new shard after 1000
    assert facts["documents"] == 10
    assert facts["characters"] == sum(len(d.text) for d in DOCUMENTS)
    assert facts["bytes"] == sum(len(d.text.encode()) for d in DOCUMENTS)
    assert sum(s["documents"] for s in facts["sources"].values()) == 10


def test_files_are_the_same_at_another_time_and_the_hash_in_other_shards(tmp_path, monkeypatch):
    first = write(tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write(tmp_path / "b")
    for path in (tmp_path / "a" / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "train" / path.name).read_bytes()
    assert first == second == write(tmp_path / "c", shard_bytes=10**9)


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, shard_bytes=10**9)
    path = tmp_path / "train" / "part-00000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-00000\.jsonl\.gz: is damaged"):
        list(read(tmp_path, "train"))
