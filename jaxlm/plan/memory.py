"""What a step needs of a device's memory, by part, and which changes of the config would make it fit.

The compiler says how much a compiled step needs; nothing is allocated for it, so that a step that ran out of memory
can be taken apart in the same process.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxlm.base import sharding
from jaxlm.base.config import override
from jaxlm.base.errors import JaxlmError, out_of_room
from jaxlm.train import model_directory
from jaxlm.train.state import Program

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SUGGESTIONS = 3
MOST_TRIED = 8
"""changes that are compiled to see what they would need"""

Build = Callable[[Any, Any], Program]


class Need(NamedTuple):
    """Bytes of one device."""

    parts: dict[str, int]
    """parameters, optimizer, average, other state, frozen base, batch, temporaries (activations, gradients, logits)"""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def need(program: Program) -> Need:
    """Compiles the step. Raises what the compiler raises where even that finds no room."""
    stored = stored_parts(program)
    with jax.set_mesh(program.mesh):
        found = program.step.lower(program.abstract_state, program.abstract_batch).compile().memory_analysis()
    # The state is donated: most outputs take the place of arguments.
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return Need(stored | {"temporaries": found.temp_size_in_bytes + max(made, 0)})


def stored_parts(program: Program) -> dict[str, int]:
    """What lies on one device from step to step, by part."""
    parts: dict[str, int] = dict.fromkeys(
        ("parameters", "optimizer", "average", "other state", "frozen base", "batch"), 0
    )
    names = {"params": "parameters", "optimizer": "optimizer", "ema": "average"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state):
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        parts[next((names[field] for field in fields if field in names), "other state")] += shard_bytes(leaf)
    batch = dict(program.abstract_batch)
    parts["frozen base"] = sum(map(shard_bytes, jax.tree.leaves(batch.pop("base", {}))))
    if teacher := batch.pop("teacher", {}):
        parts["teacher"] = sum(map(shard_bytes, jax.tree.leaves(teacher)))
    parts["batch"] = sum(map(shard_bytes, jax.tree.leaves(batch)))
    return parts


def shard_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def candidates(config: Any) -> Iterator[tuple[dict[str, str], str]]:
    """(changes, what they cost), the cheapest first; the trained numbers stay the same but for the last."""
    rows, length = getattr(config, "batch_rows", 0), getattr(config, "row_length", 0)
    pieces, chunk = getattr(config, "accumulate", 0), getattr(config, "loss_chunk_tokens", None)
    if chunk == 0 and rows and length and pieces:
        for parts in (4, 16):
            if rows * length // pieces % parts == 0:
                yield (
                    {"loss_chunk_tokens": str(rows * length // pieces // parts)},
                    "logits piece by piece, a bit slower",
                )
    for factor in (2, 4, 8) if pieces else ():
        if rows % (pieces * factor) == 0:
            yield {"accumulate": str(pieces * factor)}, "the same batch in more pieces"
    if getattr(config.model, "remat", "full") != "full":
        yield {"model.remat": "full"}, "activations are computed again, up to a third slower"
    sizes = dataclasses.asdict(config.mesh)
    data = config.mesh.sizes(jax.device_count())["data"]
    if data > 1 and sizes["fsdp"] == 1:
        yield {"mesh.data": "1", "mesh.fsdp": str(data)}, "parameters and optimizer state shared out, more traffic"
    if rows > 1 and rows % 2 == 0 and pieces:
        yield {"batch_rows": str(rows // 2), "accumulate": str(max(1, pieces // 2))}, "a smaller batch: other numbers"


def what_fits(config: Any, build: Build, most: int, least: int | None) -> list[tuple[dict[str, str], str, int]]:
    """(changes, cost, bytes they need) of the first that need less than `least` (None: than `most`): single changes
    and, while these are too few, all of the first ones together."""
    fitting = []
    tried = list(candidates(config))[:MOST_TRIED]
    for changes, cost in [*tried, *_combined(tried)]:
        try:
            other = override(config, changes)
            total = need(build(other, sharding.make_mesh(other.mesh))).total
        except Exception:  # does not fit together, or finds no room either
            continue
        if total < (most if least is None else min(most, least)):
            fitting.append((changes, cost, total))
        if len(fitting) == SUGGESTIONS:
            break
    return fitting


def _combined(tried: list[tuple[dict[str, str], str]]) -> Iterator[tuple[dict[str, str], str]]:
    together: dict[str, str] = {}
    for number, (changes, _) in enumerate(tried):
        together = together | changes
        if number:
            yield dict(together), "all of these together"


def capacity(error: BaseException) -> int | None:
    """A device's bytes: as the error tells (TPU's compiler does), or the device; None where nobody knows."""
    if found := re.search(r"of ([\d.]+)([KMGT]?)i?B? hbm", str(error)):
        return int(float(found[1]) * UNITS[found[2]])
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("bytes_limit")


def used(error: BaseException) -> int | None:
    """What the compiler says that a step would have needed."""
    found = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of", str(error))
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def explain(module: Any, config: Any, error: BaseException) -> str:
    """The whole message about a RESOURCE_EXHAUSTED: the parts, and the three cheapest changes that would fit."""
    config = _complete(module, config)
    program = module.build(config, sharding.make_mesh(config.mesh))
    room = capacity(error)
    try:
        parts = need(program).parts
    except JaxlmError:
        raise
    except Exception:  # the compiler itself found no room
        parts = stored_parts(program)
        parts["temporaries"] = max((used(error) or 0) - sum(parts.values()), 0)
    total = sum(parts.values())
    lines = [f"out of memory: {str(error).splitlines()[0]}", f"one device needs {size(total)}" + _of(room)]
    lines += [f"  {name:12} {size(bytes_):>10}" for name, bytes_ in parts.items() if bytes_]
    found = what_fits(config, module.build, max(total, 1), room)
    told = "would fit, the cheapest first" if room else "would need less, the cheapest first"
    lines += [told + ":"] if found else [out_of_room(error).rpartition("; ")[2]]
    for changes, cost, bytes_ in found:
        flags = " ".join(f"--config.{field}={value}" for field, value in changes.items())
        lines.append(f"  {flags}: {size(bytes_)} ({cost})")
    return "\n".join(lines)


def _of(room: int | None) -> str:
    return f", and has {size(room)}:" if room else ":"


def size(count: float) -> str:
    """
    >>> size(3 * 2**30), size(5000)
    ('3.00 GiB', '4.9 KiB')
    """
    for unit, digits in (("GiB", 2), ("MiB", 1)):
        if count >= UNITS[unit[0]]:
            return f"{count / UNITS[unit[0]]:.{digits}f} {unit}"
    return f"{count / 1024:.1f} KiB"


def _complete(module: Any, config: Any) -> Any:
    """The config with the sizes that the stage derives from what it reads."""
    if config.stage == "pretrain":
        return module.complete(config)
    new: dict[str, Any] = {"steps": getattr(config, "steps", 0) or 1}
    if getattr(config, "row_length", None) == 0:
        folder = epath.Path(config.model)
        folder = folder / "model" if (folder / "model").exists() else folder
        new["row_length"] = model_directory.read(folder, verify=False).row_length_or(0)
    return dataclasses.replace(config, **new)
