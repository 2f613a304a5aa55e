"""SIGTERM (a maintenance event, a preemption) and Ctrl-C: a flag that the loop looks at, so that it saves and ends.

with stop_on_signals() as stop:
    agreement = Agreement(stop)
    for step in ...:
        train_step(...)
        if agreement.reached():
            break               # On all processes after the same step.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.base.config import MeshConfig
from jaxlm.base.sharding import global_array, make_mesh, replicated


class Stop:
    """`requested` turns true with the first SIGTERM, SIGINT or notice; `signal` then names it."""

    def __init__(self):
        self.requested = False
        self.signal = ""
        self._since = 0.0

    def request(self, signal: str) -> None:
        if not self.requested:
            self._since = time.monotonic()
        self.requested, self.signal = True, signal

    def seconds(self) -> float:
        """Since the request; 0 on a process that another's request stops."""
        return time.monotonic() - self._since if self.requested else 0.0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catches SIGTERM and the first SIGINT; a second SIGINT raises KeyboardInterrupt at once.

    Only for the main thread (ValueError elsewhere: Python delivers signals there). Old handlers come back at the end.
    """
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop.signal == "SIGINT":
            raise KeyboardInterrupt
        stop.request(signal.Signals(number).name)
        # Not through the logger: the signal may have come while its lock was held.
        again = "; again to stop without saving" if number == signal.SIGINT else ""
        os.write(2, f"\n{stop.signal}: saving after this step, then stopping{again}\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agreement:
    """Lets all processes stop after the same step, though the signal reaches them at different moments or only one.

    Every `every_steps` calls each process puts its flag into a sum over all devices and reads the sum that was asked
    for one round before: by then it is there, so the loop does not wait for the devices. A signal thus takes effect
    after at most `2 * every_steps` steps; a cloud's notice before it takes a machine is 30 seconds. (jax has a
    preemption service for this, `reached_preemption_sync_point`, but it owns SIGTERM and does not know SIGINT.)
    """

    def __init__(self, stop: Stop, every_steps: int = 1):
        self.stop, self.every_steps = stop, every_steps
        self._calls = 0
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = make_mesh(MeshConfig())
            self._place = NamedSharding(mesh, PartitionSpec("data"))
            self._sum = jax.jit(jnp.sum, out_shardings=replicated(mesh))

    def reached(self) -> bool:
        """To be called after every step, by all processes; true on all of them after the same step."""
        if jax.process_count() == 1:
            return self.stop.requested
        self._calls += 1
        if self._calls % self.every_steps:
            return False
        asked = self._asked
        flags = np.full(jax.local_device_count(), self.stop.requested, np.int32)
        self._asked = self._sum(global_array(self._place, flags, (jax.device_count(),)))
        return asked is not None and int(asked) > 0
