"""Bad steps, kept whole: WORKDIR/blackbox/STEP/ has what `tools/replay.py` needs to take that step again anywhere.

    blackbox/71/
      record.json        the step's metrics, norms by group of layers among them, its rows and documents, and the config
      before/70/         a checkpoint of the state before the step and of its batch, without the base under adapters

No step waits for this. A state that can halt (`TrainState.halt` is 0) stays as it is from a bad step on, whatever
steps are dispatched after it. The loop sees that an interval later, or before it evaluates or saves, goes back to that
step, keeps it, and goes on from there as if nothing had been: data and state are functions of the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxlm.base import files, metrics
from jaxlm.base.config import to_dict
from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger
from jaxlm.data.mixture import History
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.processes import from_first
from jaxlm.train.state import Program, TrainState

Describe = Callable[[int, History], Sequence[Any]]


class BlackBox:
    def __init__(self, config: Any, program: Program, rows: Describe = lambda step, history: ()):
        """`config`: a stage's, complete. `rows`: where the rows of a step's batch come from, as plain JSON."""
        self.folder, self.config, self.rows = epath.Path(config.workdir) / "blackbox", config, rows
        self.most = config.loop.black_boxes
        self._turn = jax.jit(
            lambda state, back, halt: state._replace(step=state.step - back, skipped=state.skipped - back, halt=halt),
            out_shardings=program.shardings.state,
            donate_argnums=0,
        )

    def armed(self, state: TrainState) -> TrainState:
        """The state, ready to halt at its next bad step, or, after the last that is kept, not any more.

        A function of the state alone, so that a run that goes on does as one that never stopped.
        """
        return self._turn(state, jnp.int32(0), jnp.int32(0 if int(state.skipped) < self.most else -1))

    def keep(self, state: TrainState, compiled: Callable[..., Any], batch: Any, history: History) -> TrainState:
        """Keeps the bad step at which `state` stands still; returns the state behind it, armed again."""
        step = int(state.step)
        before = self._turn(state, jnp.int32(1), jnp.int32(0))
        checkpoints = Checkpointer(self.folder / str(step) / "before", CheckpointConfig(keep_last=1))
        try:
            checkpoints.save(step - 1, {"state": before, "batch": without_base(batch)}, extra={})
            # The same step once more: nothing was kept of its metrics, and a sound machine finds it bad again.
            after, measured = compiled(before, batch)
            if checkpoints.wait() is None:
                logger.warning("%s/%d: could not be written; step %d cannot be replayed", self.folder, step, step)
        finally:
            checkpoints.close()
        values = metrics.values(measured)
        repeated = int(after.halt) == step
        told = {name: str(value) for name, value in values.items()}  # JSON has no NaN
        rows = list(self.rows(step - 1, history))
        record = {"step": step, "repeated": repeated, "metrics": told, "rows": rows, "config": to_dict(self.config)}
        try:
            from_first(lambda: files.write_json(self.folder / str(step) / "record.json", record))
        except UserError as error:
            logger.warning("%s", error)
        shown = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items() if _told(name))
        logger.warning("step %d is bad and was skipped: %s; kept in %s/%d", step, shown, self.folder, step)
        if not repeated:
            logger.error("step %d, taken again, was NOT bad: a device or its memory may be faulty", step)
        return self.armed(after)


def without_base(batch: Any) -> Any:
    """A batch as it is kept: frozen weights are those of the config's model and teacher, by their hashes."""
    return {name: x for name, x in batch.items() if name not in ("base", "teacher")}


def _told(name: str) -> bool:
    return name.endswith("loss") or "gradient_norm" in name
