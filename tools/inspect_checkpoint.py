"""Verifies, shows and compares checkpoints and model directories, bit by bit, on the CPU.

    python tools/inspect_checkpoint.py runs/demo/pretrain                  its checkpoints, and the newest one's arrays
    python tools/inspect_checkpoint.py runs/demo/pretrain/checkpoints/400  that one; or a model directory
    python tools/inspect_checkpoint.py A B                                 which arrays differ, and by how much
    ... --quiet                                                            the verdict alone

Exit code: 0 all is whole (and equal), 1 something is damaged (or differs), 2 there is nothing to look at.
Arrays are compared in the layout in which they lie: a checkpoint with a checkpoint, a model with a model.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Before jax is imported: an accelerator that a run is using stays the run's.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from jaxlm.base import manifest as manifests
from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.train import step_folder
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.step_folder import Damaged

WHOLE, WRONG, MISTAKE = 0, 1, 2


class Found(NamedTuple):
    """What lies in a folder, verified."""

    folder: epath.Path
    kind: str
    """checkpoint or model"""
    said: dict[str, Any]
    """What its manifest tells beside the arrays."""
    arrays: dict[str, np.ndarray]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", help="one folder to look at, or two to compare")
    parser.add_argument("--quiet", action="store_true", help="the verdict alone")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if len(options.path) > 2:
            raise UserError(f"{len(options.path)} paths: one is looked at, two are compared")
        looked_at = [epath.Path(path) for path in options.path]
        wrong = [look for path in looked_at for look in damaged_steps(path)]
        found = [open_folder(path) for path in looked_at]
        for each in found if not options.quiet else []:
            print("\n".join(describe(each)))
        if len(found) == 2:
            return compare(*found)
        print(f"{found[0].folder}: whole: every file and array is what was written")
        return WRONG if wrong else WHOLE
    except Damaged as damage:
        print(f"DAMAGED: {damage}")
        return WRONG
    except JaxlmError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return MISTAKE


def damaged_steps(folder: epath.Path) -> list[int]:
    """Of a run's folder: the steps whose files are not those that were written; says how all stand."""
    if not (folder / "checkpoints").exists():
        return []
    wrong = []
    for step in step_folder.list_steps(folder / "checkpoints"):
        at = folder / "checkpoints" / str(step)
        if step_folder.is_unfinished(at):
            print(f"{at}: its saving was cut off; it counts for nothing")
            continue
        try:
            step_folder.read_and_verify(at)
            print(f"{at}: files whole")
        except Damaged as damage:
            print(f"DAMAGED: {damage}")
            wrong.append(step)
    return wrong


def open_folder(folder: epath.Path) -> Found:
    """Reads and verifies a run's newest whole checkpoint, a single one, or a model directory."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder")
    if (folder / "params").exists():
        return open_model(folder)
    if (folder / "checkpoints").exists():
        newest = step_folder.newest_whole(folder / "checkpoints")
        if newest is None:
            raise Damaged(f"{folder}/checkpoints: no checkpoint is whole")
        return open_checkpoint(folder / "checkpoints" / str(newest))
    if (folder / "model" / "params").exists():
        return open_model(folder / "model")
    if folder.name.isdigit():
        return open_checkpoint(folder)
    raise UserError(f"{folder}: is no run's folder, no checkpoint (checkpoints/STEP) and no model directory")


def open_checkpoint(folder: epath.Path) -> Found:
    read = step_folder.read_and_verify(folder)
    checkpoints = Checkpointer(folder.parent, CheckpointConfig(), identity=read.identity, layout=read.layout)
    wanted = {
        path: jax.ShapeDtypeStruct(tuple(array["shape"]), jax.numpy.dtype(array["dtype"]))
        for path, array in read.arrays.items()
    }
    try:
        arrays = checkpoints.read_arrays(int(folder.name), read, wanted)
    finally:
        checkpoints.close()
    said = {name: getattr(read, name) for name in ("step", "format_version", "layout", "identity", "metric", "extra")}
    return Found(folder, "checkpoint", said, {path: np.asarray(arrays[path]) for path in wanted})


def open_model(folder: epath.Path) -> Found:
    read = manifests.read(folder, "model")
    try:
        manifests.verify(folder, read)
        files = sorted(name for name in read.files if name.endswith(".safetensors"))
        arrays = {}
        for name in files:
            arrays |= safetensors.numpy.load_file(folder / name)
    except (UserError, safetensors.SafetensorError) as error:
        raise Damaged(str(error)) from None
    said = {name: getattr(read, name) for name in ("format_version", "created", "commit", "versions", "facts")}
    return Found(folder, "model", said, dict(sorted(arrays.items())))


def describe(found: Found) -> Iterator[str]:
    """The manifest's words and a line an array: size, norm, smallest and largest element."""
    yield f"{found.folder}: {found.kind}"
    for name, value in found.said.items():
        yield f"  {name}: {value}"
    width = max((len(path) for path in found.arrays), default=0)
    for path, x in found.arrays.items():
        yield f"  {path:{width}}  {x.dtype!s:8} {' x '.join(map(str, x.shape)) or '-':>16}  {_figures(x)}"
    sizes = [x.size for x in found.arrays.values()]
    stored = sum(x.nbytes for x in found.arrays.values())
    yield f"  {len(sizes)} arrays, {sum(sizes):,} elements, {stored / 2**20:,.1f} MiB"


def _figures(x: np.ndarray) -> str:
    if not x.size:
        return "empty"
    wide = x.astype(np.float64)
    if x.ndim == 0:
        return f"{float(wide):g}"
    bad = int(np.sum(~np.isfinite(wide)))
    return f"norm {np.linalg.norm(wide):.6g}  {wide.min():.4g} to {wide.max():.4g}" + (
        f"  {bad} NOT FINITE" * bool(bad)
    )


def compare(a: Found, b: Found) -> int:
    """Says what differs; equal means all names, shapes, types and bits."""
    if a.kind != b.kind:
        raise UserError(f"{a.folder} is a {a.kind}, {b.folder} a {b.kind}: their arrays are not laid out alike")
    lines = list(differences(a.arrays, b.arrays))
    print("\n".join(lines) if lines else f"equal: {len(a.arrays)} arrays, every bit")
    return WRONG if lines else WHOLE


def differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Iterator[str]:
    for path in dict.fromkeys([*a, *b]):
        if path not in a or path not in b:
            yield f"{path}: only in the {'first' if path in a else 'second'}"
            continue
        x, y = a[path], b[path]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            yield f"{path}: {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        elif x.tobytes() != y.tobytes():
            p, q = x.astype(np.float64), y.astype(np.float64)
            gap = np.abs(p - q)
            relative = np.linalg.norm(p - q) / max(np.linalg.norm(p), 1e-300)
            count = int(np.sum(gap != 0))
            yield (
                f"{path}: {count:,} of {x.size:,} elements differ, by up to {gap.max():.3g}; "
                f"norm of the difference over the norm {relative:.3g}"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
