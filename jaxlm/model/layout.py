"""Between the layouts of the layers: stacked for the scan, unrolled one by one. Works on parameters and all trees
shaped like them (moments, averages, gradients), arrays or abstract."""

from typing import Any

import jax

from jaxlm.model.config import ModelConfig
from jaxlm.model.weights import Params


def unroll(params: Params, config: ModelConfig) -> Params:
    """{"lead": ..., "stack": {p: [L/P, ...]}, "tail": ...} → {"layers": {"0": ..., ...}}; other entries as they are."""
    if "layers" in params:
        return params
    first, P, end = config.groups()
    layers: dict[str, Any] = {
        str(first + i): jax.tree.map(lambda x, row=i // P: _row(x, row), params["stack"][str(i % P)])
        for i in range(end - first)
    }
    layers |= params.get("lead", {}) | params.get("tail", {})
    return {name: value for name, value in params.items() if name not in ("lead", "stack", "tail")} | {"layers": layers}


def stack(params: Params, config: ModelConfig) -> Params:
    """The inverse of `unroll`."""
    if "layers" not in params:
        return params
    first, P, end = config.groups()
    layers = params["layers"]
    rest = {name: value for name, value in params.items() if name != "layers"}
    if first:
        rest["lead"] = {str(i): layers[str(i)] for i in range(first)}
    if first < end:
        rest["stack"] = {
            str(p): jax.tree.map(lambda *rows: _stack(rows), *(layers[str(i)] for i in range(first + p, end, P)))
            for p in range(P)
        }
    if end < config.layers:
        rest["tail"] = {str(i): layers[str(i)] for i in range(end, config.layers)}
    return rest


def _row(x: Any, row: int) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[row]


def _stack(rows: tuple[Any, ...]) -> Any:
    first = rows[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *first.shape), first.dtype)
    return jax.numpy.stack(rows)
