"""safetensors files, written with one tensor in memory at a time."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base import files

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
        part.replace(path)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
