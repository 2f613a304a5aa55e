"""Kills a run of your own with SIGKILL, again and again, and shows that nothing of it is lost.

    python tools/torture.py pretrain --config=configs/x.py --workdir=/tmp/torture --kills=10
    python tools/torture.py rl --config=configs/ppo.py --workdir=/tmp/torture --kills=10 --config.steps=24

First the stage runs undisturbed in WORKDIR/whole. Then it is started and killed `--kills` times, each time at another
place: while it starts, in a step, in the thread that loads data, while a checkpoint is written, while metrics are
written, while answers are drawn (rl), while the model is written. A run that comes to its end in between is compared
and a new one begun. Compared are all bits of the last checkpoint (parameters, optimizer, average, step, KL coefficient:
whatever the state has), metrics.jsonl without its times (no line twice, none missing), completions.jsonl and the model.

Prints a table: place, kills, survived, lost. Exit code: 0 nothing was lost, 1 something was, 2 the run itself fails.
Wants a config of a small model whose steps take less than a second; simulated devices by XLA_FLAGS as in any run.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
ENVIRONMENT = dict(os.environ)
# Values that tell the time of day or the speed of the machine; names that end in _seconds do too.
TIMES = ("time", "train/tokens_per_second", "train/mfu", "train/data_wait", "train/goodput")
ORDERS = "JAXLM_TORTURE"


class Place(NamedTuple):
    """Where a run is killed: some seconds after the n-th call of a function, in the process that calls it."""

    name: str
    module: str
    function: str
    """Class.method, or a function of the module; empty: after the process's start"""
    most_calls: int
    most_seconds: float
    stages: tuple[str, ...] = ()
    """the only ones that get there; empty: all"""


PLACES = (
    Place("start", "", "", 1, 8.0),
    Place("step", "jaxlm.train.watchdog", "Watchdog.enter", 9, 0.05),
    Place("loader", "jaxlm.data.prefetch", "ThreadPoolExecutor.submit", 12, 0.02),
    Place("save, arrays", "jaxlm.train.checkpoint", "Checkpointer._start", 3, 0.2),
    Place("save, manifest", "jaxlm.train.step_folder", "commit", 3, 0.02),
    Place("save, retention", "jaxlm.train.step_folder", "sweep", 4, 0.01),
    Place("metrics", "jaxlm.train.metrics_writer", "MetricsWriter.write", 9, 0.001),
    Place("rollout", "jaxlm.rl.rolling", "Roller.roll_mixed", 6, 0.3, ("rl",)),
    Place("learning", "jaxlm.rl.rollout", "place", 6, 0.1, ("rl",)),
    Place("model", "jaxlm.train.model_directory", "write", 1, 0.1),
)


class Lost(Exception):
    """What differs from the run that was never killed."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pretrain", "sft", "reward", "preference", "rl"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", type=Path, help="a finished run of the same config, instead of a new one")
    options, overrides = parser.parse_known_args(arguments)
    command = [options.stage, f"--config={options.config}", *overrides]
    options.workdir.mkdir(parents=True, exist_ok=True)
    whole = options.whole or options.workdir / "whole"
    if life(command, whole, None):
        print(f"torture: the run itself fails; see {log_of(whole)}", file=sys.stderr)
        return 2
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    lost = 0
    for workdir, kills in killed_runs(command, options):
        try:
            require_same(workdir, whole)
            outcome = "survived"
        except Lost as difference:
            outcome, lost = "lost", lost + 1
            print(f"LOST after {', '.join(kills)}: {difference}", flush=True)
        for place in kills:
            counts[place].update([outcome, "kills"])
    print(f"{options.stage:16} {'kills':>6} {'survived':>9} {'lost':>5}")
    for place, count in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"{place:16} {count['kills']:>6} {count['survived']:>9} {count['lost']:>5}")
    return 1 if lost else 0


def killed_runs(command: list[str], options: Any) -> Iterator[tuple[Path, list[str]]]:
    """(folder of a run that came to its end, the places at which it was killed before); `options.kills` in all."""
    draw = random.Random(options.seed)
    places = [place for place in PLACES if not place.stages or options.stage in place.stages]
    kills_at = dict.fromkeys(places, 0)
    left, number = options.kills, 0
    while left > 0:
        workdir, kills, code = options.workdir / f"killed-{number}", [], -1
        number += 1
        while code:
            # Each place in its turn. A run may come to its end before it gets there; the next one begins with it.
            place = min(places, key=lambda each: (kills_at[each], draw.random())) if left > 0 else None
            code = life(command, workdir, place, draw)
            if place and code == -signal.SIGKILL:
                kills.append(place.name)
                kills_at[place] += 1
                left -= 1
            elif code:
                raise SystemExit(f"torture: {workdir} ended with {code} after {kills}; see {log_of(workdir)}")
        if kills:
            yield workdir, kills


def life(command: list[str], workdir: Path, place: Place | None, draw: random.Random | None = None) -> int:
    """One start of the run, killed at `place`; its exit code."""
    orders = ""
    if place and draw:
        orders = json.dumps([*place[1:3], draw.randint(1, place.most_calls), draw.random() * place.most_seconds])
    environment = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **ENVIRONMENT,
        ORDERS: orders,
    }
    with log_of(workdir).open("ab") as log:
        child = [sys.executable, str(HERE), *command, f"--workdir={workdir}"]
        return subprocess.run(child, env=environment, stdout=log, stderr=log, check=False).returncode


def log_of(workdir: Path) -> Path:
    return workdir.parent / f"{workdir.name}.txt"


def run_with_orders(orders: str, arguments: list[str]) -> int:
    """In the child: the command line itself, with an alarm laid at the place."""
    if orders:
        module, function, calls, seconds = json.loads(orders)
        if function:
            lay_alarm(module, function, calls, seconds)
        else:
            alarm(seconds)
    from jaxlm.__main__ import main as command

    return command(arguments)


def lay_alarm(module: str, function: str, calls: int, seconds: float) -> None:
    import importlib

    owner: Any = importlib.import_module(module)
    *parents, name = function.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real: Callable[..., Any] = getattr(owner, name)
    count = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            alarm(seconds)
        return real(*given, **named)

    setattr(owner, name, counted)


def alarm(seconds: float) -> None:
    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def require_same(a: Path, b: Path) -> None:
    """Raises `Lost` for the first difference between two finished runs."""
    from inspect_checkpoint import differences, open_folder

    steps = [max(int(path.name) for path in (run / "checkpoints").iterdir()) for run in (a, b)]
    if steps[0] != steps[1]:
        raise Lost(f"{a}: ends at step {steps[0]}, not {steps[1]}")
    found = [open_folder(type_of(run / "checkpoints" / str(steps[0]))) for run in (a, b)]
    if wrong := list(differences(found[0].arrays, found[1].arrays)):
        raise Lost(f"{a}: {wrong[0]}")
    for name in ("metrics.jsonl", "completions.jsonl"):
        ours, theirs = (figures(run / name) for run in (a, b))
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
            if json.dumps(one) != json.dumps(other):
                raise Lost(f"{a}/{name}:{number}: {one} is not {other}")
        if len(ours) != len(theirs):
            raise Lost(f"{a}/{name}: has {len(ours)} lines, not {len(theirs)}")
    models = [open_folder(type_of(run / "model")) for run in (a, b)]
    if wrong := list(differences(models[0].arrays, models[1].arrays)):
        raise Lost(f"{a}/model: {wrong[0]}")


def type_of(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def figures(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    timed = lambda name: name in TIMES or name.endswith("_seconds")
    return [{name: value for name, value in json.loads(line).items() if not timed(name)} for line in lines]


if __name__ == "__main__":
    given = os.environ.pop(ORDERS, None)
    sys.exit(main(sys.argv[1:]) if given is None else run_with_orders(given, sys.argv[1:]))
