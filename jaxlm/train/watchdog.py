"""A watch over the phases of a run: one that takes longer than its limit is a hang, and ends the process.

    with Watchdog(config.watchdog, f"{workdir}/log.txt") as watchdog:
        ...                                  # "start"
        watchdog.enter("compile")
        for step in steps:
            watchdog.enter("step")           # every step: the clock starts again
            train_step(...)
            watchdog.enter("save")
            checkpoints.save(...)

On a pod a lost host or a collective that never ends leaves all others waiting for good; a process that ends with exit
code 76 and every thread's stack in the log is restarted by the launcher. The watch is a Python thread: code that hangs
while it holds the interpreter's lock is not seen (XLA, Orbax and data loaders let go of it while they wait).
"""

import contextlib
import faulthandler
import os
import threading
import time
from typing import Literal

from jaxlm.base.errors import EXIT_HANG
from jaxlm.train.config import WatchdogConfig

Phase = Literal["start", "compile", "step", "save", "eval"]

POLL_SECONDS = 1.0


class Watchdog:
    """Starts in phase "start" when entered, ends with the `with` block."""

    def __init__(self, config: WatchdogConfig, log_path: str | None = None):
        """`log_path`: a file to which the stacks are appended, besides stderr."""
        self.limits: dict[Phase, float] = {
            "start": config.start_seconds,
            "compile": config.compile_seconds,
            "step": config.step_seconds,
            "save": config.save_seconds,
            "eval": config.eval_seconds,
        }
        self.log_path = log_path
        # A new tuple for each entry: the thread sees by its identity that the run got on.
        self._entered: tuple[Phase] = ("start",)
        self._since = time.monotonic()
        self._spent: dict[str, float] = {str(phase): 0.0 for phase in self.limits}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.enter("start")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def enter(self, phase: Phase) -> None:
        """Ends the phase before and starts this one's clock. Costs less than a microsecond; call it every step."""
        now = time.monotonic()
        self._spent[self._entered[0]] += now - self._since
        self._since = now
        self._entered = (phase,)

    def seconds(self) -> dict[str, float]:
        """How long each phase has taken so far, all its times together."""
        phase = self._entered[0]
        return self._spent | {phase: self._spent[phase] + time.monotonic() - self._since}

    def _watch(self) -> None:
        seen, polls = self._entered, 0
        while not self._ended.wait(POLL_SECONDS):
            entered = self._entered
            # Counted in polls, not by the clock: a process that was stopped and goes on (Ctrl-Z, fg) has not hung.
            polls = polls + 1 if entered is seen else 0
            seen = entered
            limit = self.limits[entered[0]]
            if limit and polls * POLL_SECONDS >= limit:
                self._end(entered[0], limit)

    def _end(self, phase: Phase, limit: float) -> None:
        """Straight to the files: the logger's lock may be what the run hangs on."""
        message = f"watchdog: {phase!r} took more than {limit:g} seconds; the stacks of all threads follow\n"
        with contextlib.suppress(OSError):
            _dump(2, message)
        if self.log_path:
            with contextlib.suppress(OSError):
                _dump(os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), message)
        os._exit(EXIT_HANG)


def _dump(descriptor: int, message: str) -> None:
    os.write(descriptor, message.encode())
    faulthandler.dump_traceback(descriptor, all_threads=True)
