"""Writes a run's metrics: WORKDIR/metrics.jsonl, an object a line, and TensorBoard's files beside it.

    {"step": 100, "time": 1767323045.123, "tokens": 409600, "train/loss": 5.31, "train/mfu": 0.41}

A value that is not a number cannot stand in JSON: it is written as null, and its name under "nonfinite".
"""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.base import files, metrics
from jaxlm.base.errors import nearest
from jaxlm.base.logging import logger


class MetricsWriter:
    """Appends lines; only process 0 writes, on the others every method does nothing.

    `start_step` is the step that the run continues from (0: from the start). Lines past it, which a run wrote that was
    killed before its next checkpoint, are cut, as is a line that is not whole; TensorBoard is told to forget them too.
    """

    def __init__(self, workdir: str, start_step: int, tensorboard: bool = True):
        self._file = None
        self._board = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / "metrics.jsonl"
        try:
            cut_back(path, start_step)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._board = _Board(Path(workdir) / "tensorboard", start_step) if tensorboard else None
        except OSError as error:
            raise files.cannot_write(workdir, error) from error

    def write(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """`tokens`: trained on up to and with `step`. Names must be in `metrics.NAMES`. A full disk is warned about."""
        for name in values:
            if name not in metrics.NAMES:
                raise ValueError(f"{name} is not in jaxlm.base.metrics.NAMES{nearest(name, metrics.NAMES)}")
        if self._file is None:
            return
        fine = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), "tokens": tokens} | fine
        if bad := [name for name, value in fine.items() if value is None]:
            line["nonfinite"] = bad
        try:
            _append(self._file, (json.dumps(line) + "\n").encode())
            if self._board is not None:
                self._board.write(step, values)
        except OSError as error:
            logger.warning("the metrics of step %d could not be written: %s", step, error.strerror or error)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._board is not None:
            with contextlib.suppress(OSError):  # A full disk has been warned about.
                self._board.close()
            self._board = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """TensorBoard's events, written at once. (tensorboardX's SummaryWriter has a thread for it, which a full disk ends;
    its queue then fills, and the eleventh value waits for good.)"""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter  # Half a second that only process 0 needs.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        # The step keeps the names of restarts within one second apart.
        self._writer = EventsWriter(str(folder / "events"), f".{start_step}")
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            summary = self._scalar(name, float(value))
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _append(file: int, line: bytes) -> None:
    """All of the line or nothing. One write: a kill cannot come in between, only a full disk can cut it short."""
    size = os.fstat(file).st_size
    if os.write(file, line) < len(line):
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_back(path: Path, step: int) -> None:
    """Keeps the whole lines of `path` up to `step`, in one replacement of the file."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if len(kept) < len(lines):
        files.write_bytes(path, b"".join(kept))


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none that is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
