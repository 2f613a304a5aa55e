"""The dial against its own sources, by hand."""

import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.model.config import ModelConfig
from jaxlm.plan.depth import derive, matrix_parameters, round_log2


def dial(depth, **given):
    values = {"vocab_size": 32768, "row_length": 2048, "batch_rows": 0, "steps": 0, "peak": 0.0} | given
    return derive(depth, values.pop("model", ModelConfig()), **values)


def test_twelve_layers_by_hand():
    found = dial(12)
    model = found.model
    assert (model.layers, model.width, model.heads, model.head_size) == (12, 768, 12, 64)
    per_layer = 4 * 768 * 768 + 3 * 768 * model.feed_forward
    parameters = 12 * per_layer + 768 * 32768
    assert matrix_parameters(model) == parameters
    tokens = found.steps * found.batch_rows * 2048
    assert tokens == pytest.approx(20 * parameters, rel=1e-3)
    compute = 6 * parameters * 20 * parameters
    assert found.peak == pytest.approx(0.3118 * compute**-0.125)
    assert 0.7 < found.batch_rows * 2048 / (0.2920 * compute**0.3271) < 1.5


def test_deeper_is_larger_slower_and_longer():
    small, large = dial(6), dial(24)
    assert large.model.width == 4 * small.model.width
    assert large.batch_rows > small.batch_rows
    assert large.peak < small.peak
    assert large.steps > small.steps


def test_what_is_given_stays():
    found = dial(12, model=ModelConfig(width=512, heads=4), batch_rows=7, steps=11, peak=0.5)
    assert (found.model.width, found.model.heads, found.model.layers) == (512, 4, 12)
    assert (found.batch_rows, found.steps, found.peak) == (7, 11, 0.5)


def test_without_a_depth_the_missing_is_named():
    with pytest.raises(ConfigError):
        dial(0)


def test_nearest_powers_of_two():
    assert [1 << round_log2(value) for value in (0.1, 1.0, 1.4, 1.5, 2.8, 2.9, 100.0)] == [1, 1, 1, 2, 2, 4, 128]
