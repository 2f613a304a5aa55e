"""The machines under a run: one that holds up the others, and memory that is about to end."""

import socket
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.base.logging import logger

# A process is slow whose own part of a step is so many times the others' median, and at least this share of the step.
SLOW_TIMES, SLOW_SHARE = 1.5, 0.05
LEAST_FREE = 0.05  # of a host's memory
NAME_BYTES = 64


def name_slow(step: int, own_seconds: float, step_seconds: float) -> None:
    """Warns of processes that hold up the others; all call it together.

    `own_seconds` a step: what a process needs itself, for data and the host's work, and does not wait for the devices.
    (The step itself takes as long on all of them: they wait for the slowest.)
    """
    if jax.process_count() == 1:
        return
    name = np.frombuffer(socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES), np.uint8)
    own, names = multihost_utils.process_allgather((np.float32(own_seconds), name))
    for process in slow(np.asarray(own), step_seconds):
        host = bytes(np.asarray(names[process])).decode(errors="replace").strip()
        told = f"{own[process]:.3f} s a step of its own, the others {np.median(own):.3f} s (median)"
        logger.warning("step %d: process %d on %s is slow: %s", step, process, host, told)


def slow(own_seconds: np.ndarray, step_seconds: float) -> list[int]:
    """
    >>> slow(np.array([0.1, 0.1, 0.5, 0.1]), step_seconds=1.0)
    [2]
    """
    usual = float(np.median(own_seconds))
    most = max(SLOW_TIMES * usual, usual + SLOW_SHARE * step_seconds)
    return [process for process, seconds in enumerate(own_seconds) if seconds > most]


def memory_is_low(step: int) -> bool:
    """Warns when little of the host's memory is left, before the kernel ends the process without a word."""
    free, total = host_memory()
    if low := free < LEAST_FREE * total:
        told = f"step {step}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB of the host's memory are left"
        logger.warning("%s; near 0 the kernel kills the run", told)
    return low


def host_memory(root: str = "/") -> tuple[float, float]:
    """(free, all) bytes: of the machine or, where that is less, of the container. Infinities where nobody tells."""
    found = [(float("inf"), float("inf"))]
    try:
        lines = (line.split() for line in Path(root, "proc/meminfo").read_text().splitlines())
        kib = {parts[0]: float(parts[1]) for parts in lines}
        found.append((1024 * kib["MemAvailable:"], 1024 * kib["MemTotal:"]))
        used, limit = (Path(root, f"sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("current", "max"))
        found.append((float(limit) - float(used), float(limit)))
    except (OSError, ValueError, KeyError):  # another system, or no container's limit ("max")
        pass
    return min(found)
