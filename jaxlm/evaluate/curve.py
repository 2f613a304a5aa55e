"""Has the error stopped falling? The slope of held-out bits per byte at the end of a run.

    {"per_doubling": {"value": .012, "interval": [.008, .016]}, "per_1000_steps": {...}, "last": 0.871,
     "from_step": 5000, "to_step": 10000, "evaluations": 11, "learning_rate_share": .5}

Both figures are falls: bits a byte that the error falls for each doubling of the steps (least squares on log2 of the
step), and for 1000 more steps; 0 and below: it has stopped. The line goes through the evaluations after the learning
rate's decay, those where the rate is at most `decayed_share` of its peak: a rate that stays high hides what the model
has learnt, and one that goes down flattens every curve in the end, so that "stopped" says that this run is over, not
that a longer one would not reach further.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.evaluate.intervals import Figure
from jaxlm.evaluate.lineage import METRIC

LEAST_EVALUATIONS = 4
# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def read(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    if not path.exists():
        raise UserError(f"curve: no such file: {path}; a run's folder with metrics.jsonl is needed")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            read = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not valid JSON: {error}") from None
        if not isinstance(read, dict) or not isinstance(read.get("step"), int):
            raise UserError(f'{path}:{number}: is no line of metrics; {{"step": 7, ...}} is needed')
        lines.append(read)
    return lines


def slope(lines: Sequence[Mapping[str, Any]], decayed_share: float) -> dict[str, Any]:
    """The falls after the decay, or under "no_evidence" why there are none."""
    rates = [
        (line["step"], line["train/learning_rate"]) for line in lines if line.get("train/learning_rate") is not None
    ]
    points = [(line["step"], line[METRIC]) for line in lines if line.get(METRIC) is not None and line["step"] > 0]
    if not points:
        return {"no_evidence": f"the run's metrics.jsonl has no {METRIC}: it had no held-out text"}
    peak = max((rate for _, rate in rates), default=0.0)
    if not peak:
        return {"no_evidence": "the run's metrics.jsonl has no train/learning_rate"}
    low = [step for step, rate in rates if rate <= decayed_share * peak]
    # Only what is not followed by a higher rate is after the decay: warm-up is not.
    high = max((step for step, rate in rates if rate > decayed_share * peak), default=0)
    after = [(step, bits) for step, bits in points if step > high] if any(step > high for step in low) else []
    if not after:
        share = rates[-1][1] / peak
        return {
            "no_evidence": f"no evaluation stands after the learning rate's decay: it ends at {share:.0%} of its peak, "
            f"{decayed_share:.0%} or less is needed"
        }
    if len(after) < LEAST_EVALUATIONS:
        return {
            "no_evidence": f"after the learning rate's decay only {len(after)} of the {LEAST_EVALUATIONS} evaluations "
            "that are needed were made; lower loop.evaluate_every_steps"
        }
    steps, bits = (np.array(column, np.float64) for column in zip(*after, strict=True))
    return {
        "per_doubling": falling(np.log2(steps), bits),
        "per_1000_steps": falling(steps / 1000, bits),
        "last": float(bits[-1]),
        "from_step": int(steps[0]),
        "to_step": int(steps[-1]),
        "evaluations": len(steps),
        "learning_rate_share": rates[-1][1] / peak,
    }


def falling(x: np.ndarray, y: np.ndarray) -> Figure:
    """The negative slope of y on x by least squares, with Student's 95 % interval."""
    N = len(x)
    apart = x - x.mean()
    fall = -float(apart @ y / (apart @ apart))
    left = y - y.mean() + fall * apart
    error = student(N - 2) * math.sqrt(float(left @ left) / (N - 2) / float(apart @ apart))
    return {"value": fall, "interval": [fall - error, fall + error], "n": N}


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t; above 10 degrees of freedom by its expansion (Fisher, Cornish), to 2e-4."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))
