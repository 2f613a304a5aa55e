"""The run's log: to the terminal and to WORKDIR/log.txt, with one progress bar at a time.

Nothing is configured on import. `start(workdir)` is called once by the command line.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

import rich.console
import rich.progress

logger = logging.getLogger("jaxlm")
console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


class _Terminal(logging.Handler):
    """Prints through rich, so that lines stand above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        with contextlib.suppress(OSError):  # a terminal, or a full disk behind it, must not end a run
            console.print(record.getMessage(), style=style, markup=False)


def start(workdir: str | None = None) -> None:
    """Sends the log to stderr and, when given, to WORKDIR/log.txt (appended: a run's restarts share it)."""
    stop()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Terminal())
    if workdir:
        file = logging.FileHandler(f"{workdir}/log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def stop() -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class Progress(Protocol):
    def advance(self, amount: int, note: str = "") -> None: ...


class _Bar:
    def __init__(self, bar: rich.progress.Progress, task: rich.progress.TaskID):
        self.bar, self.task = bar, task

    def advance(self, amount: int, note: str = "") -> None:
        self.bar.update(self.task, advance=amount, note=note)


class _Lines:
    """For a log without a terminal: a line every 30 seconds."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.done, self.last = label, total, 0, time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            logger.info("%s: %d%s %s", self.label, self.done, f"/{self.total}" if self.total else "", note)


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere. `total` None: unknown length."""
    if not sys.stderr.isatty():
        yield _Lines(label, total)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, bar.add_task(label, total=total, note=""))
