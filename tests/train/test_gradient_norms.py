"""Norms by group of layers: parts of the whole, the same in both layouts."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.base import metrics
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.train import optimizer as optimizers


@pytest.mark.parametrize(("layers", "groups"), [(2, 1), (4, 4), (6, 4)])
@pytest.mark.parametrize("pattern", [("global",), ("local", "global")])
def test_groups_are_parts_of_the_whole_in_both_layouts(layers, groups, pattern):
    config = ModelConfig(vocab_size=32, layers=layers, width=16, heads=2, pattern=pattern, window=4).complete()
    stacked, unrolled = (define_model(dataclasses.replace(config, scan_layers=scan)) for scan in (True, False))
    params = initialize(stacked, 0)
    found = optimizers.norms_by_group(params, stacked)
    assert {*found} == {"embedding", "head", *(f"layers_{n}" for n in range(1, groups + 1))}
    assert {f"train/gradient_norm/{name}" for name in found} <= {*metrics.NAMES}
    whole = np.sqrt(sum(np.square(float(norm)) for norm in found.values()))
    assert whole == pytest.approx(float(optimizers.global_norm(params)), rel=1e-6)
    apart = optimizers.norms_by_group(initialize(unrolled, 0), unrolled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, apart)


def test_a_quarter_holds_its_layers():
    definition = define_model(ModelConfig(vocab_size=32, layers=8, width=16, heads=2, scan_layers=False).complete())
    only = jax.tree.map(np.zeros_like, initialize(definition, 0))
    only["layers"]["5"]["mlp"]["up"][0, 0] = 3.0
    norms = optimizers.norms_by_group(only, definition)
    assert {name: float(norm) for name, norm in norms.items() if norm} == {"layers_3": 3.0}
