import gc
import json
import os
import resource
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.train import step_folder
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig

MESH = make_mesh(MeshConfig(fsdp=4, tensor=2))
KEEP_ALL = CheckpointConfig(keep_last=100)


def make_state(seed: int, mesh=MESH, spec=("fsdp", "tensor")):
    """All dtypes that a training state has, nested, sharded and not, a scalar and an array without elements."""
    rng = np.random.default_rng(seed)
    state = {
        "params": {
            "kernel": rng.standard_normal((512, 512), np.float32),
            "scale": rng.standard_normal(7).astype(jnp.bfloat16),
        },
        "moments": (rng.integers(-128, 128, (5, 3), np.int8), rng.standard_normal(3).astype(np.float16)),
        "counts": [rng.integers(0, 2**32, 4, np.uint32), np.zeros((0, 2), np.float32)],
        "flags": rng.integers(0, 2, 6) > 0,
        "step": np.int32(seed),
    }
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec if x.size > 100 else ()))), state
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(a, b) -> bool:
    def as_bytes(x):
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        as_bytes(x) == as_bytes(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(autouse=True)
def _orbax_may_leave_callbacks_behind():
    """Orbax 0.12.8 closes its event loop when one read or write fails; the others then complain into the void."""
    warnings.filterwarnings("ignore", category=pytest.PytestUnraisableExceptionWarning)
    yield
    gc.collect()


def filled(folder, steps, config=KEEP_ALL, **options) -> Checkpointer:
    checkpoints = Checkpointer(folder, config, **options)
    for step in steps:
        assert checkpoints.save(step, make_state(step), extra={"seed": step})
        checkpoints.wait()
    return checkpoints


def steps_in(folder) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder))


def logged(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_what_is_restored_has_the_bits_structure_and_sharding_of_what_was_saved(tmp_path):
    filled(tmp_path, [3])
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert same_bits(restored.state, make_state(3))
    assert restored.state["params"]["kernel"].sharding == make_state(3)["params"]["kernel"].sharding
    assert (restored.step, restored.extra) == (3, {"seed": 3})


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [(MeshConfig(), ()), (MeshConfig(tensor=8), (None, "tensor")), (MeshConfig(fsdp=2, tensor=4), ("tensor",))],
)
def test_restores_onto_another_mesh(tmp_path, mesh, spec):
    filled(tmp_path, [3])
    wanted = abstract(make_state(0, make_mesh(mesh), spec))
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: wanted)
    assert restored is not None
    assert same_bits(restored.state, make_state(3))
    assert restored.state["params"]["kernel"].sharding == wanted["params"]["kernel"].sharding


def test_training_goes_on_and_donates_while_files_are_written(tmp_path):
    step = jax.jit(lambda w: w * 1.5, donate_argnums=0)
    checkpoints = Checkpointer(tmp_path, KEEP_ALL)
    weights, seen = (
        jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), NamedSharding(MESH, PartitionSpec("fsdp"))),
        {},
    )
    for at in range(4):
        seen[at] = np.array(weights)
        assert checkpoints.save(at, {"w": weights}, extra={})
        for _ in range(5):
            weights = step(weights)
    checkpoints.wait()
    for at, expected in seen.items():
        restored = checkpoints.restore(lambda _: {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}, step=at)
        assert restored is not None
        np.testing.assert_array_equal(restored.state["w"], expected)
        # A restored state can be donated too.
        np.testing.assert_array_equal(step(restored.state["w"]), expected * np.float32(1.5))


def test_an_empty_folder_restores_nothing(tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoints", KEEP_ALL)
    assert checkpoints.restore(lambda _: abstract(make_state(0))) is None
    assert checkpoints.latest_intact() is None


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, caplog):
    checkpoints = filled(tmp_path, [1])
    state = make_state(2)
    state["params"]["scale"] = state["params"]["scale"].at[3].set(jnp.inf)
    assert not checkpoints.save(2, state, extra={})
    assert checkpoints.wait() == 1
    assert steps_in(tmp_path) == [1]
    assert "step 2 is NOT saved: not finite: params/scale" in logged(caplog)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize(
    ("damage", "which"),
    [(damage, which) for damage in DAMAGES for which in ("data", "manifest.json")]
    + [("flipped", "_METADATA"), ("flipped", "manifest.ocdbt"), ("deleted", "_METADATA")],
)
def test_a_damaged_step_is_reported_and_the_one_before_is_taken(tmp_path, caplog, damage, which):
    filled(tmp_path, [1, 2])
    paths = [path for path in sorted((tmp_path / "2").rglob("*")) if path.is_file()]
    if which == "data":
        victim = max(paths, key=lambda path: path.stat().st_size)
        assert victim.stat().st_size > step_folder.HASHED_BYTES  # It holds pieces of the kernel.
    else:
        victim = next(path for path in paths if path.name == which)
    DAMAGES[damage](victim)
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert restored.step == 1
    assert same_bits(restored.state, make_state(1))
    assert "checkpoint of step 2 is DAMAGED" in logged(caplog)
    assert "taking step 1 instead" in logged(caplog)
    if (damage, which) == ("flipped", "data"):
        assert "do not have the checksum that was saved: params/kernel" in logged(caplog)


def test_exchanged_data_files_are_noticed(tmp_path, caplog):
    """Whole files of the right size, from another step: only the checksums can tell."""
    filled(tmp_path, [1, 2])
    (tmp_path / "2" / "state").rename(tmp_path / "old")
    (tmp_path / "1" / "state").rename(tmp_path / "2" / "state")
    (tmp_path / "old").rename(tmp_path / "1" / "state")
    manifest = json.loads((tmp_path / "2" / "manifest.json").read_text())
    manifest["files"] = {}
    forge(tmp_path / "2", manifest)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))
    assert "do not have the checksum that was saved: counts/0, flags" in logged(caplog)


def forge(folder, manifest):
    """Writes an edited manifest with the hash that belongs to it."""
    from jaxlm.base import files

    manifest.pop("hash", None)
    files.write_json(folder / "manifest.json", manifest | {"hash": files.hash_json(manifest)})


def test_an_edited_manifest_is_damage(tmp_path, caplog):
    filled(tmp_path, [1, 2])
    path = tmp_path / "2" / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 9'))
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert restored.step == 1
    assert "was edited or is damaged" in logged(caplog)


def test_no_whole_step_is_an_error_and_nothing_is_removed(tmp_path):
    filled(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / str(step) / "manifest.json").unlink()
    checkpoints = Checkpointer(tmp_path, KEEP_ALL)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoints.restore(lambda _: abstract(make_state(0)))
    assert checkpoints.latest_intact() is None
    assert steps_in(tmp_path) == [1, 2]


def test_a_save_that_was_cut_off_is_passed_over(tmp_path, caplog):
    filled(tmp_path, [1, 2])
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "2" / "unfinished").touch()
    (tmp_path / "3").mkdir()
    checkpoints = Checkpointer(tmp_path, KEEP_ALL)
    restored = checkpoints.restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert restored.step == 1
    assert "saving was cut off: step 2, 3" in logged(caplog)
    checkpoints.save(4, make_state(4), extra={})
    checkpoints.wait()
    assert steps_in(tmp_path) == [1, 4]


def test_a_cut_off_first_save_is_a_new_run(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "unfinished").touch()
    assert Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0))) is None


def change_shape(state):
    state["params"]["kernel"] = jax.ShapeDtypeStruct((512, 256), jnp.float32)


def change_dtype(state):
    state["params"]["scale"] = jax.ShapeDtypeStruct((7,), jnp.float32)


def drop(state):
    del state["flags"]


def add(state):
    state["more"] = jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, r"params/kernel: shape is \[512, 512\] in the checkpoint, \[512, 256\] here"),
        (change_dtype, "params/scale: dtype is bfloat16 in the checkpoint, float32 here"),
        (drop, "flags: is in the checkpoint only"),
        (add, "more: is not in the checkpoint"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path, change, message):
    filled(tmp_path, [1, 2])
    wanted = abstract(make_state(0))
    change(wanted)
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: wanted)


def test_another_config_or_tokenizer_is_refused_by_name(tmp_path):
    filled(tmp_path, [1], identity={"config": "a", "tokenizer": "b"})
    with pytest.raises(UserError, match="was made with another tokenizer;"):
        Checkpointer(tmp_path, KEEP_ALL, identity={"config": "a", "tokenizer": "c"}).restore(
            lambda _: abstract(make_state(0))
        )


def test_the_manifest_keeps_layout_and_identity(tmp_path):
    checkpoints = filled(tmp_path, [1], identity={"config": "a"}, layout={"scan": True})
    manifest = checkpoints.manifest(1)
    assert (manifest.layout, manifest.identity, manifest.extra) == ({"scan": True}, {"config": "a"}, {"seed": 1})
    assert manifest.arrays["params/scale"]["dtype"] == "bfloat16"


def test_a_newer_format_is_refused(tmp_path):
    filled(tmp_path, [1, 2])
    manifest = json.loads((tmp_path / "2" / "manifest.json").read_text())
    forge(tmp_path / "2", manifest | {"format_version": 99})
    with pytest.raises(UserError, match=r"2/manifest\.json: has format_version 99, this jaxlm reads up to 2"):
        Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))


def test_the_format_before_is_read(tmp_path):
    """Format 1 had no `halt`; it comes back as 0, which the loop sets anew."""
    filled(tmp_path, [1])
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    forge(tmp_path / "1", manifest | {"format_version": 1})
    wanted = abstract(make_state(0)) | {
        "halt": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(MESH, PartitionSpec()))
    }
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: wanted)
    assert restored is not None
    assert int(restored.state.pop("halt")) == 0
    assert same_bits(restored.state, make_state(1))
    forge(tmp_path / "1", manifest)
    with pytest.raises(UserError, match="halt: is not in the checkpoint"):
        Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: wanted)


def test_extra_that_json_would_change_is_refused(tmp_path):
    checkpoints = Checkpointer(tmp_path, KEEP_ALL)
    for extra in ({"best": float("nan")}, {"array": np.ones(2)}):
        with pytest.raises(TypeError, match="extra of a checkpoint must be plain JSON"):
            checkpoints.save(1, make_state(1), extra=extra)


def test_going_back_to_a_step_leaves_the_later_ones_behind(tmp_path):
    filled(tmp_path, [1, 2, 3])
    checkpoints = Checkpointer(tmp_path, KEEP_ALL)
    assert checkpoints.restore(lambda _: abstract(make_state(0)), step=1) is not None
    checkpoints.save(2, make_state(20), extra={})
    checkpoints.wait()
    assert steps_in(tmp_path) == [1, 2]
    restored = Checkpointer(tmp_path, KEEP_ALL).restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert same_bits(restored.state, make_state(20))


def test_asking_for_a_step_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 7; there are 2, 1"):
        filled(tmp_path, [1, 2]).restore(lambda _: abstract(make_state(0)), step=7)


def test_retention_counts_only_whole_steps(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=0)
    checkpoints = filled(tmp_path, [1, 2], config)
    DAMAGES["cut off"](tmp_path / "2" / "manifest.json")
    checkpoints.save(3, make_state(3), extra={})
    checkpoints.wait()
    assert steps_in(tmp_path) == [1, 3]


@pytest.fixture
def full_disk():
    """Files beyond 2 kB fail to be written, as on a full disk. Works without root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_stops_after_max_failed_saves(tmp_path, full_disk, caplog):
    checkpoints = filled(tmp_path, [1], CheckpointConfig(max_failed_saves=2, keep_last=1))
    full_disk(2000)
    checkpoints.save(2, make_state(2), extra={})
    assert checkpoints.wait() == 1
    assert "saving step 2 FAILED (1 in a row)" in logged(caplog)
    assert "Traceback" not in caplog.text
    full_disk(2**40)
    checkpoints.save(3, make_state(3), extra={})  # One that succeeds in between starts the count again.
    assert checkpoints.wait() == 3
    full_disk(2000)
    checkpoints.save(4, make_state(4), extra={})
    checkpoints.wait()
    checkpoints.save(5, make_state(5), extra={})
    with pytest.raises(UserError, match=r"2 saves in a row failed, .*the newest checkpoint is step 3; make room"):
        checkpoints.wait()
    full_disk(2**40)
    again = Checkpointer(tmp_path, CheckpointConfig(keep_last=1))
    restored = again.restore(lambda _: abstract(make_state(0)))
    assert restored is not None
    assert restored.step == 3
    assert same_bits(restored.state, make_state(3))
    again.save(6, make_state(6), extra={})
    again.wait()
    assert steps_in(tmp_path) == [6]


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(max_failed_saves=2))
    assert not checkpoints.save(1, make_state(1), extra={})
    assert "saving step 1 FAILED (1 in a row)" in logged(caplog)
    with pytest.raises(UserError, match=r"2 saves in a row failed, .*there is none yet"):
        checkpoints.save(2, make_state(2), extra={})
