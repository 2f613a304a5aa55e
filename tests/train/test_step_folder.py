import tempfile

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.train import step_folder
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.step_folder import Damaged, StepManifest


def make(folder: epath.Path, step: int, metric: float | None = None) -> epath.Path:
    """A whole step with a small file (hashed) and a large one (size only)."""
    made = folder / str(step)
    step_folder.begin(made)
    (made / "state").mkdir()
    (made / "state" / "small").write_bytes(b"index")
    (made / "state" / "large").write_bytes(bytes(step_folder.HASHED_BYTES + 1))
    manifest = StepManifest(step=step, arrays={}, layout={}, identity={}, metric=metric, extra={"at": step})
    step_folder.commit(made, manifest)
    return made


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path)


def test_a_step_is_unfinished_until_its_manifest_stands(folder):
    step_folder.begin(folder / "1")
    assert step_folder.is_unfinished(folder / "1")
    made = make(folder, 2)
    assert not step_folder.is_unfinished(made)
    assert step_folder.read_and_verify(made).extra == {"at": 2}
    # A complete state whose manifest is lost is damage, not an unfinished save.
    (made / "manifest.json").unlink()
    assert not step_folder.is_unfinished(made)


def test_damage_is_named(folder):
    made = make(folder, 1)
    (made / "state" / "small").write_bytes(b"indes")
    step_folder.read(made)
    with pytest.raises(Damaged, match="small: its content is not what was written"):
        step_folder.read_and_verify(made)
    (made / "state" / "large").write_bytes(b"")
    with pytest.raises(Damaged, match=r"large: has 0 bytes; 65537 were written"):
        step_folder.read(made)
    (made / "state" / "large").unlink()
    with pytest.raises(Damaged, match="large: is missing"):
        step_folder.read(made)


def test_a_newer_format_is_no_damage_but_refused(folder):
    made = make(folder, 1)
    text = (made / "manifest.json").read_text()
    (made / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(UserError, match="has format_version 3"):
        step_folder.read(made)


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"keep_last": 1, "keep_best": 0}, {9}),
        ({"keep_last": 3, "keep_best": 0}, {7, 8, 9}),
        ({"keep_last": 1, "keep_best": 2}, {2, 3, 9}),
        ({"keep_last": 1, "keep_best": 2, "best": "highest"}, {1, 4, 9}),
        ({"keep_last": 1, "keep_best": 0, "keep_every_steps": 4}, {4, 8, 9}),
        ({"keep_last": 99, "keep_best": 0}, set(range(1, 10))),
    ],
)
def test_which_steps_stay(options, stays):
    # Of equal metrics the newer counts as the better.
    metrics = {1: 9.0, 2: 1.0, 3: 2.0, 4: 8.0, 5: None, 6: 5.0, 7: None, 8: 5.0, 9: None}
    assert step_folder.kept(metrics, CheckpointConfig(**options)) == stays


def test_a_sweep_leaves_at_least_one_whole_step(folder):
    config = CheckpointConfig(keep_last=1, keep_best=0)
    for step in (1, 2, 3):
        make(folder, step)
    (folder / "3" / "state" / "large").unlink()
    assert step_folder.newest_whole(folder) == 2
    assert step_folder.sweep(folder, config, set()) == [1, 3]
    (folder / "2" / "manifest.json").write_text("{")
    assert step_folder.sweep(folder, config, set()) == []
    assert step_folder.list_steps(folder) == [2]
    assert step_folder.newest_whole(folder) is None


def test_a_sweep_removes_the_abandoned_and_the_unfinished(folder):
    for step in (1, 2, 8, 9):
        make(folder, step)
    step_folder.begin(folder / "3")
    assert step_folder.sweep(folder, CheckpointConfig(keep_last=2, keep_best=0), {8, 9}) == [3, 8, 9]


@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["whole", "cut", "gone", "unfinished"])), max_size=6),
    keep_last=st.integers(1, 3),
    keep_best=st.integers(0, 2),
    keep_every=st.integers(0, 4),
    abandoned=st.sets(st.integers(1, 9), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_retention_never_removes_the_last_whole_step(steps, keep_last, keep_best, keep_every, abandoned):
    """Whatever is damaged, cut off or abandoned, and whatever is kept: the newest whole step is there afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        states = dict(steps)
        for step, how in states.items():
            made = make(folder, step, metric=float(step % 3))
            if how == "cut":
                (made / "state" / "large").write_bytes(b"")
            elif how == "gone":
                (made / "manifest.json").unlink()
            elif how == "unfinished":
                (made / "manifest.json").unlink()
                (made / "unfinished").write_text("")
        whole = [step for step, how in states.items() if how == "whole" and step not in abandoned]
        config = CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every_steps=keep_every)
        removed = step_folder.sweep(folder, config, abandoned)
        if whole:
            assert step_folder.newest_whole(folder) == max(whole)
        else:
            assert removed == []


def test_a_manifest_cannot_lead_out_of_its_folder(folder):
    made = make(folder, 1)
    values = files.read_json(made / "manifest.json")
    values.pop("hash")
    values["files"] = {"../../secret": {"bytes": 1}}
    files.write_json(made / "manifest.json", values | {"hash": files.hash_json(values)})
    with pytest.raises(UserError, match="'../../secret' leads out of its folder"):
        step_folder.read(made)
