"""What tests of whole stages share: a tiny base model, stages in processes of their own, runs compared bit by bit."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


def written(path: Path, records: Iterable) -> str:
    """The path of a JSONL file of the records; strings are written as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def pretrained(rows: str, workdir: Path, *, steps: int, layers: int = 1, **model: Any) -> str:
    """The workdir of a model of width 32 that read bytes for some steps."""
    from jaxlm.data.config import MixtureSource
    from jaxlm.model.config import ModelConfig
    from jaxlm.stages import pretrain
    from jaxlm.stages.config import PretrainConfig
    from jaxlm.train.config import ScheduleConfig

    config = PretrainConfig(
        workdir=str(workdir),
        data=(MixtureSource(path=rows),),
        model=ModelConfig(vocab_size=288, layers=layers, width=32, heads=2, compute="float32", **model),
        batch_rows=8,
        steps=steps,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=max(1, steps // 12)),
    )
    pretrain.main(config)
    return str(workdir)


class Runner:
    """Starts a stage in processes of its own, on simulated devices, `devices` in all; they share compiled programs."""

    def __init__(self, root: Path, stage: str, config: str, devices: int = 4):
        """`config`: the text of a config file."""
        self.root, self.stage, self.config, self.devices = root, stage, root / "config.py", devices
        self.config.write_text(config)

    def start(self, workdir: Path, *arguments: str, process: int = 0, processes: int = 1, port: int = 0):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices // processes}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if processes > 1:
            environment |= {
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(process),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            }
        command = [sys.executable, "-m", "jaxlm", self.stage, f"--config={self.config}", f"--workdir={workdir}"]
        with open(self.root / f"{workdir.name}-{process}.txt", "ab") as log:
            return subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)

    def run(self, workdir: Path, *arguments: str, processes: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        numbers = range(processes)
        running = [self.start(workdir, *arguments, process=n, processes=processes, port=port) for n in numbers]
        assert [process.wait(timeout=400) for process in running] == [0] * processes, self.log(workdir)

    def kill(self, workdir: Path, lives: int, *, seed: int, first: int = 1, lines: tuple[int, int]) -> None:
        """Starts the stage and kills it, `lives` times.

        A life lasts until metrics.jsonl has grown by a random number of `lines` (the first: by `first`), so that lives
        get through start, steps and saves on machines of any speed.
        """
        random_ = random.Random(seed)
        for life in range(lives):
            process = self.start(workdir)
            wanted = len(lines_of(workdir)) + random_.randint(*lines) if life else first
            deadline = time.monotonic() + 200
            while process.poll() is None and len(lines_of(workdir)) < wanted and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(random_.random() * 0.3)
            assert process.poll() is None, self.log(workdir)
            process.send_signal(signal.SIGKILL)
            process.wait()

    def log(self, workdir: Path) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.root.glob(f"{workdir.name}-*.txt"))


def lines_of(workdir: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    path = Path(workdir) / name
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def figures_of(workdir: str | Path) -> list[dict]:
    """metrics.jsonl without what only tells the time."""
    timing = ("time", "train/tokens_per_second", "train/mfu", "train/data_wait", "train/goodput")
    kept = lambda name: name not in timing and not name.endswith("_seconds")
    return [{name: value for name, value in line.items() if kept(name)} for line in lines_of(workdir)]


def arrays_of(workdir: str | Path, step: int) -> dict[str, np.ndarray]:
    """A checkpoint, read by Orbax alone, without our own restoring."""
    folder = Path(workdir) / f"checkpoints/{step}"
    names = json.loads((folder / "manifest.json").read_text())["arrays"]
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    found = ocp.PyTreeCheckpointHandler().restore(
        (folder / "state").absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted)
    )
    return dict(sorted(found.items()))


def assert_same_run(a: str | Path, b: str | Path, step: int, kinds: Sequence[str] = ()) -> None:
    """All bits of the state at `step`, of the metrics and of the completions; `kinds`: what the state must have."""
    first, second = arrays_of(a, step), arrays_of(b, step)
    assert list(first) == list(second)
    assert all(any(name.startswith(kind) for name in first) for kind in kinds)
    for name, value in first.items():
        assert np.asarray(value).tobytes() == np.asarray(second[name]).tobytes(), name
    assert figures_of(a) == figures_of(b)
    assert lines_of(a, "completions.jsonl") == lines_of(b, "completions.jsonl")
