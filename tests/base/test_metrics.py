import jax.numpy as jnp
import pytest

from jaxlm.base import metrics
from jaxlm.base.metrics import Mean


def test_means_of_unequal_pieces_are_divided_once():
    # Four losses of 1 and two of 2: (4 + 4) / 6, not the mean 1.5 of the pieces' means.
    pieces = [{"loss": Mean(jnp.float32(4), jnp.float32(4))}, {"loss": Mean(jnp.float32(4), jnp.float32(2))}]
    assert metrics.values(metrics.merge(*pieces))["loss"] == pytest.approx(4 / 3)
