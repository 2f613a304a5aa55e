import jax
import numpy as np

from jaxlm.base import rng


def bits(*names):
    return tuple(np.asarray(jax.random.key_data(rng.key(*names))).tolist())


def test_a_key_is_a_function_of_its_names_only():
    first = bits(0, "dropout", 7)
    rng.key(0, "init", "layers/query", 3)
    assert bits(0, "dropout", 7) == first
    traced = jax.jit(lambda step: jax.random.key_data(rng.key(0, "dropout", step)))(7)
    assert tuple(np.asarray(traced).tolist()) == first


def test_other_names_other_keys():
    names = [(0,), (1,), (0, "a"), (0, "b"), (0, 0), (0, 1), (0, "a", 0), (0, 0, "a"), (0, "a", "a"), (0, "0")]
    assert len({bits(*name) for name in names}) == len(names)


def test_the_bits_stay_what_they_are():
    """A changed derivation would change every run's initial values and data order without a word."""
    assert bits(0, "init", "embedding", 0) == (2031309245, 2663228783)
