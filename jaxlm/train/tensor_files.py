"""safetensors files, read and written with one tensor in memory at a time."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
from etils import epath

from jaxlm.base import files

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which no more is read than a slice takes; the methods are those of safetensors' slices.

    The file is mapped for each slice anew: pages of one that stays mapped count for the process, all that was read.
    """

    path: epath.PathLike
    name: str
    shape: list[int]
    kind: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.kind

    def __getitem__(self, index: Any) -> np.ndarray:
        with safetensors.safe_open(self.path, framework="np") as file:
            return file.get_slice(self.name)[index]


def read(path: epath.PathLike) -> dict[str, Stored]:
    """A file's tensors by name. Raises SafetensorError or OSError for one that is not sound."""
    with safetensors.safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: Stored(path, name, x.get_shape(), x.get_dtype()) for name, x in slices.items()}


def write(
    path: epath.PathLike,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    made: str,
) -> None:
    """A file of the arrays, which come in the order of `shapes`, name → (type, shape), with larger types first.

    safetensors' own `save` holds a file's tensors three times over. `made`: whose format it is, as readers ask for.
    """
    path, at, header = epath.Path(path), 0, dict[str, Any](__metadata__={"format": made})
    for name, (kind, shape) in shapes.items():
        end = at + kind.itemsize * math.prod(shape)
        header[name], at = {"dtype": KINDS[kind.name], "shape": shape, "data_offsets": [at, end]}, end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin where eight bytes do
    part = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for (name, (kind, shape)), array in zip(shapes.items(), arrays, strict=True):
                if (array.dtype, array.shape) != (kind, shape):
                    raise ValueError(f"{name}: got {array.dtype}{array.shape}, declared {kind}{shape}")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                del array  # the next one is made without it
        part.replace(path)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
