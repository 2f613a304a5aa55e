from jaxlm.train.config import PlateauConfig
from jaxlm.train.plateau import stopped_falling


def test_by_hand():
    rule = PlateauConfig(evaluations=2, least_improvement=0.01)
    assert not stopped_falling([3.0, 2.0], rule), "nothing to compare with yet"
    assert not stopped_falling([3.0, 2.0, 1.9], rule)
    assert stopped_falling([3.0, 2.0, 1.999, 2.001], rule), "0.05 % below the best before"
    assert not stopped_falling([3.0, 2.0, 2.1, 1.979], rule), "1.05 % below it, if late"
    assert not stopped_falling([3.0, 3.0, 3.0, 3.0], PlateauConfig()), "off"


def test_what_is_not_finite_is_no_improvement():
    rule = PlateauConfig(evaluations=2)
    assert stopped_falling([2.0, None, None], rule)
    assert not stopped_falling([None, None, 2.0], rule)


def test_a_rise_counts_as_not_falling():
    assert stopped_falling([2.0, 2.5, 2.6], PlateauConfig(evaluations=2))
