"""A run goes on with other devices, other axes and other processes than it was saved with."""

import shutil
from pathlib import Path

import pytest
from stage_runs import Runner, arrays_of, figures_of, lines_of
from test_resume import CONFIG

STEPS, SAVED = 16, 10


@pytest.fixture(scope="module")
def runner(tmp_path_factory, packed_rows) -> Runner:
    config = CONFIG.replace("data=2, fsdp=-1", "data=2, fsdp=2, tensor=2")
    return Runner(tmp_path_factory.mktemp("meshes"), "pretrain", config % (packed_rows, STEPS), devices=8)


@pytest.fixture(scope="module")
def whole(runner) -> Path:
    runner.run(runner.root / "whole")
    return runner.root / "whole"


@pytest.fixture(scope="module")
def saved(runner) -> Path:
    """Stopped at step 10, on 8 devices of one process."""
    runner.run(runner.root / "saved", f"--config.loop.stop_at_step={SAVED}")
    return runner.root / "saved"


def went_on(runner: Runner, saved: Path, name: str, devices: int, processes: int, **axes: int) -> Path:
    workdir = Path(shutil.copytree(saved, runner.root / name))
    mesh = [f"--config.mesh.{axis}={axes.get(axis, 1)}" for axis in ("data", "fsdp", "tensor", "context")]
    other = Runner(runner.root, "pretrain", runner.config.read_text(), devices)
    other.run(workdir, *mesh, "--config.loop.stop_at_step=0", processes=processes)
    return workdir


def losses(workdir: Path) -> list[float]:
    return [line["train/loss"] for line in lines_of(workdir) if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "processes", "axes"),
    [(1, 1, {}), (2, 1, {"tensor": 2}), (4, 1, {"fsdp": 2, "context": 2}), (4, 2, {"data": 4})],
    ids=str,
)
def test_saved_on_eight_devices_it_goes_on_on_others(runner, whole, saved, devices, processes, axes):
    moved = losses(went_on(runner, saved, f"on-{devices}-{processes}", devices, processes, **axes))
    assert moved == pytest.approx(losses(whole), rel=1e-5)
    assert moved[:SAVED] == losses(whole)[:SAVED]


@pytest.mark.slow
def test_two_and_four_processes_have_the_same_bits(runner, whole, saved):
    two, four = (went_on(runner, saved, f"by-{n}", 8, n, data=2, fsdp=4) for n in (2, 4))
    first, second = arrays_of(two, STEPS), arrays_of(four, STEPS)
    assert [*first] == [*second]
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    assert figures_of(two) == figures_of(four)
    # Gloo's sums have another order than those within a process.
    assert losses(two) == pytest.approx(losses(whole), rel=1e-6)
