"""The release gate: results against a file of thresholds → a verdict that names each reason.

    {"passed": false, "reasons": ["safe: safety.refusal is 0.300 (0.181 to 0.454); ..."],
     "checks": [{"name", "figure", "passed", "reason", "value", "interval", "limit"}, ...],
     "thresholds": {"file", "sha256"}, "results": {"file", "sha256"}, "created": "2026-01-02T03:04:05Z"}

A figure that is missing is refused with that reason: nothing passes for want of evidence. `config.Threshold` says how
intervals count; against a baseline it is the difference's interval (`intervals.difference`).
"""

import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, manifest
from jaxlm.base.errors import ConfigError, UserError, nearest
from jaxlm.evaluate import intervals
from jaxlm.evaluate.config import GateConfig, Threshold

DEFAULT = epath.Path(__file__).parent / "data" / "gate.json"


def path_of(given: str) -> epath.Path:
    return DEFAULT if given == "default" else epath.Path(given)


def read(given: str) -> GateConfig:
    """The thresholds of a file. Raises UserError by file and field."""
    path = path_of(given)
    if not path.exists():
        raise UserError(f"gate: no such file: {given}; default stands for the thresholds that come with jaxlm")
    values = files.read_json(path)
    if not isinstance(values, dict) or "thresholds" not in values:
        raise UserError(f'{path}: holds no {{"thresholds": [...]}}')
    try:
        return configs.from_dict(GateConfig, values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def verdict(results: Mapping[str, Any], gate: GateConfig, baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Whether the results pass, and why not."""
    checks = [check(threshold, results, baseline) for threshold in gate.thresholds]
    reasons = [f"{found['name']}: {found['reason']}" for found in checks if not found["passed"]]
    return {"passed": not reasons, "reasons": reasons, "checks": checks}


def check(threshold: Threshold, results: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """One threshold against the results."""
    figure, problem = figure_at(results, threshold.figure)
    label, against = threshold.figure, {}
    if figure and threshold.compared == "baseline":
        before, problem = figure_at(baseline or {}, threshold.figure)
        problem = "there is no baseline; name an evaluate folder with baseline" if baseline is None else problem
        if before:
            against = {"own": figure["value"], "baseline": before["value"]}
            label += f" - the baseline's ({figure['value']:.3f} - {before['value']:.3f})"
            figure = intervals.difference(figure, before)
        else:
            figure, problem = None, f"baseline: {problem}"
    told = {"name": threshold.name, "figure": threshold.figure, "compared": threshold.compared, **against}
    limit = threshold.least if threshold.least is not None else threshold.most
    wanted = f"at {'least' if threshold.least is not None else 'most'} {limit:g}"
    if figure is None:
        hint = f"; {threshold.missing}" if threshold.missing else ""
        return told | {"passed": False, "reason": f"{problem}{hint}", "value": None, "interval": None, "limit": wanted}
    interval = figure.get("interval")
    told |= {"value": figure["value"], "interval": interval, "limit": wanted}
    if threshold.end != "value" and not interval:
        return told | {"passed": False, "reason": f"{label} is {figure['value']:.3f} without an interval: one example"}
    held = held_to(threshold, figure["value"], interval)
    passed = held >= threshold.least if threshold.least is not None else held <= (threshold.most or 0.0)
    shown = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    of = "it" if threshold.end == "value" else f"its {threshold.end} end"
    reason = f"{label} is {figure['value']:.3f}{shown}; {wanted} is asked of {of}"
    return told | {"passed": passed, "reason": reason}


def held_to(threshold: Threshold, value: float, interval: list[float] | None) -> float:
    """The number that must keep the limit."""
    if threshold.end == "value" or not interval:
        return value
    lower_is_asked = (threshold.end == "worse") == (threshold.least is not None)
    return interval[0] if lower_is_asked else interval[1]


def figure_at(results: Mapping[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """(the figure at a dotted path, "") or (None, why there is none)."""
    node: Any = results
    rest, at = path, ""
    while rest:
        names = [name for name in node if isinstance(name, str)] if isinstance(node, Mapping) else []
        # A task may be called v1.2: the longest name goes first.
        part = max((name for name in names if f"{rest}.".startswith(f"{name}.")), key=len, default="")
        if not part or node[part] is None:
            first = rest.partition(".")[0]
            # Only a close name is a hint: what was not asked for has no neighbours that help.
            beside = nearest(first, names) if first not in names else ""
            return None, f"{at}{first} was not measured{beside if 'did you mean' in beside else ''}"
        node, rest, at = node[part], rest[len(part) + 1 :], f"{at}{part}."
        if isinstance(node, Mapping) and node.get("no_evidence"):
            return None, f"{at[:-1]}: {node['no_evidence']}"
    value = node.get("value") if isinstance(node, Mapping) else node
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None, f"{path} is {node if not isinstance(node, Mapping) else 'no single figure'}"
    return (dict(node) if isinstance(node, Mapping) else {"value": float(value), "interval": None}), ""


def record(model: epath.PathLike, verdict: Mapping[str, Any], read_from: Mapping[str, epath.Path]) -> dict[str, Any]:
    """Writes the verdict into the model's manifest, as facts["gate"]; returns it as it stands there.

    `read_from`: what it was reached by, "thresholds", "results", "baseline" → file, of which the hashes are kept. The
    manifest's other fields stay, and its hash too, which facts are no part of.
    """
    hashes = {name: {"file": str(path), "sha256": files.sha256(path)} for name, path in read_from.items()}
    kept = dict(verdict) | hashes | {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    manifest.add_facts(model, {"gate": kept})
    return kept
