"""One checkpoint on disk: what its folder must hold to count as whole, and which checkpoints stay.

    checkpoints/1200/
      unfinished       there from the first write until the manifest stands
      state/           Orbax's files, renamed to this name when all are written
      manifest.json    written last: every array's shape, dtype and checksum, every file's size and small files' hash

No jax here: process 0 does all of this, the others hear of it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.base.manifest import has_types, inside
from jaxlm.train.config import CheckpointConfig

FORMAT_VERSION = 2  # 1: the states had no `halt`
# Files up to this size (Orbax's indices and metadata) carry a hash besides: their readers do not expect damage. Larger
# ones are arrays, which have their checksums and would take long to read.
HASHED_BYTES = 2**16


class Damaged(Exception):
    """This checkpoint cannot be used; the message names the file or array. An older one may be whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepManifest:
    step: int
    arrays: dict[str, dict[str, Any]]
    """Path in the state → {"shape", "dtype", "checksum": two uint32s}."""
    layout: dict[str, Any]
    """How the arrays are arranged (scanned or not, ...), in the caller's words."""
    identity: dict[str, str]
    """Hashes of what the run was made from: config, tokenizer, ..."""
    metric: float | None
    extra: dict[str, Any]
    """What the loop keeps beside arrays: the held-out figures so far, whether the plateau ended the run, ..."""
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """File below the folder → {"bytes"}, of small ones {"bytes", "sha256"}."""
    format_version: int = FORMAT_VERSION


def list_steps(folder: epath.Path) -> list[int]:
    """All steps that have a folder, finished or not, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def is_unfinished(folder: epath.Path) -> bool:
    """Whether a save of this step was cut off. (A state without marker and without manifest has lost its manifest.)"""
    if (folder / "manifest.json").exists():
        return False
    return (folder / "unfinished").exists() or not (folder / "state").exists()


def begin(folder: epath.Path) -> None:
    """Makes an empty step folder, whatever was there before."""
    if folder.exists():
        folder.rmtree()
    folder.mkdir(parents=True)
    (folder / "unfinished").write_text("This save has not ended, or was cut off; the folder may be removed.\n")


def commit(folder: epath.Path, manifest: StepManifest) -> None:
    """Writes the manifest of a folder whose state is complete: from here on the step counts."""
    written = {f"state/{name}": _describe(folder / "state" / name) for name in files.walk(folder / "state")}
    values = dataclasses.asdict(dataclasses.replace(manifest, files=written))
    files.write_json(folder / "manifest.json", values | {"hash": files.hash_json(values)})
    (folder / "unfinished").unlink(missing_ok=True)


def _describe(file: epath.Path) -> dict[str, Any]:
    size = file.stat().length
    return {"bytes": size, "sha256": files.sha256(file)} if size <= HASHED_BYTES else {"bytes": size}


def read(folder: epath.Path) -> StepManifest:
    """The manifest, after a look at the size of every file. Raises `Damaged`; UserError for a newer format."""
    path = folder / "manifest.json"
    try:
        values = files.read_json(path)
    except UserError as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(values, dict):
        raise Damaged(f"{path}: is not a checkpoint's manifest")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{path}: has format_version {version}, this jaxlm reads up to {FORMAT_VERSION}; update jaxlm")
    if values.pop("hash", None) != files.hash_json(values):
        raise Damaged(f"{path}: does not have the hash that it states; it was edited or is damaged")
    known = {field.name for field in dataclasses.fields(StepManifest)}
    if known != values.keys() or not has_types(StepManifest, values):
        raise Damaged(f"{path}: is not a checkpoint's manifest")
    manifest = StepManifest(**values)
    for name, entry in manifest.files.items():
        file = inside(folder, name)
        if not file.exists():
            raise Damaged(f"{file}: is missing")
        if (found := file.stat().length) != entry["bytes"]:
            raise Damaged(f"{file}: has {found} bytes; {entry['bytes']} were written")
    return manifest


def read_and_verify(folder: epath.Path) -> StepManifest:
    """`read`, and the hashes of the small files."""
    manifest = read(folder)
    for name, entry in manifest.files.items():
        if "sha256" in entry and files.sha256(folder / name) != entry["sha256"]:
            raise Damaged(f"{folder / name}: its content is not what was written")
    return manifest


def newest_whole(folder: epath.Path) -> int | None:
    """The newest step of which manifest, file sizes and small files are right."""
    for step in reversed(list_steps(folder)):
        with contextlib.suppress(Damaged):
            return read_and_verify(folder / str(step)).step
    return None


def sweep(folder: epath.Path, config: CheckpointConfig, abandoned: set[int]) -> list[int]:
    """Removes the steps that `config` does not keep, and returns them.

    Only whole steps count towards what is kept, so a damaged one never pushes out the last that can be used. Steps in
    `abandoned` (a future that the run went back from) are removed in any case. Without a whole step nothing is.
    """
    metrics: dict[int, float | None] = {}
    for step in list_steps(folder):
        if step not in abandoned:
            try:
                metrics[step] = read(folder / str(step)).metric
            except Damaged:
                continue
    stays = kept(metrics, config)
    removed = [step for step in list_steps(folder) if stays and step not in stays]
    for step in removed:
        # The manifest goes first: a removal that is cut off must not leave a step that looks whole.
        (folder / str(step) / "manifest.json").unlink(missing_ok=True)
        (folder / str(step)).rmtree()
    return removed


def kept(metrics: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which of these steps (with their metric, if any) stay: the last, the best and every M-th.

    >>> kept({1: 3.0, 2: 2.0, 3: 2.5, 4: None}, CheckpointConfig(keep_last=1, keep_best=1))
    {2, 4}
    """
    stays = set(sorted(metrics)[-config.keep_last :])
    measured = {step: metric for step, metric in metrics.items() if metric is not None}
    sign = 1 if config.best == "lowest" else -1
    stays |= set(sorted(measured, key=lambda step: (sign * measured[step], -step))[: config.keep_best])
    return stays | {step for step in metrics if config.keep_every_steps and step % config.keep_every_steps == 0}


def plain_json(value: Any, what: str) -> Any:
    """A copy of `value` as it will be read back. Raises TypeError for what JSON cannot hold, NaN included."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} of a checkpoint must be plain JSON: {error}") from None
