import gzip
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.text.clean import Reason, parts
from jaxlm.text.config import SourceConfig
from jaxlm.text.readers import inputs, read, read_objects

TEXTS = ["first text", "zweiter, ü", "третий\nс новой строки", "第四"]
LINES = b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in TEXTS)


def records(path, max_bytes=10_000, **more):
    return list(read(SourceConfig(name="mine", path=str(path), **more), max_bytes))


def test_plain_gzip_and_zstandard_give_the_same_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(frame(LINES[:50]) + frame(LINES[50:]))  # two frames, cut inside a line
    found = records(tmp_path)
    assert [r.outcome for r in found] == TEXTS * 3
    assert [r.where for r in found[:4]] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert found[11].where == f"{tmp_path}/c.jsonl.zst:4"
    assert {r.source for r in found} == {"mine"}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_off_file_is_an_error_and_not_its_end(tmp_path, ending):
    many = LINES * 2000
    packed = gzip.compress(many) if ending == ".gz" else zstandard.ZstdCompressor().compress(many)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(UserError, match=r"a\.jsonl.*cut off"):
        records(path)


BAD = {
    b'{"text": "x"': "malformed_json",
    b"[" * 100_000: "malformed_json",
    b'{"text": "caf\xe9"}': "broken_utf8",
    b'["text"]': "not_a_json_object",
    b'{"content": "x"}': "no_text_field",
    b'{"text": null}': "text_not_a_string",
    b'{"text": "\\ud83d"}': "lone_surrogate",
    b'{"text": "' + b"x" * 200_000 + b'"}': "longer_than_max_record_bytes",
}


def test_bad_lines_have_a_reason_and_do_not_disturb_the_others(tmp_path):
    good = b'{"text": "good"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + b"\n".join(line + b"\r\n" + good for line in BAD))
    found = records(path, max_bytes=150_000)
    bad = [r for r in found if isinstance(r.outcome, Reason)]
    assert [r.outcome.name for r in bad] == list(BAD.values())
    assert all(r.outcome.bad for r in bad)
    assert [int(r.where.rsplit(":")[-1]) for r in bad] == list(range(3, 3 + 2 * len(BAD), 2))
    assert [r.outcome for r in found if r not in bad] == ["good"] * (len(BAD) + 1)


def test_a_text_file_is_one_document_and_a_folder_is_read_by_endings(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a\n\nb\n")
    (tmp_path / "deep" / "er" / "b.md").write_text("# title\n")
    (tmp_path / "deep" / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.pdf").write_text("no")
    assert [r.outcome for r in records(tmp_path)] == ["a\n\nb\n", Reason("broken_utf8", bad=True), "# title\n"]
    assert [r.outcome for r in records(tmp_path, format="markdown")] == ["# title\n"]
    assert [r.outcome for r in records(tmp_path / "*.txt")] == ["a\n\nb\n"]
    with pytest.raises(UserError, match=r"sources\.mine\.path.*notes\.pdf ends in none of"):
        records(tmp_path / "notes.pdf")
    with pytest.raises(UserError, match="no such file"):
        records(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="no file matches"):
        records(tmp_path / "*.jsonl")
    with pytest.raises(UserError, match="holds no file that ends in"):
        records(tmp_path, format="parquet")


def test_a_long_text_is_cut_at_blank_lines(tmp_path):
    text = "One.\nTwo.\n\nThree is long,\nand goes on\nfor lines.\n  \n\nFour.\n\nFive."
    assert list(parts(text, 18)) == [
        "One.\nTwo.\n\n",
        "Three is long,\n",
        "and goes on\n",
        "for lines.\n  \n\n",
        "Four.\n\nFive.",
    ]
    for characters in (1, 7, 18, 30, 1000):
        assert "".join(parts(text, characters)) == text
    (tmp_path / "a.txt").write_text(text)
    found = records(tmp_path / "a.txt", part_characters=18)
    assert [r.outcome for r in found] == list(parts(text, 18))
    assert [r.where for r in found] == [f"{tmp_path}/a.txt:{n}" for n in range(1, 6)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([*TEXTS, None], pa.string()).cast(kind), "n": list(range(5))}), path)
    assert [r.outcome for r in records(path)] == [*TEXTS, Reason("text_not_a_string", bad=True)]
    assert records(path)[1].where == f"{path}:2"
    with pytest.raises(UserError, match=r"no column 'txt'; did you mean 'text'"):
        records(path, text_field="txt")
    with pytest.raises(UserError, match="holds int64, not strings"):
        records(path, text_field="n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet: is not a whole Parquet file"):
        records(path)


def test_array_record(tmp_path):
    path = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for line in [*LINES.splitlines(), b"{"]:
        writer.write(line)
    writer.close()
    *good, bad = [r.outcome for r in records(path)]
    assert good == TEXTS
    assert isinstance(bad, Reason)
    assert (bad.name, bad.bad, bad.detail[:9]) == ("malformed_json", True, "Expecting")
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(UserError, match="is not a whole ArrayRecord file"):
        records(path)


def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"text": text, "n": i}) for i, text in enumerate(TEXTS))

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = records("tiny", format="tfds", tfds_folder=str(tmp_path))
    assert sorted(r.outcome for r in found) == sorted(TEXTS)  # TFDS shuffles by key
    assert found[0].where == "tiny/1.0.0:0"
    assert len(records("tiny", format="tfds", tfds_folder=str(tmp_path), tfds_split="train[:2]")) == 2
    with pytest.raises(UserError, match=r"sources\.mine\.path: Dataset nope not found"):
        records("nope", format="tfds", tfds_folder=str(tmp_path))
    with pytest.raises(UserError, match=r"sources\.mine: tiny/1\.0\.0: Unknown split 'test'"):
        records("tiny", format="tfds", tfds_folder=str(tmp_path), tfds_split="test")
    with pytest.raises(UserError, match=r"sources\.mine\.text_field.*has no 'txt'; did you mean 'text'"):
        records("tiny", format="tfds", tfds_folder=str(tmp_path), text_field="txt")


def test_inputs_name_every_file_with_its_hash(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = SourceConfig(name="mine", path=str(tmp_path))
    before = inputs(source)
    assert list(before) == [f"{tmp_path}/a.txt"]
    (tmp_path / "a.txt").write_text("b")
    assert inputs(source) != before
    docs = SourceConfig(name="docs", format="python", path="json:loads", modules=("json", "numpy.linalg"))
    assert inputs(docs)["installed:json"].startswith("python 3.")
    assert inputs(docs)["installed:numpy.linalg"] == f"numpy {np.__version__}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "python", "path": "module"}, "path: got 'module'"),
        ({"format": "jsonl"}, "path: is empty"),
        ({"path": "a", "modules": ("json",)}, "modules: are read by"),
        ({"name": "a/b", "path": "x"}, "name: got 'a/b'"),
    ],
)
def test_sources_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**{"name": "mine", **fields})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield {}['x']", r"sources\.mine\.path: makers:make raised KeyError: 'x'"),
        ("raise ValueError('no')", r"sources\.mine\.path: makers:make raised ValueError: no"),
    ],
)
def test_what_a_users_function_raises_names_its_source(tmp_path, monkeypatch, body, message):
    (tmp_path / "makers.py").write_text(f"def make(modules, split):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "makers", raising=False)
    with pytest.raises(UserError, match=message):
        list(read_objects(SourceConfig(name="mine", format="python", path="makers:make"), 1000))


def test_what_a_users_function_yields_must_be_objects(tmp_path, monkeypatch):
    (tmp_path / "makers.py").write_text("def make(modules, split):\n    return [{'text': split}, 'a text']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "makers", raising=False)
    found = list(read_objects(SourceConfig(name="mine", format="python", path="makers:make"), 1000))
    assert [record.value for record in found] == [{"text": "train"}, Reason("not_a_json_object", bad=True)]
    assert found[1].raw == "'a text'"
