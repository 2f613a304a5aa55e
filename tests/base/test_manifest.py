"""Manifests and the files below them: unfinished, foreign, newer, damaged, and out of the folder."""

import json
import shutil

import pytest

from jaxlm.base import files, manifest
from jaxlm.base.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tokenizer"
    (folder / "parts").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "parts/b.txt").write_text("two")
    manifest.write(
        folder, "tokenizer", contents=["a.txt", "parts"], inputs={"x": "1" * 64}, config={"seed": 0}, facts={"n": 2}
    )
    return folder


def test_what_was_written_is_read(folder):
    found = manifest.read(folder, "tokenizer")
    assert found.files == {
        "a.txt": {"bytes": 3, "sha256": files.sha256(folder / "a.txt")},
        "parts/b.txt": {"bytes": 3, "sha256": files.sha256(folder / "parts/b.txt")},
    }
    assert found.facts == {"n": 2}
    assert found.versions["jax"] != "absent"
    manifest.verify(folder, found)


def test_the_hash_names_the_content_wherever_it_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert manifest.read(tmp_path / "copy").hash == manifest.read(folder).hash
    (tmp_path / "copy/a.txt").write_text("One")
    again = manifest.write(
        tmp_path / "copy",
        "tokenizer",
        contents=["a.txt", "parts"],
        inputs={"elsewhere": "1" * 64},
        config={"seed": 0},
        facts={},
    )
    assert again.hash != manifest.read(folder).hash


def change(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_used_is_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match=r"documents: .*nowhere: does not exist; python -m jaxlm prepare makes it"):
        manifest.read(tmp_path / "nowhere", "documents", "documents")
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match="is not finished"):
        manifest.read(tmp_path / "begun")
    with pytest.raises(UserError, match="holds tokenizer, but rows is needed here"):
        manifest.read(folder, "rows")
    change(folder, format_version=99)
    with pytest.raises(UserError, match="has format_version 99, this jaxlm reads up to 1; update jaxlm"):
        manifest.read(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not a jaxlm manifest"):
        manifest.read(folder)
    (folder / "manifest.json").write_text('{"kind": "tok')
    with pytest.raises(UserError, match="is not valid JSON"):
        manifest.read(folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "parts/b.txt").write_text("twO"), "parts/b.txt: its content differs"),
        (lambda folder: (folder / "a.txt").write_text("on"), "a.txt: its content differs"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt: is missing"),
    ],
)
def test_damage_is_named(folder, damage, problem):
    found = manifest.read(folder)
    damage(folder)
    with pytest.raises(UserError, match=problem):
        manifest.verify(folder, found)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "parts/../../x", "~/x", "a\\b"])
def test_names_that_lead_out_of_the_folder_are_refused(folder, name):
    change(folder, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(UserError, match="leads out of its folder"):
        manifest.verify(folder, manifest.read(folder))


def test_a_run_does_not_go_on_with_other_inputs(folder):
    manifest.keep_inputs(folder, {"rows": "1"})
    manifest.keep_inputs(folder, {"rows": "1"})
    with pytest.raises(UserError, match="began with another content of rows"):
        manifest.keep_inputs(folder, {"rows": "2"})


def test_half_a_file_never_has_its_name(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    files.write_json(target, {"old": 1})

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(files.epath.Path(target)), "write_bytes", full)
    with pytest.raises(UserError, match=r"x.json: cannot be written: No space left on device"):
        files.write_json(target, {"new": 2})
    assert json.loads(target.read_text()) == {"old": 1}
