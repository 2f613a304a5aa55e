"""Bad steps, kept whole: WORKDIR/blackbox/STEP/ has what `tools/replay.py` needs to take that step again anywhere.

    blackbox/71/
      record.json        the step's metrics, norms by group of layers among them, its rows and documents, and the config
      before/70/         a checkpoint of the state before the step and of its batch, without the base under adapters

No step waits for this. A state that can halt (`TrainState.halt` is 0) stays as it is from a bad step on, whatever
steps are dispatched after it. The loop sees that an interval later, or before it evaluates or saves, goes back to that
step, keeps it, and goes on from there as if nothing had been: data and state are functions of the step. Of
reinforcement learning a step is an update; what is left of its rollout is not learned from (`rl/learner.py`).
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
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.processes import from_first
from jaxlm.train.state import Program

Describe = Callable[[int, Any], Sequence[Any]]
FROZEN = ("base", "frozen", "teacher")


class BlackBox:
    def __init__(self, config: Any, program: Program, rows: Describe = lambda step, given: (), what: str = "step"):
        """`config`: a stage's, complete. `rows`: where the rows of a step's batch come from, as plain JSON, from the
        step before and what `keep` is given. `what`: the program's step by name."""
        self.what = what
        self.folder, self.config, self.rows = epath.Path(config.workdir) / "blackbox", config, rows
        self.most = config.loop.black_boxes
        self._turn = jax.jit(
            lambda state, back, halt: state.turned(back, halt),
            out_shardings=program.shardings.state,
            donate_argnums=0,
        )

    def armed(self, state: Any) -> Any:
        """The state, ready to halt at its next bad step, or, after the last that is kept, not any more.

        A function of the state alone, so that a run that goes on does as one that never stopped.
        """
        return self._turn(state, jnp.int32(0), jnp.int32(0 if int(state.skipped) < self.most else -1))

    def keep(self, state: Any, compiled: Callable[..., Any], batch: Any, given: Any) -> Any:
        """Keeps the bad step at which `state` stands still; returns the state behind it, armed again.

        `state` is a TrainState, or has its `step`, `skipped`, `halt` and `turned`. `given`: for `rows`, the history."""
        step = int(state.step)
        before = self._turn(state, jnp.int32(1), jnp.int32(0))
        checkpoints = Checkpointer(self.folder / str(step) / "before", CheckpointConfig(keep_last=1))
        try:
            checkpoints.save(step - 1, {"state": before, "batch": without_frozen(batch)}, extra={})
            # The same step once more: nothing was kept of its metrics, and a sound machine finds it bad again.
            after, measured = compiled(before, batch)
            if checkpoints.wait() is None:
                logger.warning(
                    "%s/%d: could not be written; %s %d cannot be replayed", self.folder, step, self.what, step
                )
        finally:
            checkpoints.close()
        values = metrics.values(measured)
        repeated = int(after.halt) == step
        numbers = {name: str(value) for name, value in values.items()}  # JSON has no NaN
        rows = list(self.rows(step - 1, given))
        record = {"step": step, "repeated": repeated, "metrics": numbers, "rows": rows, "config": to_dict(self.config)}
        try:
            from_first(lambda: files.write_json(self.folder / str(step) / "record.json", record))
        except UserError as error:
            logger.warning("%s", error)
        shown = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items() if _told(name))
        told = self.what, step, shown, self.folder, step
        logger.warning("%s %d is bad and was skipped: %s; kept in %s/%d", *told)
        if not repeated:
            logger.error("%s %d, taken again, was NOT bad: a device or its memory may be faulty", self.what, step)
        return self.armed(after)


def without_frozen(batch: Any) -> Any:
    """A batch as it is kept: weights that do not learn are those of the config's models, by their hashes."""
    return {name: x for name, x in batch.items() if name not in FROZEN}


def _told(name: str) -> bool:
    return name.endswith("loss") or "gradient_norm" in name
