"""The gate's verdict on an evaluation, with what only the gate reads: the error's curve, the baseline."""

from typing import Any

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.evaluate import curve, gate, lineage
from jaxlm.evaluate.config import EvaluateConfig


def judged(config: EvaluateConfig, results: dict[str, Any], family: list[lineage.Ancestor]) -> dict[str, Any]:
    """The gate's verdict; puts the error's curve into the results."""
    thresholds = gate.read(config.gate)
    path = lineage.curve_path(family, config.curve)
    nothing = f"neither the model's run nor one before it has {lineage.METRIC} in its metrics.jsonl; name one: curve"
    results["curve"] = (
        curve.slope(curve.read(path), thresholds.decayed_share) | {"run": str(path.parent)}
        if path
        else {"no_evidence": nothing}
    )
    baseline = files.read_json(baseline_results(config)) if config.baseline else None
    return gate.verdict(results, thresholds, baseline)


def baseline_results(config: EvaluateConfig) -> epath.Path:
    path = epath.Path(config.baseline) / "results.json"
    if not path.exists():
        raise UserError(f"baseline: {config.baseline} holds no results.json; give an evaluate stage's folder")
    return path
