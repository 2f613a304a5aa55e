"""The figures in an evaluation's results: {"value", "interval", "n"} at dotted names."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.base.logging import logger

Figures = Iterator[tuple[str, dict[str, Any]]]


def figures_in(node: Mapping[str, Any], path: str = "") -> Figures:
    """(dotted name, figure) of all figures in results, in their order.

    >>> dict(figures_in({"tasks": {"a": {"score": {"value": 0.5, "interval": None}}}}))
    {'tasks.a.score': {'value': 0.5, 'interval': None}}
    """
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if "value" in value and "interval" in value:
                yield name, dict(value)
            yield from figures_in(value, name)


def headlines(results: Mapping[str, Any]) -> Figures:
    """The figure of each part that has no bits per byte: what it is about comes first in it."""
    for part, node in results.items():
        inside = node.values() if part == "tasks" else [node]
        names = [f"{part}.{name}" for name in node] if part == "tasks" else [part]
        for name, each in zip(names, inside, strict=True):
            found = list(figures_in({name: each}))
            yield from found[:1]


def said(figure: Mapping[str, Any]) -> str:
    """
    >>> said({"value": 0.5, "interval": [0.4, 0.6]})
    '0.500 (0.400 to 0.600)'
    """
    interval = figure["interval"]
    return f"{figure['value']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def summary_of(results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The stage's line in `run`'s table: bits per byte where they were measured, else the first share."""
    measured = [results["heldout"]] if "heldout" in results else []
    measured += [*results.get("texts", {}).values(), *results.get("chats", {}).values()]
    first = next(iter(measured), None)
    if first:
        beside = f" (xz -9: {first['xz_bits_per_byte']:.3f})" if "xz_bits_per_byte" in first else ""
        figure = f"{first['bits_per_byte']['value']:.3f} bits per byte{beside}"
    else:
        name, shown = next(headlines(results), ("nothing", None))
        figure = f"{name} {shown['value']:.3f}" if shown else name
    tokens = sum(result["tokens"] for result in measured)
    return {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
        "figure": figure,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """A part's figures in the log."""
    lines = [f"{label} {said(figure)}" for label, figure in figures_in(result) if "by_" not in label]
    counts = [f"{result[key]} {key}" for key in ("documents", "tokens", "bytes") if key in result]
    xz = [f"xz -9 {result['xz_bits_per_byte']:.3f}"] if "xz_bits_per_byte" in result else []
    logger.info("%s: %s", name, "; ".join([*lines, *xz, *counts]))
