"""What a fixture of make_family_fixtures.py holds against what jaxlm computes from its checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxlm.hub import hugging_face
from jaxlm.model import layout
from jaxlm.model.transformer import define_model, empty_cache, for_inference
from jaxlm.model.weights import apply

FIXTURES = Path(__file__).parent / "fixtures"
# Of logits with a standard deviation of .2 to 1.2, the largest difference seen is 1.6e-5 (Gemma 2), 2.7e-6 elsewhere
# but for Gemma 3.
TOLERANCE = 1e-4


def read(folder):
    directory = hugging_face.read(folder, compute="float32")
    config, definition = for_inference(directory.config)
    expected = safetensors.numpy.load_file(folder / "expected.safetensors")
    return directory, config, definition, directory.load_params(definition), expected


def padded_right(expected):
    """(ids, segments, positions) of the rows, other tokens behind them."""
    ids = expected["ids"]
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    inside = (places < expected["lengths"][:, None]).astype(np.int32)
    return np.where(inside, ids, 5), inside, places


def compare_logits(folder):
    """Rows of two lengths, padded on the right and on the left."""
    _, config, definition, params, expected = read(folder)
    lengths = expected["lengths"]
    assert min(lengths) > max(config.window, 8)  # past the windows, and past what scaled RoPE was made for
    right = padded_right(expected)
    (padded, inside, places), (B, S) = right, expected["ids"].shape
    shift = lambda x: np.stack([np.roll(row, S - length) for row, length in zip(x, lengths, strict=True)])
    left = (shift(padded), shift(inside), np.maximum(places - (S - lengths[:, None]), 0))
    both = [np.concatenate(pair) for pair in zip(right, left, strict=True)]
    logits = jax.jit(lambda *x: apply(definition, params, lambda m: m.logits(m(*x)[0])))(*both)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected["right"][row, :length], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(
            logits[B + row, S - length :], expected["left"][row, :length], atol=TOLERANCE, rtol=0
        )


def compare_cached_logits(folder):
    """The rows written into a cache in two pieces, past windows and trained positions."""
    _, config, definition, params, expected = read(folder)
    ids, half = expected["ids"], expected["ids"].shape[1] // 2
    if config.rope_scaling.kind == "longrope":
        half = max(half, config.rope_scaling.trained_positions + 1)  # tests/sample: a text that grows past them

    @jax.jit
    def run(cache, *part):
        def model(m):
            hidden, after = m(*part, cache)
            return m.logits(hidden), after

        return apply(definition, params, model)

    given = padded_right(expected)
    first, cache = run(empty_cache(config, *ids.shape), *(x[:, :half] for x in given))
    second, _ = run(cache, *(x[:, half:] for x in given))
    cached = jnp.concatenate([first, second], axis=1)
    for row, length in enumerate(expected["lengths"]):
        np.testing.assert_allclose(cached[row, :length], expected["right"][row, :length], atol=TOLERANCE, rtol=0)


def compare_rewards(folder):
    """A reward at each row's last token."""
    _, config, definition, params, expected = read(folder)
    assert config.criteria == ("overall",)
    ids, lengths = expected["ids"], expected["lengths"]
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    inside = (places < lengths[:, None]).astype(np.int32)
    scores = jax.jit(lambda *x: apply(definition, params, lambda m: m.scores(m(*x)[0])))(ids, inside, places)
    got = np.asarray(scores)[np.arange(len(lengths)), lengths - 1]
    np.testing.assert_allclose(got, expected["rewards"], atol=TOLERANCE, rtol=0)


def compare_gradients(folder, tmp_path):
    """Of the mean cross-entropy of the rows' next tokens, by weight and layer, through stacked layers."""
    directory, expected = hugging_face.read(folder, compute="float32"), read(folder)[-1]
    definition = define_model(directory.config)
    (ids, segments, places), targets = map(jnp.asarray, padded_right(expected)), np.roll(expected["ids"], -1, axis=1)
    counted = places < expected["lengths"][:, None] - 1

    def loss(params):
        logits = apply(definition, params, lambda m: m.logits(m(ids, segments, places)[0]))
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, each, 0)) / float(np.sum(expected["lengths"] - 1))

    found = jax.jit(jax.grad(loss))(directory.load_params(definition))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "gradients.safetensors").read_bytes())
    torchs = hugging_face.read(tmp_path, compute="float32").load_params(definition)
    unrolled = (layout.unroll(tree, directory.config) for tree in (found, torchs))
    (ours, _), (theirs, _) = (jax.tree_util.tree_flatten_with_path(tree) for tree in unrolled)
    assert len(ours) == len(theirs) > 20
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):  # the worst seen is 1.9e-6
        apart, size = np.linalg.norm(mine - other), np.linalg.norm(other)
        assert size > 0, path
        assert apart < 1e-3 * size, (path, apart, size)
