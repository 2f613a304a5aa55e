"""Where the time went, over restarts and kills; hosts that hold up the others; memory that ends."""

import json
import time

import numpy as np
import pytest

from jaxlm.base import metrics
from jaxlm.train import hosts
from jaxlm.train.config import WatchdogConfig
from jaxlm.train.goodput import Ledger
from jaxlm.train.hosts import host_memory, slow
from jaxlm.train.metrics_writer import cut_back
from jaxlm.train.watchdog import Watchdog


class Told(Watchdog):
    """A watchdog that has seen these seconds."""

    def __init__(self, **seconds: float):
        super().__init__(WatchdogConfig())
        self.of = dict.fromkeys(("start", "compile", "step", "save", "eval"), 0.0) | seconds

    def seconds(self) -> dict[str, float]:
        return dict(self.of)


def write(folder, step: int, values: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time()} | values) + "\n")


def test_sums_go_on_over_restarts_and_what_is_taken_again_is_lost(tmp_path):
    told = Told(start=5.0, compile=7.0)
    first = Ledger(str(tmp_path), -1, told)
    first.data_seconds = 1.0
    for step, seconds in ((10, 101.0), (20, 201.0), (30, 301.0)):
        told.of["step"] = seconds
        write(tmp_path, step, first.values())
    assert {*first.values()} <= {*metrics.NAMES}
    # Killed; the newest checkpoint is that of step 10, so that 200 of the 300 seconds are lost.
    second = Ledger(str(tmp_path), 10, Told(start=4.0, step=50.0))
    values = second.values()
    assert values["time/step_seconds"] == 350.0
    assert values["time/lost_seconds"] == 200.0
    assert (values["time/start_seconds"], values["time/compile_seconds"], values["time/data_seconds"]) == (
        9.0,
        7.0,
        1.0,
    )
    # Killed before its first line, when the lines that had the sums are cut already: nothing is forgotten.
    cut_back(tmp_path / "metrics.jsonl", 10)
    third = Ledger(str(tmp_path), 10, Told(step=1.0)).values()
    assert (third["time/step_seconds"], third["time/lost_seconds"]) == (301.0, 200.0)
    assert second.began == first.began
    # A new run in the same folder begins at nothing.
    assert Ledger(str(tmp_path), -1, Told()).values()["time/step_seconds"] == 0.0


def test_goodput_is_the_share_of_steps_that_stayed(tmp_path):
    told = Told()
    ledger = Ledger(str(tmp_path), -1, told)
    ledger.began -= 100.0
    told.of |= {"step": 60.0, "eval": 20.0}
    assert ledger.values()["train/goodput"] == pytest.approx(0.6, rel=1e-2)


def test_the_watchdog_adds_up_its_phases():
    watchdog = Watchdog(WatchdogConfig())
    watchdog.enter("step")
    time.sleep(0.05)
    watchdog.enter("save")
    time.sleep(0.02)
    watchdog.enter("step")
    seconds = watchdog.seconds()
    assert 0.05 <= seconds["step"] < 0.5
    assert 0.02 <= seconds["save"] < 0.5
    assert seconds["eval"] == 0.0


@pytest.mark.parametrize(
    ("own", "step", "wanted"),
    [
        ([0.1, 0.1, 0.5, 0.1], 1.0, [2]),
        ([0.1, 0.1, 0.12, 0.1], 1.0, []),  # less than half above the others
        ([0.001, 0.001, 0.004, 0.001], 1.0, []),  # far above, but nothing beside the step
        ([0.9, 0.9, 0.9], 1.0, []),
    ],
)
def test_a_slow_process_is_told_by_its_own_part_of_the_step(own, step, wanted):
    assert slow(np.array(own), step) == wanted


def test_a_slow_process_is_named_with_its_host(monkeypatch, caplog):
    def gathered(values):
        return np.array([0.1, 0.9, 0.1], np.float32), np.stack([values[1]] * 3)

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(hosts.socket, "gethostname", lambda: "worker-7")
    hosts.name_slow(40, 0.1, 1.0)
    assert "step 40: process 1 on worker-7 is slow: 0.900 s a step of its own, the others 0.100 s" in caplog.text


def test_little_memory_is_warned_of(tmp_path, monkeypatch, caplog):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000000 kB\nMemFree: 1 kB\nMemAvailable: 500000 kB\n")
    assert host_memory(str(tmp_path)) == (500000 * 1024, 1000000 * 1024)
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("99000000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert host_memory(str(tmp_path)) == (500000 * 1024, 1000000 * 1024)
    (cgroup / "memory.max").write_text("100000000\n")
    assert host_memory(str(tmp_path)) == (1e6, 1e8)
    assert host_memory(str(tmp_path / "none")) == (float("inf"), float("inf"))
    monkeypatch.setattr(hosts, "host_memory", lambda: host_memory(str(tmp_path)))
    assert hosts.memory_is_low(7)
    assert "step 7: 0.0 of 0.1 GiB" in caplog.text


def test_parts_never_sum_to_more_than_the_wall_time(tmp_path):
    """Starting and compiling come before the ledger is made, and are counted."""
    watchdog = Watchdog(WatchdogConfig())
    time.sleep(0.2)
    watchdog.enter("compile")
    time.sleep(0.1)
    ledger = Ledger(str(tmp_path), -1, watchdog)
    watchdog.enter("step")
    time.sleep(0.1)
    values = ledger.values()
    wall = time.time() - ledger.began
    share = values.pop("train/goodput")
    assert sum(values.values()) == pytest.approx(wall, abs=0.02)
    assert share == pytest.approx(values["time/step_seconds"] / wall, abs=0.02)
    assert 0.2 < share < 0.4
