"""What the tests against TRL share: what makes its numbers, and jaxlm's model with the same weights."""

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import make_trl_numbers as tool
import numpy as np
import pytest

from jaxlm.model import layout
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params

HERE = Path(__file__).parent
PYTHON = os.environ.get("JAXLM_TRL_PYTHON", "")

Numbers = dict[str, dict[str, Any]]
"""Figures of each case, by name."""

# Float32 on both sides, summed in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


SHAPE = ModelConfig(
    vocab_size=tool.V,
    layers=tool.L,
    width=tool.D,
    heads=tool.H,
    kv_heads=tool.K,
    head_size=tool.N,
    feed_forward=tool.F,
    qk_norm=True,
    norm_epsilon=tool.EPSILON,
    rope_base=tool.ROPE_BASE,
    compute="float32",
).complete()


def numbers(request: pytest.FixtureRequest, name: str, stored: Numbers) -> Numbers:
    """TRL's: the stored ones, or those that `name`.py prints now, which are held to the stored ones first."""
    if request.param == "stored":
        return stored
    run = subprocess.run([PYTHON, HERE / f"{name}.py"], stdout=subprocess.PIPE, text=True, check=True)
    fresh = json.loads(run.stdout.splitlines()[-1])
    del fresh["versions"]
    assert fresh.keys() == stored.keys()
    for case, figures in fresh.items():
        assert figures.keys() == stored[case].keys()
        for figure, value in figures.items():
            # Some are exactly 0 in real numbers.
            close(value, stored[case][figure], atol=1e-7, err_msg=f"{case}, {figure}")
    return fresh


SOURCES = ["stored", "fresh"] if PYTHON else ["stored"]


def weights(model: str, shape: ModelConfig) -> tuple[Definition, Params]:
    """The tool's numbers, stacked as the stages take them."""
    params: Params = {}
    for path, declared in define_model(dataclasses.replace(shape, scan_layers=False)):
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        # A score's bias begins at 0; TRL's reward head has none.
        bias = path == ("score_bias",)
        value = np.zeros(declared.shape, np.float32) if bias else tool.weight(model, "/".join(path), declared.shape)
        node[path[-1]] = jnp.asarray(value)
    return define_model(shape), layout.stack(params, shape)
