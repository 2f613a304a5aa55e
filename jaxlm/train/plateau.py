"""The rule that says when the held-out error has stopped falling."""

from collections.abc import Sequence

from jaxlm.train.config import PlateauConfig


def stopped_falling(figures: Sequence[float], config: PlateauConfig) -> bool:
    """Whether the best of the last `evaluations` figures is not below the best before by `least_improvement` of it.

    >>> stopped_falling([3.0, 2.0, 1.999, 2.001], PlateauConfig(evaluations=2, least_improvement=0.01))
    True
    """
    recent = config.evaluations
    if not recent or len(figures) <= recent:
        return False
    return min(figures[-recent:]) > min(figures[:-recent]) * (1 - config.least_improvement)
