"""Errors that end a run with a message instead of a traceback, and the exit codes of DESIGN's contract.

A launcher restarts a run on `EXIT_INTERRUPTED`, `EXIT_HANG` and on death by a signal, and on nothing else: the user's
mistake would only be made again.
"""

import difflib
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
