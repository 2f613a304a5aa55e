"""Decisions that all processes of a run share. With one process these functions are free."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.base.errors import UserError


def agreed(fine: bool) -> bool:
    """Whether `fine` holds on every process; all call it together and get the same answer."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))


def from_first(make: Callable[[], Any], errors: tuple[type[Exception], ...] = ()) -> Any:
    """What `make()` gives on process 0 (plain JSON), on every process; all call it together.

    What it raises there, all raise: as one of `errors` if it is one of those, on the others as UserError otherwise.
    """
    if jax.process_count() == 1:
        return make()
    value, error = None, None
    if jax.process_index() == 0:
        try:
            value = make()
        except Exception as cause:
            error = cause
    said = json.dumps([value, type(error).__name__ if error else "", str(error)]).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    text = np.frombuffer(said[:length].ljust(length), np.uint8)
    value, kind, message = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
    if error is not None:
        raise error
    if kind:
        raise next((known for known in errors if known.__name__ == kind), UserError)(message)
    return value
