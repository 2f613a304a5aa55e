"""Errors that end a run with a message instead of a traceback, and the exit codes of DESIGN's contract.

A launcher restarts a run on `EXIT_INTERRUPTED`, `EXIT_HANG` and on death by a signal, and on nothing else: the user's
mistake would only be made again.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_USER = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 75
EXIT_HANG = 76


class JaxlmError(Exception):
    """Ends the process with `exit_code` and its message, without a traceback."""

    exit_code = 1


class UserError(JaxlmError):
    """The user's mistake: the message names the field or file, what was wrong and what would be right."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A wrong value in a config. `path` is the dotted field; outer configs put their own field in front of it."""

    def __init__(self, path: str, problem: str):
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")

    def within(self, prefix: str) -> "ConfigError":
        return ConfigError(f"{prefix}.{self.path}", self.problem)


class Refused(JaxlmError):
    """A validation or the release gate said no."""

    exit_code = EXIT_REFUSED


class Interrupted(JaxlmError):
    """The state is saved; the same command continues the run."""

    exit_code = EXIT_INTERRUPTED


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'layers'?"` for a name close to a known one, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known here: " + ", ".join(known)


def out_of_room(error: BaseException) -> str:
    """What to do about an error that says that memory or disk is full; empty for others.

    XLA's errors are told by their text: RESOURCE_EXHAUSTED is what a device says, and the compiler for it.
    """
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first:
        mend = "a smaller batch_rows, a larger accumulate, model.remat=full or a mesh of more devices needs less"
        return f"out of memory: {first or 'of the host'}; {mend}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the disk'}: {error.strerror}; make room, and start the same command again"
    return ""
