"""The loop around every training step: it iterates, evaluates, logs and saves; it never sees a gradient.

The order at the start, which is also the order of resuming:

1. signals, so that nothing after them can be killed unseen (the stage has set the watchdog);
2. the newest intact checkpoint, or else the initial state, made in place on the mesh;
3. metrics.jsonl, cut back to that step;
4. the data, from that step on: its position is a function of the step;
5. the compiled step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.base import files, metrics, sharding
from jaxlm.base.config import StageConfig, identity
from jaxlm.base.errors import Interrupted, Refused, UserError
from jaxlm.base.logging import logger, progress
from jaxlm.data import mixture
from jaxlm.data.loader import Loader
from jaxlm.model.config import ModelConfig
from jaxlm.train import throughput
from jaxlm.train.checkpoint import Checkpointer, Restored
from jaxlm.train.config import LoopConfig, PlateauConfig
from jaxlm.train.goodput import Ledger
from jaxlm.train.metrics_writer import MetricsWriter
from jaxlm.train.plateau import stopped_falling
from jaxlm.train.processes import agreed
from jaxlm.train.signals import Agreement, Stop, stop_on_signals
from jaxlm.train.state import Program, convert_layout
from jaxlm.train.throughput import Clock
from jaxlm.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage trains, and on what."""

    program: Program
    compile: Callable[[], Callable[[Any, Any], tuple[Any, dict[str, metrics.Mean]]]]
    """() → a step's work, (state, batch) → (state, metrics): `compiled_step(program)`, or what is put around it"""
    other_layout: Any
    """the abstract state of the same model with unrolled layers where `program` stacks them, or the reverse; None
    where a state cannot be turned"""
    model: ModelConfig
    steps: int
    """of the whole schedule"""
    weights: tuple[float, ...]
    """of the mixture's sources, from the step on at which the run begins or goes on"""
    batches: Callable[[int, mixture.History], Iterator[Any]]
    """step, the mixture's history → the global batches from there on"""
    evaluate: Callable[[Any], dict[str, float]]
    """state → held-out figures; none where nothing is held out"""
    tokens_per_step: int
    flops_per_token: float
    identity: Mapping[str, str]
    """hashes that a checkpoint must share with this run"""
    plateau: PlateauConfig
    best_metric: str = "eval/bits_per_byte"
    """what the plateau rule and `checkpoint.keep_best` look at, the lower the better; empty: nothing"""
    waits: bool = False
    """a step returns when the devices are done: its metrics are read at once, not an interval later"""
    evaluate_first: bool = False
    """held-out figures of the state before the first step too, as those of step 0"""
    headline: Callable[[dict[str, float]], str] = lambda values: f"loss {values['train/loss']:.4f}"
    """a step's metrics → what the log says of them"""
    enough: Callable[[Any], bool] = lambda state: False
    """state → whether the run is over before its last step"""
    black_box: Any = None
    """a `replay.blackbox.BlackBox`, which keeps bad steps whole; None: they are only counted"""


def global_batches(loader: Loader, mesh: Mesh) -> Callable[[int, mixture.History], Iterator[Any]]:
    """The batches of a loader that has this process's own rows, as a `Task` wants them."""

    def batches(step: int, history: mixture.History) -> Iterator[Any]:
        for _, rows in loader.with_history(history).batches(step):
            yield sharding.global_batch(mesh, rows, loader.global_batch)

    return batches


def run_identity(config: StageConfig, inputs: Mapping[str, str], **hashes: str) -> dict[str, str]:
    """What a checkpoint shares with every run that goes on from it: the config, its inputs by order, other `hashes`."""
    numbered = {f"input {number}": digest for number, digest in enumerate(inputs.values())}
    return {"config": files.hash_json(identity(config, continued=True))} | hashes | numbered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    state: Any
    step: int
    evaluation: dict[str, float]
    """the last held-out figures"""
    tokens_per_second: float
    """of this process's life, first step to last, evaluations and saves included"""


def compiled_step(program: Program) -> Any:
    """The program's step, compiled; says how long that took and how much memory it needs."""
    began = time.monotonic()
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    logger.info("step compiled in %.1f s; a device needs %.2f GiB", time.monotonic() - began, size / 2**30)
    return compiled


def train(task: Task, config: LoopConfig, workdir: str, watchdog: Watchdog) -> Outcome:
    """Trains to the last step, to `stop_at_step` or to the plateau. Raises Interrupted after a signal, once saved.

    `watchdog` is running already: what comes before and after the loop can hang too.
    """
    program = task.program
    # Before the mesh is set: on CPU the peak is measured with a product on one device.
    peak = throughput.peak_flops_per_second(program.mesh.devices.size, task.model.compute)
    with jax.set_mesh(program.mesh), stop_on_signals() as stop:
        stacked = {"stacked": task.model.scan_layers}
        checkpoints = Checkpointer(f"{workdir}/checkpoints", config.checkpoint, identity=task.identity, layout=stacked)
        restored = restore(checkpoints, task)
        state = restored.state if restored else program.initialize()
        step = restored.step if restored else 0
        figures = list(restored.extra["figures"]) if restored else []
        last = min(config.stop_at_step or task.steps, task.steps)
        if restored:
            logger.info("goes on from step %d of %d", step, task.steps)
            last = step if restored.extra["ended"] else last
        history = mixture.continued(restored.extra["mixture"] if restored else (), step, task.weights)
        if len(history) > 1:
            logger.info("the mixture's weights: %s", ", ".join(f"{w} from step {start}" for start, w in history))
        at = step if restored else -1
        ledger, writer = _on_all(lambda: (Ledger(workdir, at, watchdog), MetricsWriter(workdir, at)))
        run = _Run(
            task,
            config,
            workdir,
            checkpoints,
            writer,
            watchdog,
            Clock(task.tokens_per_step, task.flops_per_token, peak, ledger),
            figures,
            history,
        )
        try:
            return run.steps(state, step, last, stop)
        finally:
            checkpoints.close()
            writer.close()


def _on_all(make: Callable[[], Any]) -> Any:
    """What `make()` gives; where it fails on one process, all end together instead of waiting for it."""
    made, error = None, None
    try:
        made = make()
    except UserError as cause:
        error = cause
    if not agreed(error is None):
        raise error or UserError("another process could not write; its log says why")
    return made


def restore(checkpoints: Checkpointer, task: Task) -> Restored | None:
    """The newest intact state, its layers arranged as this run has them. None in a new run."""
    stacked = task.model.scan_layers
    same = lambda layout: task.other_layout is None or layout.get("stacked", stacked) == stacked
    found = checkpoints.restore(lambda layout: task.program.abstract_state if same(layout) else task.other_layout)
    if found is None or same(found.layout):
        return found
    logger.info("the checkpoint's layers are %s; converting", "unrolled" if stacked else "stacked")
    turn = jax.jit(lambda state: convert_layout(state, task.model, stacked), out_shardings=task.program.shardings.state)
    return found._replace(state=turn(found.state))


class _Run:
    """The pieces of one run of the loop, and what they share."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        workdir: str,
        checkpoints: Checkpointer,
        writer: MetricsWriter,
        watchdog: Watchdog,
        clock: Clock,
        figures: list[float | None],
        history: mixture.History,
    ):
        self.task, self.config, self.workdir = task, config, workdir
        self.checkpoints, self.writer, self.watchdog, self.clock = checkpoints, writer, watchdog, clock
        self.figures, self.history = figures, history
        """The best-metric's value at each evaluation so far; None where it was not finite."""
        self.evaluation: dict[str, float] = {}
        self.evaluated_at = -1
        self.pending: tuple[int, dict[str, metrics.Mean], jax.Array | int] | None = None
        """A step's metrics, and the bad step after which its state stood still: still on the devices, read one interval
        late, so that the loop never waits for them."""
        self.skipped, self.skipped_in_a_row, self.logged_at = 0, 0, 0
        self.tracing = False

    def steps(self, state: Any, step: int, last: int, stop: Stop) -> Outcome:
        """From `step` to `last`, or to where a signal or the plateau ends it."""
        task, config = self.task, self.config
        self.watchdog.enter("compile")
        compiled = task.compile() if step < last else None
        agreement = Agreement(stop)
        self.skipped, self.logged_at = int(state.skipped), step
        box = task.black_box
        state = box.armed(state) if box and compiled else state
        batches = task.batches(step, self.history)
        clock = self.clock
        clock.restart(step)
        first, began, finished = step, time.monotonic(), step >= last
        if step == 0 and task.evaluate_first and not finished:
            self._evaluate(state, 0)
        with progress("train", last) as bar:
            bar.advance(step)
            while not finished:
                self.watchdog.enter("step")
                self._profile(step, state)
                clock.wait_begins()
                batch = next(batches)
                clock.wait_ends()
                assert compiled is not None
                state, measured = compiled(state, batch)
                step += 1
                bar.advance(1, clock.note)
                interrupted = agreement.reached() and step < last
                evaluates = step % config.evaluate_every_steps == 0 or step == task.steps
                saves = step % config.checkpoint.every_steps == 0 or step >= last or interrupted
                logs = step % config.log_every_steps == 0 or step == task.steps
                bad = logs and self._log()
                if logs:  # the copy outlives the state, which the next step takes
                    self.pending = (step, measured, jnp.copy(state.halt) if box else 0)
                    if task.waits:
                        self._log()
                if box and (bad or ((evaluates or saves) and int(state.halt) > 0)):
                    state = self._keep_bad_step(state, compiled)
                    if (at := int(state.step)) < step:  # the steps after it have changed nothing: they are taken now
                        step, batches = at, task.batches(at, self.history)
                        clock.restart(step)
                        continue
                stopped = False
                if evaluates:
                    stopped = self._evaluate(state, step) and step < last
                    clock.restart(step)
                stopped |= step < last and task.enough(state)
                finished = step >= last or stopped or interrupted
                if saves or finished:
                    self._save(state, step, ended=stopped)
                    clock.restart(step)
                if interrupted:
                    saved = self._close(step)
                    told = f"saved at step {saved} of {task.steps}, {stop.seconds():.1f} s after it was asked to stop"
                    raise Interrupted(f"{self.workdir}: {told}; start me again to go on")
        if not self.evaluation:
            self._evaluate(state, step, log=False)
        self._close(step)
        seconds = time.monotonic() - began
        rate = (step - first) * task.tokens_per_step / seconds if step > first else 0.0
        return Outcome(state=state, step=step, evaluation=self.evaluation, tokens_per_second=rate)

    def _evaluate(self, state: Any, step: int, log: bool = True) -> bool:
        """Takes the held-out figures; True when the plateau rule says to stop."""
        if log:
            self._log()  # before evaluating, whose time is none of the steps'
        self.watchdog.enter("eval")
        self.evaluation = self.task.evaluate(state)
        if not self.evaluation or not log:
            return False
        self.writer.write(step, step * self.task.tokens_per_step, self.evaluation)
        self.evaluated_at = step
        shown = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in self.evaluation.items())
        logger.info("step %d held out: %s", step, shown)
        if not self.task.best_metric:
            return False
        figure = self.evaluation[self.task.best_metric]
        self.figures.append(figure if math.isfinite(figure) else None)
        return stopped_falling(self.figures, self.task.plateau)

    def _save(self, state: Any, step: int, ended: bool = False) -> None:
        """`ended`: the plateau was reached, so that starting again does not train on."""
        self.watchdog.enter("save")
        self._log()  # the lines up to the saved step are there before it is
        self.clock.compare_hosts(step)
        metric = self.evaluation.get(self.task.best_metric) if self.evaluated_at == step else None
        extra = {"figures": self.figures, "ended": ended, "mixture": self.history}
        self.checkpoints.save(step, state, extra=extra, metric=metric)

    def _keep_bad_step(self, state: Any, compiled: Any) -> Any:
        """The state behind the bad step after which this one stands still."""
        self._log()
        self.watchdog.enter("save")
        batch = next(self.task.batches(int(state.step) - 1, self.history))
        return self.task.black_box.keep(state, compiled, batch, self.history)

    def _log(self) -> bool:
        """Writes the metrics that were left on the devices an interval ago; True when the state then stood still after
        a bad step. What was measured later than that was measured of no step of the run."""
        if self.pending is None:
            return False
        step, measured, halted = self.pending
        self.pending = None
        if 0 < int(halted) < step:
            return True
        values = self.clock.waiting(lambda: metrics.values(measured)) | self.clock.lap(step)
        self.writer.write(step, step * self.task.tokens_per_step, values)
        logger.info("step %d: %s  %s", step, self.task.headline(values), self.clock.note)
        self._count_skipped(step, int(values["train/skipped_steps"]))
        return int(halted) > 0

    def _count_skipped(self, step: int, skipped: int) -> None:
        """Warns of skipped steps, and ends a run that does nothing else any more."""
        new, taken = skipped - self.skipped, step - self.logged_at
        self.skipped, self.logged_at = skipped, step
        if new:
            told = "their loss or gradient was not finite, or a spike"
            logger.warning("step %d: %d steps skipped so far, %s", step, skipped, told)
        self.skipped_in_a_row = self.skipped_in_a_row + new if new == taken else 0
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise Refused(
                f"{self.workdir}: the last {self.skipped_in_a_row} steps up to step {step} were all skipped: loss or "
                "gradient is not finite any more, or above optimizer.spike_limit; lower schedule.peak or "
                "optimizer.clip_norm, or start again in a new workdir from an earlier checkpoint"
            )

    def _profile(self, step: int, state: Any) -> None:
        """Starts and ends a profiler trace at the configured steps (1 is the first), when the devices are there."""
        if step not in [bound - first for bound, first in zip(self.config.profile_steps, (1, 0), strict=False)]:
            return
        jax.block_until_ready(state)
        if self.tracing and step == self.config.profile_steps[1]:
            self._end_trace()
        if step + 1 == self.config.profile_steps[0]:
            jax.profiler.start_trace(f"{self.workdir}/tensorboard")
            self.tracing = True

    def _end_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            logger.info("profiler trace of steps %d to %d in %s/tensorboard", *self.config.profile_steps, self.workdir)

    def _close(self, step: int) -> int | None:
        """Ends what is under way; returns the newest step that is safely on disk."""
        self._log()
        self.watchdog.enter("save")
        saved = self.checkpoints.wait()
        if saved != step:
            logger.error("step %d could not be saved; the newest checkpoint is step %s", step, saved)
        self._end_trace()
        return saved
