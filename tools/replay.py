"""Takes a bad step again, from its black box, on whatever device is here: one CPU will do.

    python tools/replay.py runs/base 71                       the step that WORKDIR/blackbox/71 keeps
    python tools/replay.py runs/base 71 --no-search           without looking for the first number that is not finite

Prints the loss, the gradient's norm by group of layers, the rows and documents of the batch, and the operation that
first gave a number that is not finite. For stages that begin with a model, that model has to be there. To go on without
a document: --config.data.0.exclude=document:345 with the run's own command (pretrain, sft), or
--config.exclude=prompt-7 (reward, preference, rl). In reinforcement learning a step is an update.
Exit code: 0 the step is bad again, 1 it is good here, 2 there is nothing to replay.
"""

import argparse
import dataclasses
import logging
import math
import sys
from typing import Any

import jax
from etils import epath

from jaxlm.__main__ import config_class, load_stage
from jaxlm.base import config as configs
from jaxlm.base import files, metrics, sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.replay.blackbox import without_frozen
from jaxlm.replay.nonfinite import first_nonfinite
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig
from jaxlm.train.state import Program


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    parser.add_argument("step", type=int)
    parser.add_argument("--no-search", action="store_true", help="do not look for the first non-finite number")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return replay(epath.Path(options.workdir) / "blackbox" / str(options.step), options.step, not options.no_search)
    except JaxlmError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


def replay(folder: epath.Path, step: int, search: bool) -> int:
    if not folder.exists():
        kept = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.exists() else []
        raise UserError(f"{folder}: does not exist; kept are {', '.join(kept) or 'no steps'}")
    record = files.read_json(folder / "record.json")
    program, state, batch = load(folder, step, record["config"])
    print(f"step {step}, as it was:")
    print("\n".join(f"  {name} {value}" for name, value in record["metrics"].items()))
    for row in record["rows"]:
        told = {key: ", ".join(map(str, x)) if isinstance(x, list) else str(x) for key, x in row.items()}
        print("  " + "  ".join(f"{key} {x}" for key, x in told.items()))
    where = first_nonfinite(program.step, state, batch) if search else {}
    with jax.set_mesh(program.mesh):
        after, measured = program.step(state, batch)
    values = metrics.values(measured)
    bad = int(after.halt) == step
    print(f"step {step}, again on {jax.devices()[0].device_kind}: {'bad' if bad else 'GOOD'}")
    for name, value in values.items():
        known = float(record["metrics"][name])
        same = value == known or (math.isnan(value) and math.isnan(known))
        print(f"  {name} {value:.8g}" + ("" if same else f"   (then {known:.8g})"))
    for kind, place in where.items():
        print(f"first {kind}: {place}")
    if search and not where:
        print("every number is finite")
    return 0 if bad else 1


def load(folder: epath.Path, step: int, values: dict[str, Any]) -> tuple[Program, Any, Any]:
    """(program, state before the step, its batch) on one device."""
    config = configs.from_dict(config_class(values["stage"]), values)
    config = dataclasses.replace(config, mesh=MeshConfig())
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = load_stage(values["stage"])
        program = getattr(stage, "build_update", stage.build)(config, mesh)
        checkpoints = Checkpointer(folder / "before", CheckpointConfig())
        wanted = {"state": program.abstract_state, "batch": without_frozen(program.abstract_batch)}
        found = checkpoints.restore(lambda layout: wanted, step=step - 1)
    checkpoints.close()
    assert found is not None
    return program, found.state["state"], found.state["batch"] | program.base()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
