"""The rule that says when the held-out error has stopped falling."""

import math
from collections.abc import Sequence

from jaxlm.train.config import PlateauConfig


def stopped_falling(figures: Sequence[float | None], config: PlateauConfig) -> bool:
    """Whether the best of the last `evaluations` figures is not below the best before by `least_improvement` of it.

    None is a figure that was not finite.

    >>> stopped_falling([3.0, 2.0, 1.999, 2.001], PlateauConfig(evaluations=2, least_improvement=0.01))
    True
    """
    recent = config.evaluations
    if not recent or len(figures) <= recent:
        return False
    values = [math.inf if figure is None else figure for figure in figures]
    return min(values[-recent:]) > min(values[:-recent]) * (1 - config.least_improvement)
