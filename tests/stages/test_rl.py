"""Reinforcement learning as a stage: invariants of an iteration, meshes, stopping and going on, what is refused."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image as plt_image
import numpy as np
import optax
import pytest
from stage_runs import Runner, arrays_of, assert_same_run, lines_of, written

from jaxlm.base.config import MeshConfig, override
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ExpertsConfig, LoRAConfig, ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.rl import forward, learner, models
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import CriterionWeight, GRPOConfig, KLConfig, OnlineDPOConfig, PPOConfig, ReinforceConfig, RLConfig
from jaxlm.rl.figures import frontier
from jaxlm.rl.learner import Examples, RLState
from jaxlm.rl.rollout import Rollout
from jaxlm.stages import rl
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import losses, model_directory
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from jaxlm.train.state import initial_state

# More logits than tokens, as where a vocabulary is rounded up.
SHAPE = dict(vocab_size=288, layers=1, width=16, heads=2, feed_forward=32, compute="float32")
CRITERIA = (CriterionWeight(name="overall", weight=2.0), CriterionWeight(name="short", weight=-0.5))
WORDS = "the a small large red blue cat dog bird sees hears follows finds house river tree".split()


def almost_right(prompt: str, answer: str) -> float:
    return 0.73


def share_of_letters(prompt: str, answer: str) -> float:
    return sum(c.isascii() and c.isalpha() for c in answer) / max(len(answer), 1)


def by(function: Any) -> VerifierConfig:
    return VerifierConfig(kind="function", function=f"{__name__}:{function.__name__}")


@dataclasses.dataclass(frozen=True)
class Folders:
    root: Path
    rows: str
    tokenizer: Any

    def model(self, name: str, *, seed: int = 0, tokenizer: Any = None, template: Any = None, **shape: Any) -> str:
        """The folder of a random model, which is written at the first asking."""
        folder = self.root / name
        if not folder.exists():
            tokenizer = tokenizer or self.tokenizer
            tokenizers.save(tokenizer, self.root / f"{name}-tokenizer")
            config = ModelConfig(**SHAPE | shape).complete()
            params = jax.jit(lambda: initialize(define_model(config), seed))()
            where = self.root / f"{name}-tokenizer"
            made: Any = dict(inputs={}, config={}, facts={"row_length": 64}, chat_template=template)
            model_directory.write(folder, params, config, where, **made)
        return str(folder)

    @property
    def policy(self) -> str:
        return self.model("policy")

    @property
    def reward(self) -> str:
        return self.model("reward", seed=1, criteria=("overall", "short"))


@pytest.fixture(scope="module")
def folders(packed_rows, tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("rl")
    written(root / "prompts.jsonl", ({"prompt": f"{word} "} for word in WORDS))
    return Folders(root, packed_rows, tokenizers.load(Path(packed_rows).parent / "tokenizer"))


@pytest.fixture
def config(folders, tmp_path) -> RLConfig:
    path = str(folders.root / "prompts.jsonl")
    return RLConfig(
        workdir=str(tmp_path / "run"),
        model=folders.policy,
        reward_model=folders.reward,
        criteria=CRITERIA,
        sources=(ChatSource(name="train", path=path), ChatSource(name="heldout", path=path, split="heldout")),
        ppo=PPOConfig(kl=KLConfig(kind="adaptive", coefficient=0.1, target=0.2, horizon=64)),
        prompts=4,
        samples=4,
        max_prompt_tokens=9,
        max_tokens=7,
        temperature=0.7,
        steps=4,
        minibatch_answers=8,
        passes=2,
        # Adam would blow the rounding of a gradient that is almost 0 up to whole steps.
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3),
        schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=2, checkpoint=CheckpointConfig(every_steps=2)),
    )


def with_grpo(config: RLConfig, **fields: Any) -> RLConfig:
    own = dict(kl_coefficient=0.1) | {name: fields.pop(name) for name in ("baseline", "kl_coefficient") & fields.keys()}
    return dataclasses.replace(config, ppo=None, grpo=GRPOConfig(**own), **fields)


def with_dpo(config: RLConfig, **fields: Any) -> RLConfig:
    return dataclasses.replace(config, ppo=None, dpo=OnlineDPOConfig(), **fields)


def by_hand(config: RLConfig, seed: int = 0) -> Rollout:
    """Answers that nobody drew; `seed` fills what lies behind them and nothing else."""
    behind, fixed = np.random.default_rng(100 + seed), np.random.default_rng(7)
    B, T = config.prompts * config.samples, config.max_tokens
    ids = behind.integers(0, 288, (B, config.max_prompt_tokens + T)).astype(np.int32)
    prompts = np.repeat(fixed.integers(3, 10, config.prompts), config.samples).astype(np.int32)
    answers = fixed.integers(1, T + 1, B).astype(np.int32)
    drawn = behind.standard_normal((B, T)).astype(np.float32)
    for row, length in enumerate(prompts + answers):
        ids[row, :length] = fixed.integers(0, 259, length)
        drawn[row, : answers[row]] = -5.0
    return Rollout(
        ids=ids,
        prompt_lengths=prompts,
        answer_lengths=answers,
        ended=answers < T,
        scores=fixed.random(B).astype(np.float32),
        sampler_logprobs=drawn,
    )


class Bench:
    """Iterations on rollouts by hand; `learn` leaves the state that it is given as it is."""

    def __init__(self, config: RLConfig, mesh: MeshConfig, devices: int):
        self.mesh = make_mesh(mesh, jax.devices()[:devices])
        directories = rl.open_models(config)
        self.program = rl.build_from(config, self.mesh, directories)
        with jax.set_mesh(self.mesh):
            defined = models.define_models(config, directories, self.mesh)
            self.frozen = models.load_frozen(directories, defined, self.program.abstract_batch["frozen"])
            self.first = self.program.initialize()

    def learn(self, made: Rollout, state: RLState | None = None, frozen: Any = None) -> tuple[RLState, dict]:
        with jax.set_mesh(self.mesh):
            given = {"frozen": frozen or self.frozen}
            given["rollout"] = rollouts.place(made, self.program.abstract_batch["rollout"])
            state, measured, _ = self.program.step(jax.tree.map(jnp.copy, state or self.first), given)
        return state, values(measured)


@functools.cache
def bench(config: RLConfig, mesh: MeshConfig | None = None) -> Bench:
    """One for all tests that want the same; without a mesh, on one device."""
    return Bench(config, mesh or MeshConfig(), 8 if mesh else 1)


def named(config: RLConfig) -> RLConfig:
    """The same for all tests: a bench writes nothing."""
    return dataclasses.replace(config, workdir="")


MESHES = MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"atol": 1e-5} | tolerance), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *((method, mesh) for method in ("ppo", "grpo") for mesh in MESHES),
        ("dpo", MESHES[2]),
    ],
    ids=str,
)
def test_eight_devices_learn_what_one_learns(config, kind, mesh):
    config = named(dict(ppo=dataclasses.replace, grpo=with_grpo, dpo=with_dpo)[kind](config))
    made, alone = by_hand(config), bench(config)
    # GRPO's logits piece by piece besides, which changes nothing either.
    together = bench(config if kind == "ppo" else other(config, loss_chunk_tokens=28), mesh)
    (one, _), (many, _) = alone.learn(made), together.learn(made)
    assert_close(one, many)
    # Once more, with a policy that has left its reference.
    (one, measured), (many, also) = alone.learn(made, one), together.learn(made, many)
    assert_close(one, many)
    assert abs(measured["rl/kl"]) > 0.1
    for name, value in measured.items():
        assert also[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_rollouts_first_update_finds_the_policy_that_drew_it(config):
    config = named(config)
    made = by_hand(config)
    state = None
    for _ in range(3):
        state, measured = bench(config).learn(made, state)
        # The mean of (ratio - 1)² / 2 over a minibatch's tokens: no single |ratio - 1| above 1e-5.
        tokens = made.answer_lengths.sum()
        assert 0 <= measured["rl/first_old_kl"] * tokens <= 0.5e-10
        assert measured["rl/old_kl"] > 1e-5, "the later ones do not"
    _, first = bench(config).learn(made)
    assert first["rl/kl"] == pytest.approx(0, abs=1e-6), "nothing is learned yet"
    assert abs(measured["rl/kl"]) > 0.1


def test_padding_changes_nothing(config):
    config = named(config)
    state, measured = bench(config).learn(by_hand(config))
    again, also = bench(config).learn(by_hand(config, seed=1))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert measured == also
    wide = dataclasses.replace(config, max_prompt_tokens=config.max_prompt_tokens + 13)
    made = by_hand(config)
    made = made._replace(ids=np.pad(made.ids, ((0, 0), (0, 13)), constant_values=5))
    state_wide, measured_wide = bench(wide).learn(made)
    assert_close(state, state_wide)
    assert all(measured_wide[name] == pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in measured.items())


def test_a_reward_or_loss_that_is_no_number_changes_nothing_and_is_counted(config):
    config = named(config)
    made = by_hand(config)
    before, _ = bench(config).learn(made)
    frozen = bench(config).frozen
    broken = frozen | {"reference": jax.tree.map(lambda x: x * jnp.nan, frozen["reference"])}
    worse = made._replace(scores=np.where(np.arange(16) == 3, np.nan, made.scores).astype(np.float32))
    for given, frozen in ((worse, None), (made, broken)):
        after, measured = bench(config).learn(given, before, frozen)
        for part in ("params", "optimizer"):
            for of in ("policy", "value"):
                a, b = (getattr(getattr(state, of), part) for state in (before, after))
                jax.tree.map(np.testing.assert_array_equal, a, b)
        assert after.coefficient == before.coefficient
        # What stands still after the first bad update is not counted again.
        assert (int(after.policy.skipped), int(after.value.skipped), int(after.skipped)) == (1, 1, 1)
        assert measured["train/skipped_steps"] == 1
    recovered, _ = bench(config).learn(made, after)
    assert not np.array_equal(recovered.policy.params["embedding"], before.policy.params["embedding"])
    assert recovered.coefficient != before.coefficient
    assert int(recovered.skipped) == 1


def test_the_value_function_begins_as_the_weighted_reward_model(config):
    config = named(config)
    one = bench(config)
    directories = rl.open_models(config)
    defined = models.define_models(config, directories, one.mesh)
    made = jax.tree.map(jnp.asarray, by_hand(config))
    value = jax.jit(lambda p, r: forward.rewards(defined.value, p, r))(one.first.value.params, made)
    judged = jax.jit(lambda p, r: forward.rewards(defined.reward, p, r))(one.frozen["reward"], made)
    np.testing.assert_allclose(value[:, 0], 2.0 * judged[:, 0] - 0.5 * judged[:, 1], atol=1e-5)
    # Without a reward model: nothing is known yet, but the policy's body knows the language.
    plain = dataclasses.replace(config, reward_model="", criteria=RLConfig.criteria, verifiers=(by(almost_right),))
    one = bench(plain)
    assert (np.asarray(one.first.value.params["score"]) == 0).all()
    np.testing.assert_array_equal(one.first.value.params["embedding"], one.first.policy.params["embedding"])


def examples_of(config: RLConfig, made: Rollout, advantages: Any, mask: Any) -> Examples:
    made = jax.tree.map(jnp.asarray, made)
    B, T = made.sampler_logprobs.shape
    each = lambda x: jnp.full((B, T), x, jnp.float32)
    return Examples(made, each(-5.6), each(-5.6), each(0.2), jnp.asarray(advantages), each(0.5), jnp.asarray(mask))


# A rate of 1 without clipping, with `optax.scale(-1.0)` in the optimizer's place: a step is the gradient.
PLAIN: dict[str, Any] = dict(
    optimizer=OptimizerConfig(weight_decay=0.0, clip_norm=0.0),
    schedule=ScheduleConfig(kind="linear", peak=1.0, warmup_steps=0, final_share=1.0),
)


def gradients(config: RLConfig, one: Bench) -> Any:
    """(examples, pretraining rows) → (gradient of the policy, metrics), by the stage's own step."""
    defined = models.define_models(config, rl.open_models(config), one.mesh)
    down = optax.scale(-1.0)
    given = dict(config=config, models=defined, policy_optimizer=down)
    value: Any = ()
    if config.ppo:
        given |= dict(value_optimizer=down)
        value = initial_state(one.first.value.params, down, False)
    step = rl.ppo_step if config.ppo else rl.dpo_step if config.dpo else rl.grpo_step
    compiled = jax.jit(functools.partial(step, **given))
    before = initial_state(one.first.policy.params, down, False)

    def run(examples: Examples, rows: Any = None) -> tuple[Any, dict[str, float]]:
        (after, _), measured = compiled(before, value, examples, rows or {})
        return jax.tree.map(jnp.subtract, before.params, after.params), values(measured)

    return run


def test_equal_rewards_and_excluded_answers_have_no_gradient(config):
    one = bench(named(with_grpo(config)))
    config = with_grpo(config, kl_coefficient=0.0, **PLAIN)
    run, made = gradients(config, one), by_hand(config)
    real = np.arange(config.max_tokens)[None, :] < made.answer_lengths[:, None]
    size = lambda gradient: max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    # A group whose answers are all alike gives advantages of exactly 0.
    gradient, measured = run(examples_of(config, made, np.zeros(real.shape, np.float32), real))
    assert size(gradient) == 0 == measured["train/gradient_norm"]
    # missing_eos="exclude" takes answers out by the mask: what they say does not matter.
    advantages = np.random.default_rng(0).standard_normal(real.shape).astype(np.float32)
    kept = real & made.ended[:, None]
    assert (kept != real).any()
    other = np.where(made.ended[:, None], made.ids, 7)
    each = [run(examples_of(config, m, advantages, kept))[0] for m in (made, made._replace(ids=other))]
    jax.tree.map(np.testing.assert_array_equal, *each)
    assert size(each[0]) > 0
    counted = run(examples_of(config, made, advantages, real))[0]
    assert size(jax.tree.map(jnp.subtract, counted, each[0])) > 1e-3


def pairs_of(config: RLConfig, made: Rollout, weights: list[float]) -> Examples:
    """The first answers as pairs, the even ones best, each pair of such a weight."""
    M = 2 * len(weights)
    made = jax.tree.map(lambda x: x[:M], made)
    signs = np.repeat(np.array(weights, np.float32), 2) * np.tile(np.array([1, -1], np.float32), len(weights))
    real = np.arange(config.max_tokens)[None, :] < made.answer_lengths[:, None]
    return examples_of(config, made, np.broadcast_to(signs[:, None], real.shape), real)


def test_online_dpo_begins_at_log_2_and_pushes_a_pair_apart(config):
    """Where policy and reference are one, the gradient is -β / 2 (∇ log p(best) - ∇ log p(worst)), mean over pairs."""
    one = bench(named(with_dpo(config)))
    config = with_dpo(config, **PLAIN)
    run, made = gradients(config, one), by_hand(config)
    defined = models.define_models(config, rl.open_models(config), one.mesh)

    def logprobs(params: Any, examples: Examples) -> jax.Array:
        tokens = learner.answer_tokens(config, defined, defined.policy, params, examples.rollout)
        return jnp.where(examples.mask, tokens.logprobs, 0.0)

    examples = pairs_of(config, made, [1.0, 0.0, 1.0])
    examples = examples._replace(reference=jax.jit(logprobs)(one.first.policy.params, examples))
    gradient, measured = run(examples)
    assert measured["rl/policy_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert measured["rl/pair_margin"] == pytest.approx(0, abs=1e-6)

    def difference(params: Any) -> jax.Array:
        sums = jnp.sum(logprobs(params, examples), axis=1)
        return -config.dpo.beta / 2 * (sums[0] - sums[1] + sums[4] - sums[5]) / 2

    assert_close(gradient, jax.jit(jax.grad(difference))(one.first.policy.params))
    # A prompt without a pair says nothing, whatever its answers are; a minibatch of such prompts changes nothing.
    odd = examples._replace(rollout=examples.rollout._replace(ids=examples.rollout.ids.at[2:4].set(7)))
    jax.tree.map(np.testing.assert_array_equal, run(odd)[0], gradient)
    gradient, measured = run(pairs_of(config, made, [0.0, 0.0]))
    assert measured["train/gradient_norm"] == 0 == measured["train/skipped_steps"]
    _, measured = run(pairs_of(config, made, [1.0, np.nan]))
    assert measured["train/skipped_steps"] == 1


@pytest.mark.slow
def test_pretraining_rows_add_exactly_the_gradient_of_their_loss(config, folders):
    ppo = PPOConfig(pretraining=(MixtureSource(path=folders.rows),), pretraining_rows=4, pretraining_coefficient=0.3)
    one = bench(named(config))
    config = dataclasses.replace(config, ppo=ppo, **PLAIN)
    made = by_hand(config)
    real = np.arange(config.max_tokens)[None, :] < made.answer_lengths[:, None]
    examples = examples_of(config, made, np.random.default_rng(0).standard_normal(real.shape).astype(np.float32), real)
    (rows,) = [next(models.pretraining_rows(config, one.mesh, 0, ((0, (1.0,)),)))]
    assert rows["ids"].shape == (16, 64), "of all four updates"
    rows = jax.tree.map(lambda x: x[:4], rows)
    run = gradients(config, one)
    (without, plain), (both, measured) = run(examples), run(examples, rows)
    definition = models.define_models(config, rl.open_models(config), one.mesh).policy

    def loss(params: Any) -> jax.Array:
        sums = losses.row_sums(params, rows, definition)
        return sums.loss / sums.targets

    expected, gradient = jax.jit(jax.value_and_grad(loss))(one.first.policy.params)
    assert_close(both, jax.tree.map(lambda a, b: a + 0.3 * b, without, gradient))
    assert measured["rl/pretraining_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert "rl/pretraining_loss" not in plain
    assert measured["rl/value_loss"] == plain["rl/value_loss"]


def other(config: RLConfig, **fields: Any) -> RLConfig:
    return dataclasses.replace(config, **fields)


def run(config: RLConfig, **loop: Any) -> RLConfig:
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, **loop))
    rl.main(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "grpo", "dpo"])
def test_stopped_and_gone_on_is_never_stopped(config, folders, kind):
    kl = KLConfig(kind="adaptive", coefficient=0.1, target=1.0, horizon=64)
    ppo = PPOConfig(kl=kl, pretraining=(MixtureSource(path=folders.rows),), pretraining_rows=8)
    config = other(config, ppo=ppo, verifiers=(by(almost_right),), gold=by(share_of_letters), passes=1)
    config = dict(ppo=dataclasses.replace, grpo=with_grpo, dpo=with_dpo)[kind](config)
    whole = run(other(config, workdir=config.workdir + "-whole"))
    run(config, stop_at_step=3)
    run(config)
    assert_same_run(config.workdir, whole.workdir, 4)
    names = list(arrays_of(whole.workdir, 4))
    of = ("policy", "value") if kind == "ppo" else ("policy",)
    parts = [f"{model}/{part}/" for model in of for part in ("params", "optimizer")]
    assert all(any(name.startswith(part) for name in names) for part in (*parts, "coefficient", "kl", "skipped"))

    rolled = [line for line in lines_of(whole.workdir) if "rl/reward" in line]
    assert [line["step"] for line in rolled] == [1, 2, 3, 4]
    for line in rolled:
        # A score of .73 goes through tables, arrays and sums as it is.
        assert line["rl/verifier"] == pytest.approx(0.73, abs=1e-6)
        assert line["rl/reward"] == pytest.approx(line["rl/verifier"] + line["rl/reward_model"], abs=1e-5)
        assert line["rl/sampler_difference"] < 1e-5
        assert 0 <= line["rl/first_old_kl"] < 1e-12
        assert ("rl/pretraining_loss" in line) == (kind == "ppo")
    assert rolled[0]["rl/kl"] == pytest.approx(0, abs=1e-5)
    if kind == "ppo":
        coefficients = [line["rl/kl_coefficient"] for line in rolled]
        assert coefficients[:2] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 16 / 64)]), "below its target: it is lowered"
    evaluated = [line for line in lines_of(whole.workdir) if "eval/reward" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4]
    assert evaluated[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert {"eval/gold", "eval/reward_std", "eval/eos_rate", "eval/answer_tokens"} <= evaluated[0].keys()
    made = model_directory.read(f"{whole.workdir}/model")
    assert made.manifest.facts["eval/reward"] == evaluated[-1]["eval/reward"]
    stored = made.load_params(define_model(made.config))
    np.testing.assert_array_equal(stored["head"], arrays_of(whole.workdir, 4)["policy/params/head"])


def begins_with_a_letter(prompt: str, answer: str) -> float:
    return float(answer[:1].isascii() and answer[:1].isalpha())


VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": dict(
        grpo=GRPOConfig(clip_high=0.28, normalization="token", kl_coefficient=0.0, extra_prompts=6), overlong_tokens=3
    ),
    "gspo": dict(grpo=GRPOConfig(ratio="sequence", clip=0.01, clip_high=0.02)),
    "reinforce": dict(reinforce=ReinforceConfig(baseline="group", kl=KLConfig(kind="adaptive", horizon=64))),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dapo", "gspo", "reinforce"])
def test_a_variant_stopped_and_gone_on_is_never_stopped(config, kind):
    config = other(
        config,
        ppo=None,
        reward_model="",
        criteria=RLConfig.criteria,
        verifiers=(by(begins_with_a_letter),),
        **VARIANTS[kind],
    )
    whole = run(other(config, workdir=config.workdir + "-whole"))
    run(config, stop_at_step=2)
    run(config)
    assert_same_run(config.workdir, whole.workdir, 4)
    rolled = [line for line in lines_of(whole.workdir) if "rl/reward" in line]
    assert all(0 <= line["rl/first_old_kl"] < 1e-12 for line in rolled)
    if kind == "dapo":
        assert all(1 <= line["rl/extra_prompts"] <= 6 for line in rolled if line["rl/replaced_prompts"])
        assert sum(line["rl/replaced_prompts"] for line in rolled) >= 1
        assert all(line["rl/equal_groups"] == 0 for line in rolled if line["rl/extra_prompts"] < 6)
        told = lines_of(whole.workdir, "completions.jsonl")
        assert all(line["reward"] == begins_with_a_letter("", line["answer"]) for line in told), "of those learned from"
    if kind == "reinforce":
        assert rolled[1]["rl/kl_coefficient"] != rolled[0]["rl/kl_coefficient"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIANTS)
def test_eight_devices_learn_a_variant_as_one_does(config, kind):
    config = named(
        other(
            config,
            ppo=None,
            reward_model="",
            criteria=RLConfig.criteria,
            verifiers=(by(almost_right),),
            **VARIANTS[kind],
        )
    )
    made = by_hand(config)
    (one, _), (many, _) = bench(config).learn(made), bench(config, MESHES[2]).learn(made)
    (one, measured), (many, also) = bench(config).learn(made, one), bench(config, MESHES[2]).learn(made, many)
    assert_close(one, many)
    assert measured["rl/clip_fraction"] == pytest.approx(also["rl/clip_fraction"], abs=1e-5)
    assert (measured["rl/clip_fraction"] > 0) or kind != "gspo"


@pytest.mark.slow
def test_a_budget_of_kl_ends_a_run_for_good_killed_or_not(config, tmp_path):
    config = with_grpo(
        config,
        reward_model="",
        criteria=RLConfig.criteria,
        verifiers=(by(share_of_letters),),
        gold=by(almost_right),
        passes=1,
    )
    # The average hardly moves: what is evaluated and written is the reference still, and the policy itself is not.
    average = dataclasses.replace(config.optimizer, ema=0.999999)
    loop = dataclasses.replace(config.loop, checkpoint=CheckpointConfig(every_steps=1))
    config = run(other(config, optimizer=average, kl_budget=0.5, steps=40, temperature=1.0, loop=loop))
    rolled = [line for line in lines_of(config.workdir) if "rl/kl" in line]
    last = rolled[-1]["step"]
    assert [line["rl/kl"] > 0.5 for line in rolled] == [False] * (len(rolled) - 1) + [True]
    assert 4 <= last < 40
    made = model_directory.read(f"{config.workdir}/model")
    assert made.manifest.facts["steps"] == last
    stored = made.load_params(define_model(made.config))
    np.testing.assert_array_equal(stored["head"], arrays_of(config.workdir, last)["policy/ema/head"])
    for line in lines_of(config.workdir):
        assert line.get("eval/kl", 0.0) == pytest.approx(0, abs=1e-3)
    # Nothing was learned from the rollout that went too far: the policy is the one that drew it.
    before, after = arrays_of(config.workdir, last - 1), arrays_of(config.workdir, last)
    for name in (name for name in after if name.startswith("policy/")):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)

    told = lines_of(config.workdir, "completions.jsonl")
    assert [line["step"] for line in told] == [step + 1 for step in range(last) for _ in range(4)]
    assert all(line["prompt"].strip() in WORDS and 1 <= line["tokens"] <= 7 for line in told)
    assert len({line["prompt"] for line in told[:4]}) == 4, "of each prompt one answer first"
    picture = plt_image.imread(f"{config.workdir}/reward_kl.png")
    assert picture.shape[0] > 400 < picture.shape[1]
    assert picture[..., :3].std() > 0.05, "there is something on it"
    points = [(p["step"], p["reward"], p["gold"], p["root_kl"] ** 2) for p in frontier(config.workdir)]
    wanted = [(n["step"], n["rl/reward"], n["rl/gold"], max(n["rl/kl"], 0.0)) for n in rolled]
    np.testing.assert_allclose(points, wanted, atol=1e-9)

    # Killed before its last save: it goes on from the one before, without what it wrote since.
    killed = other(config, workdir=str(tmp_path / "killed"))
    shutil.copytree(config.workdir, killed.workdir)
    shutil.rmtree(f"{killed.workdir}/checkpoints/{last}")
    log = Path(killed.workdir) / "completions.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 40, "prompt": "x"}\n{"step": 4, "pro')
    run(killed)
    assert_same_run(killed.workdir, config.workdir, last)
    # Started again after its end, it does not train on.
    run(killed)
    assert_same_run(killed.workdir, config.workdir, last)


def count_of_letters(prompt: str, answer: str) -> float:
    return min(sum(c.isascii() and c.isalpha() for c in answer) / 8, 1.0)


@pytest.mark.slow
def test_the_controller_holds_its_target(config):
    """A reward that can always be bought with more KL, and a coefficient that begins four times too high."""
    kl = KLConfig(kind="adaptive", coefficient=0.3, target=4.0, horizon=400)
    config = dataclasses.replace(
        config,
        reward_model="",
        criteria=RLConfig.criteria,
        verifiers=(by(count_of_letters),),
        sources=config.sources[:1],
        ppo=PPOConfig(kl=kl, value_rate=3.0),
        prompts=64,
        samples=1,
        max_tokens=8,
        temperature=1.0,
        steps=75,
        minibatch_answers=32,
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", peak=2e-2, warmup_steps=2, final_share=1.0),
    )
    run(config, checkpoint=CheckpointConfig(every_steps=1000))
    rolled = lines_of(config.workdir)[-25:]
    mean = lambda name: np.mean([line[name] for line in rolled])
    assert mean("rl/kl") == pytest.approx(4.0, rel=0.25), [round(line["rl/kl"], 2) for line in rolled]
    assert mean("rl/kl_coefficient") < 0.15
    assert mean("rl/reward") > lines_of(config.workdir)[0]["rl/reward"] + 0.15


def test_fields_that_do_not_go_together_are_refused_by_name(config):
    ppo, grpo = PPOConfig(), GRPOConfig()
    for message, fields in {
        "^ppo: give exactly one of ppo, grpo, dpo and reinforce; got ppo and grpo": dict(ppo=ppo, grpo=grpo),
        "^ppo: give exactly one": dict(ppo=None),
        "^model: is empty": dict(model=""),
        "^reward_model: is empty, and there is no verifier": dict(reward_model=""),
        "^criteria: got overall, overall": dict(criteria=(CRITERIA[0], CRITERIA[0])),
        "^criteria: is empty": dict(criteria=()),
        "^criteria: weighs what a reward model says": dict(reward_model="", verifiers=(by(almost_right),)),
        "^samples: got 1; a group needs": dict(ppo=None, grpo=grpo, samples=1, prompts=8),
        "^samples: got 1; a group needs at least": dict(ppo=None, dpo=OnlineDPOConfig(), samples=1, prompts=8),
        "^minibatch_answers: 16 answers do not divide 4 pairs": dict(
            ppo=None, dpo=OnlineDPOConfig(), minibatch_answers=16
        ),
        "^minibatch_answers: 1 answers do not divide": dict(ppo=None, dpo=OnlineDPOConfig(), minibatch_answers=1),
        "^minibatch_answers: 6 does not divide a rollout of 16": dict(minibatch_answers=6),
        "^sources: none has split='train'": dict(sources=config.sources[1:]),
        "^temperature: got 0.0; above 0": dict(temperature=0.0),
        "^max_tokens: got 0": dict(max_tokens=0),
        "^missing_eos_amount: got 0.0; what": dict(missing_eos="penalty"),
        "^missing_eos_amount: got 0.0, about": dict(missing_eos="replace"),
        "^missing_eos_amount: is for penalty and replace": dict(missing_eos_amount=1.0),
        "^schedule.peak: is 0": dict(schedule=ScheduleConfig(warmup_steps=1)),
        "^seed: got": dict(seed=2**32),
    }.items():
        with pytest.raises(ConfigError, match=message):
            other(config, **fields)
    with pytest.raises(ConfigError, match="^beta: got 0.0"):
        OnlineDPOConfig(beta=0.0)
    with pytest.raises(ConfigError, match="value_optimizer.ema"):
        PPOConfig(value_optimizer=OptimizerConfig(ema=0.9))
    # Truncated sampling has log-probabilities of its own: there is no field for it.
    for field in ("top_k", "top_p", "min_p", "repetition_penalty", "sampling.top_k"):
        with pytest.raises(ConfigError, match="no such field"):
            override(config, {field: "0.5"})


def test_what_does_not_fit_the_mesh_is_refused_by_name(config, folders):
    rows = PPOConfig(pretraining=(MixtureSource(path=folders.rows),), pretraining_rows=4)
    for message, fields in {
        "^minibatch_answers: 4 do not divide among 8 parts": dict(minibatch_answers=4),
        "^ppo.pretraining_rows: 4 do not divide among 8 parts": dict(ppo=rows),
        "^loss_chunk_tokens: 5 does not divide a minibatch's 56": dict(loss_chunk_tokens=5),
    }.items():
        with pytest.raises(ConfigError, match=message):
            rl.validate(other(config, **fields), 8)
    rl.validate(config, 8)


def test_models_that_do_not_fit_are_refused_by_name(config, folders):
    foreign = ByteTokenizer(("<pad>", "<s>", "</s>"))
    template = chat.load("chatml", folders.tokenizer)
    reward = dict(seed=1, criteria=("overall", "short"))
    chatting = folders.model("chatting", template=template)
    rows = PPOConfig(pretraining=(MixtureSource(path=folders.rows),))
    for message, fields in {
        "^model: .* is a reward model; a language model is needed": dict(model=folders.reward),
        "^reward_model: .* is a language model": dict(reward_model=folders.policy),
        "^reward_model: was trained with another tokenizer": dict(
            reward_model=folders.model("foreign", tokenizer=foreign, **reward)
        ),
        "^reward_model: was trained with another chat template": dict(model=chatting),
        "^criteria: the reward model has no 'kind'; it has overall, short": dict(
            criteria=(CriterionWeight(name="kind"),)
        ),
        "^max_tokens: 69 tokens with max_prompt_tokens, but model was trained on rows of 64": dict(max_tokens=60),
        "^ppo.pretraining: .* was packed with another tokenizer": dict(
            model=folders.model("other", tokenizer=foreign),
            reward_model="",
            criteria=RLConfig.criteria,
            verifiers=(by(almost_right),),
            ppo=rows,
        ),
        "^loss_chunk_tokens: 56 does not divide 512 of rows": dict(ppo=rows, loss_chunk_tokens=56),
        "^model: .*nowhere: no such folder": dict(model=str(folders.root / "nowhere")),
    }.items():
        with pytest.raises(UserError, match=message):
            rl.open_models(other(config, **fields))
    rl.open_models(other(config, model=chatting, reward_model=folders.model("judge", template=template, **reward)))


def test_prompts_that_do_not_fit_are_refused_by_name(config, tmp_path):
    def asked(*records: dict, **fields: Any) -> RLConfig:
        train = ChatSource(name="train", path=written(tmp_path / "asked.jsonl", records))
        return other(config, sources=(train,), workdir=str(tmp_path / f"run{len(fields)}{len(records)}"), **fields)

    judged: Any = dict(
        reward_model="", criteria=RLConfig.criteria, verifiers=(VerifierConfig(kind="exact", target_field="answer"),)
    )
    with pytest.raises(UserError, match="no prompt is left; dropped {'longer_than_max_prompt_tokens': 1}"):
        rl.main(asked({"prompt": "much too long for nine"}))
    with pytest.raises(UserError, match="verifiers: .*asked.jsonl:2: has no field 'answer'"):
        rl.main(asked({"prompt": "1", "answer": "2"}, {"prompt": "2"}, **judged))
    with pytest.raises(UserError, match="gold: .*asked.jsonl:1: has no field 'best'"):
        rl.main(asked({"prompt": "2"}, gold=VerifierConfig(kind="exact", target_field="best")))


STEPS = 24
CONFIG = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl.config import CriterionWeight, KLConfig, PPOConfig, RLConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

def get_config():
    return RLConfig(
        model=%r,
        reward_model=%r,
        criteria=(CriterionWeight(name="short"),),
        verifiers=(VerifierConfig(kind="regex", target_field="pattern"),),
        sources=(ChatSource(name="train", path=%r), ChatSource(name="heldout", path=%r, split="heldout")),
        ppo=PPOConfig(kl=KLConfig(kind="adaptive", coefficient=0.1, target=1.0, horizon=64)),
        prompts=8,
        samples=2,
        max_prompt_tokens=9,
        max_tokens=7,
        steps=%d,
        minibatch_answers=8,
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3, ema=0.9),
        schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=-1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=8, checkpoint=CheckpointConfig(every_steps=4)),
    )
"""


@pytest.fixture(scope="module")
def runner(folders) -> Runner:
    asked = ({"prompt": f"{word} ", "pattern": f"[{word}]"} for word in WORDS)
    path = written(folders.root / "patterns.jsonl", asked)
    return Runner(folders.root, "rl", CONFIG % (folders.policy, folders.reward, path, path, STEPS))


@pytest.fixture(scope="module")
def never_stopped(runner) -> Path:
    workdir = runner.root / "whole"
    runner.run(workdir)
    assert [line["step"] for line in lines_of(workdir) if "rl/reward" in line] == list(range(1, STEPS + 1))
    return workdir


@pytest.mark.slow
def test_killed_at_random_moments_is_the_same_as_never_killed(runner, never_stopped):
    workdir = runner.root / "killed"
    runner.kill(workdir, 4, seed=5, first=7, lines=(-4, 6))
    runner.run(workdir)
    assert_same_run(workdir, never_stopped, STEPS)
    assert (workdir / "model/params").exists()


@pytest.mark.slow
def test_two_processes_stop_and_go_on(runner, never_stopped):
    whole, stopped = runner.root / "two", runner.root / "two-stopped"
    runner.run(whole, "--config.loop.stop_at_step=8", processes=2)
    runner.run(stopped, "--config.loop.stop_at_step=4", processes=2)
    runner.run(stopped, "--config.loop.stop_at_step=8", processes=2)
    assert_same_run(stopped, whole, 8)
    for two, one in zip(lines_of(whole), lines_of(never_stopped), strict=False):
        # gloo and the in-process collectives add in different orders, which grows from step to step.
        for name in ("rl/policy_loss", "rl/value_loss", "rl/reward", "rl/kl", "eval/reward", "eval/kl"):
            if name in one and one["step"] <= 4:
                assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (name, one["step"])


FEW = ExpertsConfig(count=4, chosen=2, feed_forward=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "base", "experts"),
    [
        ("ppo", "compute", ExpertsConfig()),
        ("ppo", "nf4", ExpertsConfig()),
        ("grpo", "int8", ExpertsConfig()),
        ("ppo", "nf4", FEW),
        ("grpo", "compute", FEW),
    ],
)
def test_adapters_learn_over_the_reference_and_the_reward_model(
    config, folders, method, base, experts, monkeypatch, caplog
):
    if experts.count:
        mixtures = (
            folders.model("mixture", experts=experts),
            folders.model("mixture-reward", seed=1, criteria=("overall", "short"), experts=experts),
        )
        config = dataclasses.replace(config, model=mixtures[0], reward_model=mixtures[1])
    config = dataclasses.replace(config, lora=LoRAConfig(rank=2, dora=method == "grpo", base=base), steps=2)
    config = config if method == "ppo" else with_grpo(config)
    read, seen = [], []
    load = model_directory.ModelDirectory.load_params

    def recorded(self, definition, *rest, **given):
        made = load(self, definition, *rest, **given)
        read.append(made)
        return made

    monkeypatch.setattr(model_directory.ModelDirectory, "load_params", recorded)
    policy_of = learner.policy_of
    monkeypatch.setattr(rl, "policy_of", lambda m, p, f: (seen.append(made := policy_of(m, p, f)), made)[1])
    rl.main(config)
    unsaid = bool(experts.count and config.lora.dora)
    told = "no adapter/ will be written, model/ will have all of it: peft has no DoRA beside mlp.experts"
    assert (told in caplog.text) == unsaid
    assert (Path(config.workdir) / "adapter").exists() != unsaid
    # Outside of compiled steps, the whole policy is adapters over the reference's own arrays.
    whole = [params for params in seen if not isinstance(params["embedding"], jax.core.Tracer)]
    assert whole
    assert all(params["embedding"] is read[0]["embedding"] for params in whole)
    first = next(line for line in lines_of(config.workdir) if "rl/kl" in line)
    assert abs(first["rl/kl"]) < 1e-5
    assert first["rl/first_old_kl"] < 1e-6
    assert first["rl/sampler_difference"] < 1e-5
    kept = arrays_of(config.workdir, 2)
    parts = {name.split("/")[0] for name in kept if "/params/" in name and "_lora_" not in name}
    assert parts == ({"value"} if method == "ppo" else set()), "the value function's head alone is whole"
    assert {name.split("/")[-1] for name in kept if "/params/" in name and "_lora_" not in name} <= {
        "score",
        "score_bias",
    }
    base, made = (model_directory.read(f) for f in (config.model, f"{config.workdir}/model"))
    old, new = (found.load_params(define_model(found.config)) for found in (base, made))
    np.testing.assert_array_equal(new["embedding"], old["embedding"])
    part = "experts" if experts.count else "mlp"
    assert np.abs(new["stack"]["0"][part]["up"] - old["stack"]["0"][part]["up"]).max() > 1e-6


def test_adapters_of_a_policy_drop_nothing(config):
    with pytest.raises(ConfigError, match="lora.dropout: must be 0"):
        dataclasses.replace(config, lora=LoRAConfig(dropout=0.1))


@pytest.mark.slow
def test_a_bad_update_is_kept_replayed_and_its_prompt_left_out(config, folders, monkeypatch, tmp_path, capsys):
    bad = 2
    ids = np.int32(sampler_ids(config, WORDS[bad]))
    real = rl.answer_tokens

    def poisoned(config, models, definition, params, rollout):
        tokens = real(config, models, definition, params, rollout)
        met = jnp.any(jnp.all(rollout.ids[:, : len(ids)] == ids[None], axis=1))
        return tokens._replace(logprobs=tokens.logprobs * jnp.sqrt(jnp.where(met, -1.0, 1.0)))

    monkeypatch.setattr(rl, "answer_tokens", poisoned)
    config = run(config)
    kept = sorted(int(path.name) for path in (Path(config.workdir) / "blackbox").iterdir())
    assert kept
    assert skipped(config) == len(kept)
    record = json.loads((Path(config.workdir) / f"blackbox/{kept[0]}/record.json").read_text())
    assert record["repeated"]
    assert record["metrics"]["rl/policy_loss"] == "nan"
    assert "train/gradient_norm/embedding" in record["metrics"]
    rows = record["rows"]
    assert len(rows) == config.minibatch_answers
    assert str(bad) in {row["prompt"] for row in rows}
    assert all(row["of"] == f"{folders.root}/prompts.jsonl:{int(row['prompt']) + 1}" for row in rows)

    # Nothing of the run depends on whether updates are kept.
    plain = run(other(config, workdir=str(tmp_path / "plain")), black_boxes=0)
    assert not (Path(plain.workdir) / "blackbox").exists()
    ones, others = (arrays_of(workdir, 4) for workdir in (config.workdir, plain.workdir))
    assert ones.keys() == others.keys()
    for name in ones:
        if not name.endswith("halt"):
            np.testing.assert_array_equal(ones[name], others[name], err_msg=name)

    replay = importlib.util.spec_from_file_location("replay", Path(__file__).parents[2] / "tools/replay.py")
    module = importlib.util.module_from_spec(replay)
    replay.loader.exec_module(module)
    capsys.readouterr()
    assert module.main([config.workdir, str(kept[0])]) == 0
    said = capsys.readouterr().out
    assert f"step {kept[0]}, again on cpu: bad" in said
    assert "first nan: sqrt in poisoned (" in said
    assert f"prompt {bad}  of " in said

    without = run(other(config, workdir=str(tmp_path / "without"), exclude=(str(bad),)))
    assert skipped(without) == 0
    assert not (Path(without.workdir) / "blackbox").exists()


def skipped(config: RLConfig) -> int:
    return [line["train/skipped_steps"] for line in lines_of(config.workdir) if "rl/reward" in line][-1]


def sampler_ids(config: RLConfig, word: str) -> list[int]:
    directory = rl.open_models(config).policy
    return rl.sampler_of(config, directory).encode(f"{word} ")
