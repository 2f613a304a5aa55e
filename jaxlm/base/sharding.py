"""Where arrays lie: one mesh, one table from the names of array axes to the axes of the mesh.

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        x = constrain(x, "batch", "sequence", None)     # inside jit

All mesh axes are Auto: the partitioner fills in what the table does not say.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError

# Logical axis → mesh axes. The first part names axes of weights, the second axes of activations.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "latent": ("fsdp",),
    "experts": ("expert",),
    "routes": (),
    "norm": (),
    "positions": (),
    "criteria": (),
    "rank": (),
    "key": (),
    "batch": ("slices", "data", "fsdp", "expert"),
    "expert_batch": ("slices", "data", "fsdp"),
    "sequence": ("context",),
    "activation_mlp": ("tensor",),
    "activation_heads": ("tensor",),
    "activation_vocab": ("tensor",),
}

# A weight above this size that no mesh axis splits, although the mesh could, is refused.
LARGE_WEIGHT_BYTES = 64 * 2**20


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The one place where meshes are made. `devices` defaults to all of the run's."""
    devices = list(devices) if devices is not None else jax.devices()
    sizes = config.sizes(len(devices))
    shape = tuple(sizes.values())
    if config.slices > 1 and hasattr(devices[0], "slice_index"):
        within = (1, *shape[1:])
        across = (shape[0], *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names.

    >>> spec(("embed", "mlp"))
    PartitionSpec('fsdp', 'tensor')
    """
    parts = [RULES[name.removesuffix("_blocks")] if name else () for name in axes]
    used = [axis for part in parts for axis in part]
    if len(set(used)) < len(used):
        raise ValueError(f"axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def weight_sharding(mesh: Mesh, path: str, axes: Sequence[str | None], shape: Sequence[int], bytes_each: int = 4):
    """The sharding of a weight. Raises ConfigError when the mesh does not divide it or leaves it large and whole."""
    scales = any(str(axis).endswith("_blocks") for axis in axes)  # few enough to lie whole
    placed = fitting_spec(mesh.shape, axes, shape) if scales else spec(axes)
    for size, axis, part in zip(shape, axes, placed, strict=True):
        pieces = math.prod(mesh.shape[name] for name in _names(part))
        if size % pieces:
            raise ConfigError(
                f"mesh.{_names(part)[0]}", f"{pieces} does not divide axis {axis!r} (size {size}) of {path}"
            )
    pieces = math.prod(mesh.shape[name] for part in placed for name in _names(part))
    could_split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    if could_split and pieces == 1 and "rank" not in axes and math.prod(shape) * bytes_each > LARGE_WEIGHT_BYTES:
        raise ConfigError("mesh", f"{path} {tuple(shape)} would lie whole on every device; no axis of it is sharded")
    return NamedSharding(mesh, placed)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays `[B, S]`: rows over the data axes, positions over `context`."""
    return NamedSharding(mesh, spec(("batch", "sequence")))


def batch_pieces(sizes: Mapping[str, int]) -> int:
    """Into how many pieces a mesh of these axis sizes cuts the rows of a batch."""
    return math.prod(sizes[name] for name in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the table's placement under the current mesh; without a mesh, `x` itself.

    Axes that the mesh does not divide (one prompt on eight devices) stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(mesh.shape, axes, x.shape))


def fitting_spec(sizes: Mapping[str, int], axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """`spec`, but whole along the axes that a mesh of these `sizes` does not divide."""
    kept = [
        part if shape[at] % math.prod(sizes[name] for name in _names(part)) == 0 else None
        for at, part in enumerate(spec(axes))
    ]
    return PartitionSpec(*kept)


@functools.cache
def own_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Which of a global batch's rows this process must have: those that lie, whole or in part, on its devices.

    Where a row's positions or a layer's heads are divided among hosts (context, tensor), several have the same rows.
    """
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((rows, mesh.shape["context"])).values()
    return tuple(sorted({row for part in parts for row in range(*part[0].indices(rows))}))


def global_batch(mesh: Mesh, arrays: Mapping[str, np.ndarray], global_rows: int) -> dict[str, jax.Array]:
    """Global arrays `[global_rows, S, …]` from this process's `own_rows` of each (all processes call this together)."""
    own = own_rows(mesh, global_rows)
    place = {row: at for at, row in enumerate(own)}

    def whole(rows: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(global_rows)
            return rows[(slice(place[first], place[first] + end - first), *index[1:])]

        return jax.make_array_from_callback((global_rows, *rows.shape[1:]), batch_sharding(mesh), part)

    return {name: whole(rows) for name, rows in arrays.items()}


def global_array(sharding: NamedSharding, local: np.ndarray, global_shape: tuple[int, ...]) -> jax.Array:
    """A global array from the part of each process, which no two share (all processes call this together)."""
    return jax.make_array_from_process_local_data(sharding, local, global_shape)
