"""Where two runs first differ: config, versions, inputs, metrics, and, at the checkpoints that both have, arrays.

    python tools/diff_runs.py runs/a runs/b
    python tools/diff_runs.py runs/a runs/b --tolerance=1e-5        metrics that differ by less, relatively, are alike

Says for each of these what differs, then the first step at which a metric does, and the first checkpoint in which an
array does: which, in the order of the layers, and by how much. Exit code: 0 nothing differs, 1 something does, 2 a
folder is no run.
"""

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import inspect_checkpoint
import numpy as np
from etils import epath

from jaxlm.base import files
from jaxlm.base.config import differences
from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.train import step_folder

# What only tells the time; names that end in _seconds do too.
TIMES = ("time", "train/tokens_per_second", "train/mfu", "train/data_wait", "train/goodput")
SHOWN = 8


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of metrics that counts")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    runs = epath.Path(options.a), epath.Path(options.b)
    try:
        for run in runs:
            if not (run / "config.json").exists():
                raise UserError(f"{run}: is no run's folder (it has no config.json)")
        found = {
            "config": list(config(*runs)),
            "versions": list(versions(*runs)),
            "inputs": list(inputs(*runs)),
            "metrics": list(metrics(*runs, options.tolerance)),
            "arrays": list(arrays(*runs)),
        }
    except JaxlmError as error:
        print(f"diff_runs: {error}", file=sys.stderr)
        return 2
    for name, lines in found.items():
        print(f"{name}: {'alike' if not lines else 'DIFFER'}")
        print("".join(f"  {line}\n" for line in lines[:SHOWN]), end="")
        if len(lines) > SHOWN:
            print(f"  ... and {len(lines) - SHOWN} more")
    return 1 if any(found.values()) else 0


def config(a: epath.Path, b: epath.Path) -> Iterator[str]:
    """Every field of the config but the folder."""
    kept = [files.read_json(run / "config.json")["config"] for run in (a, b)]
    for field, old, new in differences(*kept):
        if field not in ("workdir", "name"):
            yield f"{field}: {old!r} and {new!r}"


def versions(a: epath.Path, b: epath.Path) -> Iterator[str]:
    """Of libraries and of the code, where both runs are finished."""
    kept = [_optional(run / "manifest.json") for run in (a, b)]
    if not all(kept):
        return
    pick = lambda read: read.get("versions", {}) | {"commit": read.get("commit", "")}
    for name, old, new in differences(pick(kept[0]), pick(kept[1])):
        yield f"{name}: {old} and {new}"


def inputs(a: epath.Path, b: epath.Path) -> Iterator[str]:
    """What was read, by its content, wherever it lies."""
    first, second = (
        _optional(run / "inputs.json") or _optional(run / "manifest.json").get("inputs", {}) for run in (a, b)
    )
    for (path, old), (other, new) in zip(first.items(), second.items(), strict=False):
        if old != new:
            yield f"{path} and {other}: other content"
    if len(first) != len(second):
        yield f"{len(first)} and {len(second)} inputs"


def metrics(a: epath.Path, b: epath.Path, tolerance: float) -> Iterator[str]:
    """The values of the first step at which any differs, and steps that one run alone has."""
    first, second = (_by_step(run / "metrics.jsonl") for run in (a, b))
    for step in sorted(first.keys() & second.keys()):
        wrong = list(_unlike(first[step], second[step], tolerance))
        if wrong:
            yield f"first at step {step}: " + "; ".join(wrong)
            break
    if alone := sorted(first.keys() ^ second.keys()):
        yield f"{len(alone)} steps have a line in one run only, the first is {alone[0]}"


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    for name in dict.fromkeys([*one, *other]):
        x, y = one.get(name), other.get(name)
        close = isinstance(x, float) and isinstance(y, float) and math.isclose(x, y, rel_tol=tolerance)
        if x != y and not close:
            yield f"{name} {x} and {y}"


def _by_step(path: epath.Path) -> dict[int, dict[str, Any]]:
    """Step → all values of its lines, times excepted."""
    steps: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            kept = {n: x for n, x in line.items() if n not in TIMES and not n.endswith("_seconds")}
            steps[line["step"]] = steps.get(line["step"], {}) | kept
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path}:{number}: is no line of metrics; a run writes one object with its step") from None
    return steps


def arrays(a: epath.Path, b: epath.Path) -> Iterator[str]:
    """The arrays of the first checkpoint that both have and that differs, the layers in order, moments last.

    Checksums tell which step it is, so that only that one is read.
    """
    shared = [set(step_folder.list_steps(run / "checkpoints")) for run in (a, b)]
    for step in sorted(shared[0] & shared[1]):
        folders = [run / "checkpoints" / str(step) for run in (a, b)]
        try:
            kept = [step_folder.read(folder).arrays for folder in folders]
            if kept[0] == kept[1]:
                continue
            found = [inspect_checkpoint.open_folder(folder).arrays for folder in folders]
        except step_folder.Damaged as damage:
            yield f"checkpoint {step}: DAMAGED: {damage}"
            continue
        yield f"first at checkpoint {step}:"
        ordered = [{path: each[path] for path in sorted(each, key=depth)} for each in found]
        for line in inspect_checkpoint.differences(*ordered):
            yield line + first_layer(line.partition(": ")[0], *ordered)
        return


def first_layer(path: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> str:
    """Of stacked layers that differ, the first that does."""
    if "layers/" not in path or re.search(r"layers/\d", path) or path not in a or path not in b:
        return ""
    layers = range(min(len(a[path]), len(b[path])))
    differ = [n for n in layers if a[path][n].tobytes() != b[path][n].tobytes()]
    return f"; first in layer {differ[0]}" if differ else ""


def depth(path: str) -> tuple[Any, ...]:
    """Parameters before what the optimizer keeps; embedding, layers by number, the rest."""
    layer = re.search(r"layers/(\d+)/", path)
    place = 0 if "embedding" in path else 1 if "layers" in path else 2
    return not path.startswith(("params", "policy/params")), place, int(layer[1]) if layer else 0, path


def _optional(path: epath.Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
