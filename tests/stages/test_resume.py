"""A run that is killed is the same as one that never was: all bits of the state, and of the metrics file."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_runs import Runner, assert_same_run, lines_of

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
KINDS = ("params/", "optimizer/", "ema/", "step", "skipped")


@pytest.fixture(scope="module")
def runner(tmp_path_factory, packed_rows):
    return Runner(tmp_path_factory.mktemp("resume"), "pretrain", CONFIG % (packed_rows, STEPS))


@pytest.fixture(scope="module")
def never_stopped(runner):
    workdir = runner.root / "whole"
    runner.run(workdir)
    trained = [line["step"] for line in lines_of(workdir) if "train/loss" in line]
    assert trained == list(range(1, STEPS + 1))
    losses = [line["train/loss"] for line in lines_of(workdir) if "train/loss" in line]
    assert losses[-1] < losses[0] - 1
    return workdir


@pytest.mark.slow
def test_killed_where_it_hurts_is_the_same_as_never_killed(runner, never_stopped):
    """tools/torture.py: a kill in each of its places, in the middle of a step, a save, a load."""
    tool = Path(__file__).parent.parent.parent / "tools/torture.py"
    options = ["--kills=10", "--seed=7", f"--whole={never_stopped}", f"--workdir={runner.root}/torture"]
    command = [sys.executable, str(tool), "pretrain", f"--config={runner.config}", *options]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +10 +10 +0$", done.stdout, re.MULTILINE)
    for place in ("start", "step", "loader", "save, arrays", "save, manifest", "save, retention", "metrics"):
        assert re.search(rf"^{place} +[1-9]", done.stdout, re.MULTILINE), done.stdout
    killed = max((runner.root / "torture").glob("killed-*/"), key=lambda path: path.name)
    assert_same_run(killed, never_stopped, STEPS, KINDS)
    assert (killed / "model/params").exists()


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
    runner.run(workdir)
    assert_same_run(workdir, never_stopped, STEPS, KINDS)


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_step_before_is_taken(runner, never_stopped):
    workdir = runner.root / "damaged"
    runner.run(workdir, "--config.loop.stop_at_step=40")
    files = [path for path in (workdir / "checkpoints/40/state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    runner.run(workdir)
    log = (workdir / "log.txt").read_text()
    assert "checkpoint of step 40 is DAMAGED" in log
    assert "goes on from step 30" in log
    assert_same_run(workdir, never_stopped, STEPS, KINDS)


@pytest.mark.slow
def test_two_processes_stop_and_go_on(runner, never_stopped):
    whole, stopped = runner.root / "two", runner.root / "two-stopped"
    runner.run(whole, processes=2)
    runner.run(stopped, "--config.loop.stop_at_step=50", processes=2)
    runner.run(stopped, processes=2)
    assert_same_run(stopped, whole, STEPS, KINDS)
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
    runner.run(workdir, *mesh, "--config.loop.stop_at_step=5", processes=2)
    losses = [line["train/loss"] for line in lines_of(workdir)]
    alone = [line["train/loss"] for line in lines_of(never_stopped)[:5]]
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_goes_on_on_another_mesh_and_layout(runner, never_stopped):
    workdir = runner.root / "moved"
    runner.run(workdir, "--config.loop.stop_at_step=60")
    other = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    runner.run(workdir, *other, "--config.model.scan_layers=false")
    for moved, one in zip(lines_of(workdir), lines_of(never_stopped), strict=True):
        if "train/loss" in one:
            assert moved["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5 if one["step"] < 65 else 1e-2)
