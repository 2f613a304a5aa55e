"""A run that is killed is the same as one that never was: all bits of the state, and of the metrics file."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

STEPS = 120
CONFIG = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

def get_config():
    return PretrainConfig(
        data=(MixtureSource(path=%r),),
        model=ModelConfig(vocab_size=288, layers=2, width=32, heads=2, compute="float32"),
        batch_rows=8,
        steps=%d,
        optimizer=OptimizerConfig(kind="muon", ema=0.9),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=5),
        mesh=MeshConfig(data=2, fsdp=-1),
        loop=LoopConfig(
            log_every_steps=1,
            evaluate_every_steps=30,
            checkpoint=CheckpointConfig(every_steps=10, keep_last=3),
        ),
    )
"""
TIMINGS = ("time", "train/tokens_per_second", "train/step_seconds", "train/mfu", "train/data_wait")


class Runner:
    """Starts pretraining in processes of its own, which share compiled programs."""

    def __init__(self, root: Path, rows: str):
        self.root = root
        self.config = root / "config.py"
        self.config.write_text(CONFIG % (rows, STEPS))

    def start(self, workdir: Path, *arguments: str, process: int = 0, processes: int = 1, port: int = 0):
        devices = 4 // processes
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.root / "cache")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if processes > 1:
            environment |= {
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            }
        command = [sys.executable, "-m", "jaxlm", "pretrain", f"--config={self.config}", f"--workdir={workdir}"]
        with open(self.root / f"{workdir.name}-{process}.txt", "ab") as log:
            return subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)

    def run(self, workdir: Path, *arguments: str, processes: int = 1) -> int:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        running = [
            self.start(workdir, *arguments, process=number, processes=processes, port=port)
            for number in range(processes)
        ]
        codes = {process.wait(timeout=300) for process in running}
        assert len(codes) == 1, self.log(workdir)
        return codes.pop()

    def log(self, workdir: Path) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.root.glob(f"{workdir.name}-*.txt"))


def lines_of(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(workdir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(workdir)]


def arrays_of(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Read by Orbax alone, without our own restoring."""
    folder = workdir / f"checkpoints/{step}"
    names = json.loads((folder / "manifest.json").read_text())["arrays"]
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    handler = ocp.PyTreeCheckpointHandler()
    found = handler.restore((folder / "state").absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted))
    return dict(sorted(found.items()))


def assert_same(a: Path, b: Path) -> None:
    first, second = arrays_of(a), arrays_of(b)
    assert list(first) == list(second)
    kinds = ("params/", "optimizer/", "ema/", "step", "skipped")
    assert all(any(name.startswith(kind) for name in first) for kind in kinds)
    for name, value in first.items():
        assert np.asarray(value).tobytes() == np.asarray(second[name]).tobytes(), name
    assert figures(a) == figures(b)


@pytest.fixture(scope="module")
def runner(tmp_path_factory, packed_rows):
    return Runner(tmp_path_factory.mktemp("resume"), packed_rows)


@pytest.fixture(scope="module")
def never_stopped(runner):
    workdir = runner.root / "whole"
    assert runner.run(workdir) == 0, runner.log(workdir)
    trained = [line["step"] for line in lines_of(workdir) if "train/loss" in line]
    assert trained == list(range(1, STEPS + 1))
    losses = [line["train/loss"] for line in lines_of(workdir) if "train/loss" in line]
    assert losses[-1] < losses[0] - 1
    return workdir


@pytest.mark.slow
def test_killed_at_random_moments_is_the_same_as_never_killed(runner, never_stopped):
    workdir = runner.root / "killed"
    random_ = random.Random(7)
    kills = 0
    while kills < 10:
        process = runner.start(workdir)
        # Counted in lines, so that lives get through start, steps and saves on machines of any speed.
        before = len(lines_of(workdir))
        wanted = before + random_.randint(-8, 14) if kills else 1
        deadline = time.monotonic() + 120
        while process.poll() is None and len(lines_of(workdir)) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random_.random() * 0.3)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 10, runner.log(workdir)
    assert runner.run(workdir) == 0, runner.log(workdir)
    assert_same(workdir, never_stopped)
    assert (workdir / "model/params").exists()


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_the_next_start_goes_on(runner, never_stopped):
    workdir = runner.root / "terminated"
    process = runner.start(workdir)
    while process.poll() is None and len(lines_of(workdir)) < 37:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, runner.log(workdir)
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved % 10 or saved == lines_of(workdir)[-1]["step"]
    assert runner.run(workdir) == 0
    assert_same(workdir, never_stopped)


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_step_before_is_taken(runner, never_stopped):
    workdir = runner.root / "damaged"
    assert runner.run(workdir, "--config.loop.stop_at_step=40") == 0, runner.log(workdir)
    files = [path for path in (workdir / "checkpoints/40/state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert runner.run(workdir) == 0, runner.log(workdir)
    log = (workdir / "log.txt").read_text()
    assert "checkpoint of step 40 is DAMAGED" in log
    assert "goes on from step 30" in log
    assert_same(workdir, never_stopped)


@pytest.mark.slow
def test_two_processes_stop_and_go_on(runner, never_stopped):
    whole, stopped = runner.root / "two", runner.root / "two-stopped"
    assert runner.run(whole, processes=2) == 0, runner.log(whole)
    assert runner.run(stopped, "--config.loop.stop_at_step=50", processes=2) == 0, runner.log(stopped)
    assert runner.run(stopped, processes=2) == 0, runner.log(stopped)
    assert_same(stopped, whole)
    for two, one in zip(lines_of(whole), lines_of(never_stopped), strict=True):
        # gloo and the in-process collectives add in different orders; the first step has seen nothing of that yet.
        for name in ("train/loss", "eval/loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-6 if one["step"] == 1 else 1e-3)


@pytest.mark.slow
def test_two_processes_can_share_every_row(runner, never_stopped):
    """Positions divided among all devices: each process needs all rows, and half of each."""
    workdir = runner.root / "shared-rows"
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.context=4"]
    assert runner.run(workdir, *mesh, "--config.loop.stop_at_step=5", processes=2) == 0, runner.log(workdir)
    losses = [line["train/loss"] for line in lines_of(workdir)]
    alone = [line["train/loss"] for line in lines_of(never_stopped)[:5]]
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_goes_on_on_another_mesh_and_layout(runner, never_stopped):
    workdir = runner.root / "moved"
    assert runner.run(workdir, "--config.loop.stop_at_step=60") == 0, runner.log(workdir)
    other = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    assert runner.run(workdir, *other, "--config.model.scan_layers=false") == 0, runner.log(workdir)
    for moved, one in zip(lines_of(workdir), lines_of(never_stopped), strict=True):
        if "train/loss" in one:
            assert moved["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5 if one["step"] < 65 else 1e-2)
