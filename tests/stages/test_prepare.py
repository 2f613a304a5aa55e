import gzip
import json
import random
import resource
import string

import pytest

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.stages import prepare
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.text.documents import read

HELD = "a held out story about a fox that went over the hill and far away to see what it could see there"
OWN = "quite another story in which nobody goes anywhere and nothing at all is seen by anyone, number "


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def sources(tmp_path, train, heldout=(HELD,), **fields):
    return (
        SourceConfig(name="own", path=write_lines(tmp_path / "train.jsonl", train), **fields),
        SourceConfig(name="held", path=write_lines(tmp_path / "held.jsonl", heldout), split="heldout"),
    )


def run(tmp_path, **fields):
    prepare.main(PrepareConfig(workdir=str(tmp_path / "out"), **fields))
    return manifest.read(tmp_path / "out", "documents")


def test_kept_and_dropped_by_reason_is_read_and_the_report_says_why(tmp_path):
    mixed = [OWN + "1", OWN + "1 ", OWN + "2", "short", HELD.upper() + " or so", HELD, "x" * 3000, OWN + "\0 3"]
    made = run(tmp_path, sources=sources(tmp_path, mixed), max_characters=2000)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"duplicate": 2, "too_short": 1, "overlaps_heldout": 1, "too_long": 1}
    assert report["read"] == 9 == report["kept"] + sum(report["dropped"].values())
    assert made.facts["dropped"] == report["dropped"]
    assert report["sources"]["own"]["changed"] == {"control_characters": 1}
    example = report["sources"]["own"]["examples"]["overlaps_heldout"][0]
    assert example["where"].endswith("train.jsonl:5")
    assert example["text"] == (HELD.upper() + " or so")[:200]
    kept = list(read(tmp_path / "out", "train"))
    assert [(d.text, d.source, d.id) for d in kept] == [
        (OWN + "1", "own", "own:0"),
        (OWN + "2", "own", "own:2"),
        (OWN + " 3", "own", "own:7"),
    ]
    assert [d.text for d in read(tmp_path / "out", "heldout")] == [HELD]
    assert made.facts["train"]["bytes"] == sum(len(d.text.encode()) for d in kept)
    assert made.facts["train"]["documents"] == made.facts["train"]["sources"]["own"]["documents"] == 3
    manifest.verify(tmp_path / "out", made)


def test_the_same_input_gives_the_same_artifact_elsewhere(tmp_path):
    chosen = sources(tmp_path, [OWN + str(i) for i in range(50)])
    first = run(tmp_path, sources=chosen, shard_bytes=1000)
    (tmp_path / "out").rename(tmp_path / "before")
    second = run(tmp_path, sources=chosen, shard_bytes=1000)
    assert first.hash == second.hash
    assert first.files == second.files
    assert len([name for name in first.files if name.startswith("train/")]) > 3
    assert first.inputs == prepare.inputs(PrepareConfig(sources=chosen))


def test_an_unfinished_folder_is_started_over_and_strange_files_stay(tmp_path):
    out = tmp_path / "out" / "train"
    out.mkdir(parents=True)
    (out / "part-00007.jsonl.gz").write_bytes(b"left by a killed run")
    (out / "mine.txt").write_text("not prepare's")
    run(tmp_path, sources=sources(tmp_path, [OWN]))
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "part-00000.jsonl.gz"]


def test_too_many_bad_records_are_refused_and_kept_aside(tmp_path):
    chosen = sources(tmp_path, [OWN + str(i) for i in range(95)])
    with open(chosen[0].path, "ab") as file:
        file.write(b'{"text": "caf\xe9"}\n' * 4 + b"{\n")
    made = run(tmp_path, sources=chosen, max_bad_share=0.05)
    assert made.facts["train"]["documents"] == 95
    with pytest.raises(Refused, match=r"sources\.own: 5 of 100 records are bad \(broken_utf8 4, malformed_json 1\)"):
        run(tmp_path, sources=chosen, max_bad_share=0.04)
    with pytest.raises(UserError, match="not finished"):
        manifest.read(tmp_path / "out")
    with gzip.open(tmp_path / "out" / "rejects.jsonl.gz", "rt") as lines:
        rejects = [json.loads(line) for line in lines]
    assert rejects[0] == {
        "where": f"{chosen[0].path}:96",
        "reason": "broken_utf8",
        "record": '{"text": "caf\\xe9"}',
    }
    assert len(rejects) == 5


def test_a_small_bad_source_does_not_hide_behind_a_large_one(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n" * 3)
    chosen = (*sources(tmp_path, [OWN + str(i) for i in range(999)]), SourceConfig(name="bad", path=str(bad)))
    with pytest.raises(Refused, match=r"sources\.bad: 3 of 3 records are bad"):
        run(tmp_path, sources=chosen)


def test_empty_results_name_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no train document is left \(duplicate 1\)"):
        run(tmp_path, sources=sources(tmp_path, [HELD]))
    with pytest.raises(UserError, match=r"no heldout document is left \(too_short 1\)"):
        run(tmp_path, sources=sources(tmp_path, [OWN], heldout=["short"]))
    with pytest.raises(UserError, match=r"sources\.own: holds no record at all"):
        run(tmp_path, sources=sources(tmp_path, []))
    with pytest.raises(UserError, match=r"sources\.own\.path: no such file"):
        run(tmp_path, sources=(SourceConfig(name="own", path=str(tmp_path / "gone")),))


def test_held_out_texts_are_found_again_only_when_asked_for(tmp_path):
    chosen = sources(tmp_path, [OWN, HELD + " and more"])
    assert run(tmp_path, sources=chosen, ngram_words=0).facts["train"]["documents"] == 2
    assert run(tmp_path, sources=chosen, max_overlap_share=1.0).facts["train"]["documents"] == 2
    assert run(tmp_path, sources=chosen).facts["train"]["documents"] == 1


def test_a_full_disk_is_the_error_and_leaves_no_manifest(tmp_path):
    noise = random.Random(0)
    texts = ["".join(noise.choices(string.ascii_letters + " ", k=1000)) for _ in range(100)]
    chosen = sources(tmp_path, texts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond it
    try:
        with pytest.raises(UserError, match=r"out/train: cannot be written: File too large"):
            run(tmp_path, sources=chosen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(tmp_path, sources=chosen).facts["train"]["documents"] == 100


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"out: cannot be written"):
        run(tmp_path, sources=sources(tmp_path, [OWN]))


def test_a_share_of_a_source_is_held_out(tmp_path):
    texts = [OWN + str(n) for n in range(400)]
    source = SourceConfig(name="own", path=write_lines(tmp_path / "a.jsonl", [*texts, "short"]), heldout_share=0.1)
    run(tmp_path, sources=(source,), ngram_words=0)
    kept = {split: [d.text for d in read(tmp_path / "out", split)] for split in ("train", "heldout")}
    assert 25 < len(kept["heldout"]) < 60  # of 400: 40 ± 6
    assert sorted(kept["train"] + kept["heldout"]) == sorted(texts)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (401, 400, {"too_short": 1})
    # More of it are held out with a larger share; those that were stay so.
    wider = SourceConfig(name="own", path=source.path, heldout_share=0.3)
    run(tmp_path, sources=(wider,), ngram_words=0)
    assert {d.text for d in read(tmp_path / "out", "heldout")} > set(kept["heldout"])
    with pytest.raises(ConfigError, match="heldout_share: the source is held out as a whole"):
        SourceConfig(name="own", path="x", split="heldout", heldout_share=0.1)
