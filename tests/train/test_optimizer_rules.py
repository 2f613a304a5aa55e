"""Each rule's numbers against its paper's formulas, written out in numpy; where its state lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.stages.config import PretrainConfig
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import OptimizerConfig, ScheduleConfig
from jaxlm.train.soap import scale_by_soap
from jaxlm.train.state import initial_state, state_shardings

# Matrices wide (up), high (down) and square (query).
MODEL = ModelConfig(
    vocab_size=64, layers=2, width=16, heads=2, kv_heads=1, feed_forward=32, compute="float32"
).complete()
UP = ("stack", "0", "mlp", "up")
DOWN = ("stack", "0", "mlp", "down")
NORM = ("final_norm", "scale")


def at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def directions(kind, steps, **fields):
    """(gradients of each step, directions of each step): nested dicts as the parameters; nothing decays."""
    definition = define_model(MODEL)
    optimizer = optimizers.make_optimizer(OptimizerConfig(kind=kind, weight_decay=0.0, **fields), definition)
    params = initialize(definition, 0)
    state = optimizers.init(optimizer, params)
    update = jax.jit(lambda g, s, p: optimizers.direction(optimizer, g, s, p))
    given, made = [], []
    for step in range(steps):
        flat, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(step), len(flat))
        gradient = [1e-3 * jax.random.normal(key, x.shape) for key, x in zip(keys, flat, strict=True)]
        given.append(tree.unflatten(gradient))
        direction, state = update(given[-1], state, params)
        made.append(direction)
    return given, made


def test_lion_by_hand():
    # arXiv:2302.06675, program 1: the sign of .9 m + .1 g, and then m = .99 m + .01 g.
    given, made = directions("lion", 3)
    for path in (UP, NORM, ("embedding",)):
        momentum = 0.0
        for gradient, direction in zip(given, made, strict=True):
            g = np.asarray(at(gradient, path), np.float64)
            np.testing.assert_array_equal(at(direction, path), -np.sign(0.9 * momentum + 0.1 * g))
            momentum = 0.99 * momentum + 0.01 * g


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_by_hand(momentum):
    given, made = directions("sgd", 3, sgd_momentum=momentum)
    for path in (UP, NORM, ("embedding",)):
        total = 0.0
        for gradient, direction in zip(given, made, strict=True):
            total = momentum * total + np.asarray(at(gradient, path), np.float64)
            np.testing.assert_allclose(at(direction, path), -total, rtol=1e-5, atol=1e-9)


def test_adafactor_by_hand():
    """arXiv:1804.04235, algorithm 4 without relative step sizes: β2 = 1 - t^-.8, updates clipped to an RMS of 1."""
    given, made = directions("adafactor", 3)

    def expected(gradients):
        rows, columns, whole = 0.0, 0.0, 0.0
        for t, g in enumerate(gradients, 1):
            decay, squares = 1 - t**-0.8, g**2 + 1e-30
            if g.ndim == 2:
                rows = decay * rows + (1 - decay) * squares.mean(axis=1, keepdims=True)
                columns = decay * columns + (1 - decay) * squares.mean(axis=0, keepdims=True)
                second = rows * columns / rows.mean()
            else:
                second = whole = decay * whole + (1 - decay) * squares
            update = g / np.sqrt(second)
            yield -update / max(1.0, np.sqrt((update**2).mean()))

    for path, layers in ((UP, (0, 1)), (DOWN, (1,)), (NORM, (...,)), (("embedding",), (...,))):
        for layer in layers:
            mine = [np.asarray(at(tree, path), np.float64)[layer] for tree in given]
            for direction, right in zip(made, expected(mine), strict=True):
                np.testing.assert_allclose(np.asarray(at(direction, path))[layer], right, rtol=1e-4, atol=1e-6)


def soap_in_numpy(gradients, b1, b2, epsilon, refresh, sides=(True, True)):
    """arXiv:2409.11321, algorithms 3 and 4, one matrix [in, out]; `sides`: which are turned."""
    count = len(gradients[0]), len(gradients[0][0])
    averages, bases = [np.zeros((n, n)) for n in count], [np.eye(n) for n in count]
    first, second = np.zeros(count), np.zeros(count)
    for t, g in enumerate(gradients):
        if t == 0:
            yield np.zeros(count)
        else:
            first = b1 * first + (1 - b1) * g
            second = b2 * second + (1 - b2) * (bases[0].T @ g @ bases[1]) ** 2
            mean = (bases[0].T @ first @ bases[1]) / (1 - b1**t)
            yield bases[0] @ (mean / (np.sqrt(second / (1 - b2**t)) + epsilon)) @ bases[1].T
        for side, square in enumerate((g @ g.T, g.T @ g)):
            averages[side] = b2 * averages[side] + (1 - b2) * square
            if not sides[side]:
                continue
            if t == 0:
                # One gradient has no more than min(count) directions: the others by Householder.
                known = np.linalg.eigh(averages[side])[1][:, ::-1][:, : min(count)]
                bases[side] = np.linalg.qr(known, mode="complete")[0]
            elif t % refresh == 0:
                order = np.argsort(-np.diag(bases[side].T @ averages[side] @ bases[side]))
                second = second[order] if side == 0 else second[:, order]
                bases[side] = np.linalg.qr(averages[side] @ bases[side][:, order])[0]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def soap(gradients, refresh=2, largest=100, b1=0.9, b2=0.95, epsilon=1e-8):
    """Directions of `scale_by_soap` for one weight."""
    rule = scale_by_soap(b1, b2, epsilon, refresh, largest)
    state = rule.init({"w": gradients[0]})
    made = []
    for gradient in gradients:
        direction, state = jax.jit(rule.update)({"w": gradient}, state)
        made.append(np.asarray(direction["w"]))
    return made, state


def random_gradients(shape, steps=8, seed=0):
    random = np.random.default_rng(seed)
    # Directions of different sizes, which turn with time.
    return [jnp.asarray(random.standard_normal(shape) * np.linspace(0.2, 3, shape[-1])) for _ in range(steps)]


@pytest.mark.parametrize(("largest", "sides"), [(100, (True, True)), (4, (True, False)), (2, (False, False))])
def test_soap_is_the_papers_algorithm(float64, largest, sides):
    gradients = random_gradients((3, 4, 6))
    made, state = soap(gradients, largest=largest)
    for layer in range(3):
        one = [np.asarray(g)[layer] for g in gradients]
        for got, right in zip(made, soap_in_numpy(one, 0.9, 0.95, 1e-8, 2, sides), strict=True):
            np.testing.assert_allclose(got[layer], right, rtol=1e-7, atol=1e-9)
    matrix = state.matrices["w"]
    assert (matrix.left is not None, matrix.right is not None) == sides
    for side in (matrix.left, matrix.right):
        if side is not None:
            n = side.basis.shape[-1]
            np.testing.assert_allclose(side.basis.mT @ side.basis, np.broadcast_to(np.eye(n), (3, n, n)), atol=1e-12)


def test_soap_sees_no_coordinates(float64):
    """Turned gradients give turned directions: Adam alone would not."""
    random = np.random.default_rng(1)
    U, V = (np.linalg.qr(random.standard_normal((5, 5)))[0] for _ in range(2))
    gradients = random_gradients((5, 5))
    made, _ = soap(gradients)
    turned, _ = soap([U @ g @ V for g in gradients])
    for a, b in zip(made, turned, strict=True):
        np.testing.assert_allclose(U @ a @ V, b, atol=1e-6)


def test_soap_learns_what_adam_finds_hard(float64):
    """A badly conditioned quadratic in turned coordinates: ½ ‖A (W - W*) B‖², step by step at one rate each."""
    random = np.random.default_rng(0)
    turn = lambda n: np.linalg.qr(random.standard_normal((n, n)))[0]
    A, B = (turn(n) @ np.diag(np.logspace(-1, 1, n)) @ turn(n) for n in (6, 8))
    goal = random.standard_normal((6, 8))
    loss = jax.jit(lambda w: 0.5 * jnp.sum(jnp.square(A @ (w["w"] - goal) @ B)))

    def run(rule, steps=400):
        w = {"w": jnp.zeros((6, 8))}
        state = optimizers.init(rule, w)
        step = jax.jit(lambda g, s: optimizers.direction(rule, g, s, w))
        for number in range(steps):
            direction, state = step(jax.grad(loss)(w), state)
            w = {"w": w["w"] - 0.02 * (1 - number / steps) * direction["w"]}
        return float(loss(w))

    # A largest side of 1 turns nothing: Adam.
    adam, soap = run(scale_by_soap(0.9, 0.95, 1e-8, 5, 1)), run(scale_by_soap(0.9, 0.95, 1e-8, 5, 100))
    assert adam == pytest.approx(run(optax.scale_by_adam(0.9, 0.95, eps=1e-8)), rel=0.2)
    assert soap < adam / 10


def test_rules_follow_from_the_declaration():
    definition = define_model(MODEL)
    ruled = lambda **fields: {w.name: optimizers.rule(w, OptimizerConfig(**fields)) for _, w in definition}
    inner = {w.name for _, w in definition if w.matrix}
    for kind in ("muon", "soap"):
        assert {name for name, rule in ruled(kind=kind).items() if rule == kind} == inner
        assert set(ruled(kind=kind).values()) == {kind, "adamw"}
    for kind in ("adamw", "lion", "adafactor", "sgd"):
        assert set(ruled(kind=kind).values()) == {kind}
    few = ruled(kind="soap", soap_largest_side=15)
    assert {name for name, rule in few.items() if rule == "soap"} == {"layers/attention/key", "layers/attention/value"}
    rows = {
        name: rule for name, _, rule in optimizers.table(definition, OptimizerConfig(kind="soap", soap_largest_side=16))
    }
    assert rows["stack/*/mlp/up"] == "soap of the shorter side, decay 0.1"
    assert rows["stack/*/attention/query"] == "soap, decay 0.1"
    assert rows["embedding"] == "adamw, decay 0.1"


@pytest.mark.parametrize("kind", ["adamw", "muon", "soap", "lion", "adafactor", "sgd"])
def test_all_that_is_kept_for_a_matrix_is_divided_as_it_is(kind):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    definition = define_model(dataclasses.replace(MODEL, kv_heads=2))
    optimizer = optimizers.make_optimizer(OptimizerConfig(kind=kind), definition)
    abstract = jax.eval_shape(lambda p: initial_state(p, optimizer, ema=True), definition.abstract())
    placed = state_shardings(abstract, definition, mesh)
    divided = {}
    flat = zip(jax.tree_util.tree_flatten_with_path(abstract)[0], jax.tree.leaves(placed), strict=True)
    for (path, leaf), sharding in flat:
        name = jax.tree_util.keystr(path)
        divided[name] = sharding.spec
        if leaf.ndim >= 2 and min(leaf.shape[-2:]) >= 8:
            pieces = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
            assert pieces == 8, (name, leaf.shape, sharding.spec)
    if kind == "adafactor":
        # Of up [embed 16, mlp 32] and down [mlp 32, embed 16], optax calls the averages over mlp, the longer, rows.
        of = lambda part: {spec[-1] for name, spec in divided.items() if name.endswith(part) and "['mlp']" in name}
        assert of(".v_row") == {"fsdp"}
        assert of(".v_col") == {"tensor"}


def test_a_rate_of_adamw_is_not_given_to_lion_or_sgd():
    for kind in ("lion", "sgd"):
        with pytest.raises(ConfigError, match=f"schedule.peak: .*{kind}"):
            PretrainConfig(depth=4, optimizer=OptimizerConfig(kind=kind))
        PretrainConfig(depth=4, optimizer=OptimizerConfig(kind=kind), schedule=ScheduleConfig(peak=1e-4))
    with pytest.raises(ConfigError, match="soap_refresh_steps"):
        OptimizerConfig(soap_refresh_steps=0)
