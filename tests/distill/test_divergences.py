"""Divergences: numbers by hand, a naive float64 version, TRL's, gradients; truncated and in chunks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.distill import losses as divergences
from jaxlm.distill.config import DistillConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.train import losses

CONFIG = DistillConfig(teacher="x")
KINDS = [
    dataclasses.replace(CONFIG, divergence="forward_kl"),
    dataclasses.replace(CONFIG, divergence="reverse_kl"),
    dataclasses.replace(CONFIG, divergence="jensen_shannon"),
    dataclasses.replace(CONFIG, divergence="jensen_shannon", beta=0.1),
]
IDS = [f"{c.divergence}-{c.beta}" for c in KINDS]


def of(teacher, student, config):
    """From logits."""
    return divergences.divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student), config)


def naive(teacher, student, config):
    """float64, from the definitions, a position and a token at a time."""
    made = []
    for t, s in zip(np.asarray(teacher, np.float64), np.asarray(student, np.float64), strict=True):
        p, q = np.exp(t - t.max()), np.exp(s - s.max())
        p, q = p / p.sum(), q / q.sum()
        kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)
        m = config.beta * p + (1 - config.beta) * q
        js = config.beta * kl(p, m) + (1 - config.beta) * kl(q, m)
        made.append({"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": js}[config.divergence])
    return made


@pytest.mark.parametrize(
    ("config", "value"), [*zip(KINDS, [0.14384104, 0.13081204, 0.03382208, 0.01275243], strict=True)], ids=IDS
)
def test_numbers_by_hand(config, value):
    """p = [1/2, 1/2], q = [3/4, 1/4]: KL(p, q) = ln(4/3) / 2, KL(q, p) = 3/4 ln(3/2) - 1/4 ln 2; β = .5, β = .1."""
    got = divergences.divergence(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.75, 0.25]])), config)
    np.testing.assert_allclose(got, [value], atol=1e-7)


def logits(seed, N=16, V=40, size=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, size, (N, V)), jnp.float32)


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_as_the_naive_version(config):
    teacher, student = logits(0), logits(1)
    np.testing.assert_allclose(of(teacher, student, config), naive(teacher, student, config), rtol=1e-5, atol=1e-6)


# trl 1.12: GKDTrainer.generalized_jsd_loss of 2 sin(at) and 3 cos(1.3 at), at = 0 … 23 as [1, 4, 6], float64,
# labels [1, -100, 1, 1], reduction="sum". Its beta 0 is our forward, 1 our reverse KL. (beta, temperature) → value
TRL = {
    (0.0, 1.0): 3.7151557648,
    (0.0, 2.0): 1.48246784477,
    (0.1, 1.0): 0.299457194972,
    (0.1, 2.0): 0.130580351905,
    (0.5, 1.0): 0.776894083585,
    (0.5, 2.0): 0.36357996315,
    (1.0, 1.0): 5.33575465548,
    (1.0, 2.0): 1.80768376015,
}


@pytest.mark.parametrize(("case", "value"), TRL.items(), ids=str)
def test_as_trl(case, value):
    beta, temperature = case
    at = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jensen_shannon")
    config = dataclasses.replace(CONFIG, divergence=kind, beta=beta if 0 < beta < 1 else 0.5)
    each = of(3 * jnp.cos(1.3 * at) / temperature, 2 * jnp.sin(at) / temperature, config)
    np.testing.assert_allclose(each[0] + each[2] + each[3], value, rtol=2e-6)


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_gradients(config):
    """Finite differences in float64's stead: of the naive version, a step of 1e-6. At teacher = student: 0."""
    teacher, student = logits(0, 3, 7), logits(1, 3, 7)
    gradient = jax.grad(lambda s: jnp.sum(of(teacher, s, config)))(student)
    for row, column in np.ndindex(3, 7):
        step = np.zeros((3, 7))
        step[row, column] = 1e-6
        ends = [sum(naive(teacher, np.asarray(student, np.float64) + sign * step, config)) for sign in (1, -1)]
        np.testing.assert_allclose(gradient[row, column], (ends[0] - ends[1]) / 2e-6, atol=2e-6)
    same, flat = jax.value_and_grad(lambda s: jnp.sum(of(teacher, s, config)))(teacher)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    np.testing.assert_allclose(flat, 0.0, atol=1e-6)


def test_a_sure_teacher_is_the_cross_entropy():
    student, targets = logits(1), jnp.arange(16) % 40
    teacher = jnp.where(jax.nn.one_hot(targets, 40) > 0, 0.0, -1e9)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(of(teacher, s, CONFIG)))(student)
    loss, expected = jax.value_and_grad(lambda s: jnp.sum(losses.token_losses(s, targets).loss))(student)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_truncated():
    """k tokens and the rest as one: with probabilities .5, .25, .125, .0625, .0625 and k = 2, the rest has .25."""
    teacher = jnp.log(jnp.array([[0.0625, 0.5, 0.125, 0.25, 0.0625]]))
    ids, logprobs = divergences.truncated(teacher, 2)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(jnp.exp(logprobs), [[0.5, 0.25, 0.25]], rtol=1e-6)
    sure = divergences.truncated(jnp.array([[0.0, 40.0, -40.0]]), 1)[1]
    np.testing.assert_allclose(sure, [[0.0, -40.0]], atol=1e-6)  # 1 - p would be 0


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_truncation_never_adds(config):
    """Joining classes cannot raise a divergence; with all but one apart, nothing is joined."""
    teacher, student = logits(0), logits(1)
    whole, before = of(teacher, student, config), 0.0
    for k in (1, 5, 39):
        ids, logprobs = divergences.truncated(teacher, k)
        part = divergences.divergence(logprobs, divergences.gathered(student, ids), config)
        assert (part <= whole + 1e-5).all()
        assert (part >= before - 1e-5).all()
        before = part
    np.testing.assert_allclose(before, whole, rtol=1e-5, atol=1e-5)


MODEL = ModelConfig(vocab_size=64, layers=2, width=32, heads=2, compute="float32").complete()


@pytest.fixture(scope="module")
def models():
    student = define_model(MODEL)
    teacher = define_model(dataclasses.replace(MODEL, layers=3, width=16).complete())
    return student, initialize(student, 0), teacher, initialize(teacher, 1)


def rows(B=4, S=16):
    random = np.random.default_rng(0)
    ids = random.integers(1, 64, (B, S)).astype(np.int32)
    segments = np.where(np.arange(S) < 9, 1, np.where(np.arange(S) < 14, 2, 0)) * np.ones((B, 1), int)
    positions = np.where(segments == 2, np.arange(S) - 9, np.where(segments == 1, np.arange(S), 0))
    made = {"ids": ids, "segment_ids": segments.astype(np.int32), "positions": positions.astype(np.int32)}
    return made | {"loss_mask": (segments > 0) & (positions > 0)}


def sums_of(models, batch, config, chunk_tokens=0):
    student, params, teacher, theirs = models
    batch = jax.tree.map(jnp.asarray, batch)
    of = dict(config=config, definition=student, teacher_definition=teacher)
    make = lambda p: divergences.live_sums(p, batch, theirs, chunk_tokens=chunk_tokens, **of)
    (_, sums), gradient = jax.jit(jax.value_and_grad(lambda p: (make(p).divergence, make(p)), has_aux=True))(params)
    return sums, gradient


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("config", [KINDS[0], KINDS[3]], ids=[IDS[0], IDS[3]])
def test_chunks_and_documents(models, config, k):
    """In chunks as at once; a row of two documents as two rows of one each; padding counts for nothing."""
    config, batch = dataclasses.replace(config, top_k=k, temperature=2.0), rows()
    sums, gradient = sums_of(models, batch, config)
    for chunk in (8, 32):
        part, its = sums_of(models, batch, config, chunk)
        np.testing.assert_allclose(part.divergence, sums.divergence, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), its, gradient)
    one, two = (jax.tree.map(np.copy, batch) for _ in range(2))
    for name in ("segment_ids", "loss_mask"):
        one[name][:, 9:], two[name][:, :9] = 0, 0
    apart = [sums_of(models, each, config)[0].divergence for each in (one, two)]
    np.testing.assert_allclose(sum(apart), sums.divergence, rtol=1e-5)
    batch["ids"][:, 14:] = 7
    np.testing.assert_allclose(sums_of(models, batch, config)[0].divergence, sums.divergence, rtol=1e-6)
    plain = losses.row_sums(models[1], jax.tree.map(jnp.asarray, rows()), models[0])
    np.testing.assert_allclose(sums.loss, plain.loss, rtol=1e-6)
    assert sums.targets == plain.targets


def test_no_logits_of_all_positions_are_made(models):
    """In chunks, no array of the compiled program has a number for each of 64 positions and 64 tokens."""
    student, params, teacher, theirs = models
    of = dict(config=CONFIG, definition=student, teacher_definition=teacher, chunk_tokens=8)
    batch = jax.tree.map(jnp.asarray, rows())
    objective = lambda p: divergences.live_sums(p, batch, theirs, **of).divergence
    assert "[64,64]" in str(jax.make_jaxpr(jax.grad(lambda p: losses.row_sums(p, batch, student).loss))(params))
    assert "[64,64]" not in str(jax.make_jaxpr(jax.grad(objective))(params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stored": "y"}, "stored: stands in place of a teacher; leave one of them out"),
        ({"beta": 1.0}, "beta: got 1.0; a share between 0 and 1"),
        ({"temperature": 0.0}, "temperature: got 0.0; more than 0"),
        ({"weight": 0.0}, "weight: got 0.0; more than 0, at most 1"),
        ({"top_k": -1}, "top_k: got -1"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields)
