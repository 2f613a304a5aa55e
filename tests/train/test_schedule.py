import numpy as np
import pytest

from jaxlm.train.config import ScheduleConfig
from jaxlm.train.schedule import learning_rate


def rates(steps=100, **fields):
    config = ScheduleConfig(peak=2.0, warmup_steps=10, final_share=0.1, **fields)
    return np.array([float(learning_rate(config, step, steps)) for step in range(steps)])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_warms_up_peaks_and_ends_at_the_final_share(kind):
    got = rates(kind=kind)
    np.testing.assert_allclose(got[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(got.max(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(got[-1], 0.2, rtol=1e-5)
    assert (np.diff(got[10:]) <= 1e-6).all()


def test_wsd_is_flat_until_the_last_fifth():
    got = rates(kind="wsd", decay_share=0.2)
    np.testing.assert_allclose(got[10:80], 2.0, rtol=1e-6)
    assert got[85] < 2.0


def test_cosine_is_halfway_in_the_middle():
    got = rates(kind="cosine", steps=112)
    np.testing.assert_allclose(got[60], (2.0 + 0.2) / 2, rtol=1e-5)


def test_linear_falls_evenly():
    got = np.diff(rates(kind="linear")[10:])
    np.testing.assert_allclose(got, got[0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_more_warm_up_than_steps_is_all_warm_up(kind):
    assert learning_rate(ScheduleConfig(peak=1.0, warmup_steps=50, kind=kind), 4, 5) <= 1.0


def test_a_rate_that_never_falls_is_told(caplog):
    learning_rate(ScheduleConfig(peak=1.0, warmup_steps=4), 0, 5)
    assert not caplog.text
    learning_rate(ScheduleConfig(peak=1.0, warmup_steps=100), 0, 50)
    assert "schedule.warmup_steps: the run's 50 steps all warm up, and the rate never falls" in caplog.text
