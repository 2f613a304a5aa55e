"""Checkpoints that can be believed: written beside the training, verified bit by bit when read.

    checkpoints = Checkpointer(f"{workdir}/checkpoints", config.checkpoint, identity={"config": hash_of_config})
    restored = checkpoints.restore(lambda layout: abstract_state)    # None in a new run
    ...
    checkpoints.save(step, state, extra={"mixture": history}, metric=held_out_loss)
    ...
    checkpoints.wait()

Orbax writes the files (sharded, asynchronously, by all processes). It would restore flipped bits and other dtypes
without a word, so each array's shape, dtype and checksum stand in a manifest of ours that is written last.
In a run of several processes all call every method together, and every decision below is the same on all of them.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger
from jaxlm.train import checksum, step_folder
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.processes import agreed, from_first
from jaxlm.train.step_folder import Damaged, StepManifest

# Numbers the saves, alike on all processes. Orbax names barriers after the folder alone, and one that
# has timed out, since a process could not write, would fail the saves after it too.
_attempts = itertools.count()


class Restored(NamedTuple):
    state: Any
    """Of the structure, shapes, dtypes and shardings that were asked for."""
    step: int
    extra: dict[str, Any]
    layout: dict[str, Any]


class Checkpointer:
    """Saves and restores a tree of arrays under `folder/STEP/`; see `step_folder` for what lies there."""

    def __init__(
        self,
        folder: epath.PathLike,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, str] | None = None,
        layout: Mapping[str, Any] | None = None,
    ):
        """`identity`: hashes (of config, tokenizer, ...) that a restored step must share. `layout`: how arrays are
        arranged, kept in the manifest for a caller that can convert."""
        # Orbax takes absolute paths only.
        self.folder = epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))
        self.config = config
        self.identity = dict(identity or {})
        self.layout = step_folder.plain_json(dict(layout or {}), "layout")
        # Uncompressed: zstd makes weights 8 % smaller and takes 2.5 times as long (1.6 s for 60 M random float32).
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        barrier = ocp.multihost.get_barrier_sync_fn()
        options = ocp.AsyncOptions(
            timeout_secs=config.timeout_seconds,
            barrier_sync_fn=lambda *, key, timeout_ms: barrier(key=f"{key}.{self._attempt}", timeout_ms=timeout_ms),
        )
        self._writer = ocp.AsyncCheckpointer(self._handler, async_options=options)
        logging.getLogger("absl").addFilter(_not_an_error_of_orbax)
        self._thread: threading.Thread | None = None
        self._attempt = 0
        self._saving = -1
        self._error: Exception | None = None
        self._failures = 0
        self._committed: int | None = None
        self._abandoned: set[int] = set()

    def save(self, step: int, state: Any, *, extra: Mapping[str, Any], metric: float | None = None) -> bool:
        """Starts saving `state`; the loop may donate it at once. First ends the save before, if one is under way.

        False when nothing is being saved: the state is not finite, or the disk refuses. That is logged, and training
        may go on; after `max_failed_saves` failures in a row UserError is raised. `extra` is plain JSON.
        """
        if self.wait() == step:
            return True
        arrays = _by_path(state)
        sums, not_finite = checksum.examine(arrays)
        if not_finite:
            logger.error("step %d is NOT saved: not finite: %s", step, _listed(not_finite))
            return False
        manifest = StepManifest(
            step=step,
            arrays={path: _description(x) | {"checksum": list(sums[path])} for path, x in arrays.items()},
            layout=self.layout,
            identity=self.identity,
            metric=float(metric) if metric is not None and math.isfinite(metric) else None,
            extra=step_folder.plain_json(dict(extra), "extra"),
        )
        folder = self.folder / str(step)
        self._attempt = next(_attempts)
        error = self._start(folder, arrays)
        if not agreed(error is None):
            self._failed(step, error)
            return False
        self._abandoned.discard(step)
        self._saving, self._error = step, None
        self._thread = threading.Thread(target=self._finish, args=(folder, manifest), name="checkpoint")
        self._thread.start()
        return True

    def wait(self) -> int | None:
        """Waits for the save under way, if any. The newest step saved or restored; UserError as in `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            # Process 0 wrote the manifest or did not; an error elsewhere has kept it from doing so.
            if from_first(lambda: self._error is None):
                self._committed, self._failures = self._saving, 0
            else:
                self._failed(self._saving, self._error)
        return self._committed

    def close(self) -> None:
        """Lets the save under way, if any, reach the disk; asks no other process, which may not be there any more."""
        if self._thread is not None:
            self._thread.join()
        self._writer.close()

    def latest_intact(self) -> int | None:
        """The newest step whose manifest and files are right; its arrays' bits are verified when it is restored."""
        return from_first(lambda: step_folder.newest_whole(self.folder))

    def manifest(self, step: int) -> StepManifest:
        """What is stored at `step`, without the arrays. Raises `Damaged`."""
        folder = self.folder / str(step)
        values = from_first(lambda: dataclasses.asdict(step_folder.read_and_verify(folder)), errors=(Damaged,))
        return StepManifest(**values)

    def restore(self, abstract_state: Callable[[Mapping[str, Any]], Any], step: int | None = None) -> Restored | None:
        """The newest step that is whole (or `step`), as `abstract_state` wants it; None if none was ever saved.

        `abstract_state(layout)`: a tree of `jax.ShapeDtypeStruct` with shardings, on whatever mesh, for a step of that
        layout. Every array must be stored under its path with its shape and dtype, and no others. A damaged step is
        reported and the one before is taken. Raises UserError when arrays or identity differ, when `step` is not
        there, and when no step is whole.
        """
        self.wait()
        steps = from_first(lambda: self._finished_steps(step))
        for candidate in steps:
            try:
                manifest = self.manifest(candidate)
                wanted = abstract_state(manifest.layout)
                arrays = self.read_arrays(candidate, manifest, _by_path(wanted))
            except Damaged as damage:
                logger.warning("checkpoint of step %d is DAMAGED: %s", candidate, damage)
                continue
            if candidate != steps[0]:
                logger.warning("taking step %d instead, the newest whole checkpoint", candidate)
            self._committed = candidate
            self._abandoned = {later for later in step_folder.list_steps(self.folder) if later > candidate}
            state = jax.tree.unflatten(jax.tree.structure(wanted), [arrays[path] for path in _by_path(wanted)])
            return Restored(state, candidate, manifest.extra, manifest.layout)
        if not steps:
            return None
        raise UserError(
            f"{self.folder}: no checkpoint is whole (tried step {_listed(map(str, steps))}; see the warnings above); "
            "put one back from a copy, or start a new run in another workdir"
        )

    def _start(self, folder: epath.Path, arrays: dict[str, jax.Array]) -> Exception | None:
        """Makes the folder and hands the arrays to Orbax, which copies them to the host before it returns."""
        error = None
        try:
            if jax.process_index() == 0:
                step_folder.begin(folder)
        except OSError as cause:
            error = cause
        if not agreed(error is None):
            return error or OSError("process 0 could not make the folder")
        if not agreed(folder.exists()):
            raise UserError(f"{folder}: is not seen by all processes; the workdir must lie on storage that they share")
        try:
            # Orbax does not store arrays without elements; the manifest is enough for them.
            filled = {path: x for path, x in arrays.items() if x.size}
            self._writer.save(folder / "state", args=ocp.args.PyTreeSave(filled))
        except Exception as cause:  # Orbax, TensorStore and file systems each have their own.
            return cause
        return None

    def _finish(self, folder: epath.Path, manifest: StepManifest) -> None:
        """In a thread: waits for the files of all processes, writes the manifest, removes what need not stay."""
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                step_folder.commit(folder, manifest)
        except Exception as cause:
            self._error = cause
            return
        try:
            if jax.process_index() == 0:
                step_folder.sweep(self.folder, self.config, self._abandoned)
        except (OSError, UserError) as cause:
            logger.warning("old checkpoints could not be removed: %s", cause)

    def _failed(self, step: int, error: Exception | None) -> None:
        self._failures += 1
        reason = _brief(error) if error else "another process could not write; its log says why"
        with contextlib.suppress(Exception):
            self._writer.wait_until_finished()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                (self.folder / str(step)).rmtree()
        last = "there is none yet" if self._committed is None else f"the newest checkpoint is step {self._committed}"
        logger.warning("saving step %d FAILED (%d in a row): %s; %s", step, self._failures, reason, last)
        if self._failures >= self.config.max_failed_saves:
            raise UserError(
                f"{self.folder}: {self._failures} saves in a row failed, the last with: {reason}; {last}; make room or "
                "mend the storage and start again"
            )

    def _finished_steps(self, step: int | None) -> list[int]:
        """Steps to try, newest first; UserError when `step` is not among them."""
        steps = step_folder.list_steps(self.folder)
        cut_off = [s for s in steps if step_folder.is_unfinished(self.folder / str(s))]
        finished = [s for s in reversed(steps) if s not in cut_off]
        if cut_off:
            logger.warning("passing over checkpoints whose saving was cut off: step %s", _listed(map(str, cut_off)))
        if step is not None and step not in finished:
            raise UserError(f"{self.folder}: no checkpoint of step {step}; there are {_listed(map(str, finished))}")
        return finished if step is None else [step]

    def read_arrays(self, step: int, manifest: StepManifest, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        folder = self.folder / str(step)
        other = [name for name in {**manifest.identity, **self.identity} if self._differs(manifest, name)]
        if other:
            raise UserError(f"{folder}: was made with another {' and '.join(other)}; use another workdir for this run")
        older = manifest.format_version < 2  # `halt` came with format 2; the loop sets it whatever it was
        later = {path: x for path, x in wanted.items() if older and path.split("/")[-1] == "halt"}
        _require_same(folder, manifest, {path: x for path, x in wanted.items() if path not in later}, self.layout)
        error, arrays = None, {}
        try:
            arrays = self._restore_arrays(folder / "state", wanted, made={*later})
        except Exception as cause:  # Damaged files surface as whatever the reader stumbled over.
            error = cause
        if not agreed(error is None):
            reason = _brief(error) if error else "another process could not read it; its log says why"
            raise Damaged(f"{folder}/state: cannot be read: {reason}")
        sums, _ = checksum.examine(arrays)
        wrong = [path for path in manifest.arrays if list(sums[path]) != manifest.arrays[path]["checksum"]]
        if wrong:
            raise Damaged(f"{folder}/state: these arrays do not have the checksum that was saved: {_listed(wrong)}")
        return arrays

    def _differs(self, manifest: StepManifest, name: str) -> bool:
        return manifest.identity.get(name) != self.identity.get(name)

    def _restore_arrays(self, folder: epath.Path, wanted: dict[str, Any], made: set[str]) -> dict[str, jax.Array]:
        """`made`: of zeros, since they are not stored, like arrays without elements."""
        filled = {path: x for path, x in wanted.items() if math.prod(x.shape) and path not in made}
        restore_args = {
            path: ocp.ArrayRestoreArgs(sharding=_sharding(x), global_shape=x.shape, dtype=x.dtype)
            for path, x in filled.items()
        }
        # The handler, not a Checkpointer around it, whose barriers would hang when one process meets an error.
        arrays = self._handler.restore(folder, args=ocp.args.PyTreeRestore(item=filled, restore_args=restore_args))
        empty = {path: x for path, x in wanted.items() if path not in filled}
        for path, x in empty.items():
            arrays[path] = jax.jit(lambda x=x: jnp.zeros(x.shape, x.dtype), out_shardings=_sharding(x))()
        return arrays


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the tree's order: {"params/layers/mlp/up": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path, since a key of it contains '/'")
    return named


def _description(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _sharding(x: Any) -> jax.sharding.Sharding:
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _require_same(folder: epath.Path, manifest: StepManifest, wanted: dict[str, Any], layout: Any) -> None:
    """Refuses arrays that are missing, too many, or of another shape or dtype, each by name."""
    stored = manifest.arrays
    problems = [f"{path}: is not in the checkpoint" for path in wanted if path not in stored]
    problems += [f"{path}: is in the checkpoint only" for path in stored if path not in wanted]
    for path in wanted.keys() & stored.keys():
        here = _description(wanted[path])
        problems += [
            f"{path}: {key} is {stored[path][key]} in the checkpoint, {here[key]} here"
            for key in ("shape", "dtype")
            if stored[path][key] != here[key]
        ]
    if problems:
        note = f" (its layout is {manifest.layout}, this run's {layout})" if manifest.layout != layout else ""
        raise UserError(f"{folder}: does not fit this run{note}:\n  " + "\n  ".join(sorted(problems)))


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _brief(error: Exception) -> str:
    """The first line without TensorStore's trailer; of a long one both ends, since the cause stands last."""
    line = f"{type(error).__name__}: {error}".splitlines()[0].split(" [source locations=")[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-150:]}"


def _not_an_error_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each failure with tracebacks and raises it as well; the message here is enough."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
