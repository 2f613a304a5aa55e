"""What an iteration makes of a rollout before and around the updates: scores, advantages, order, controller, counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.base.metrics import Mean
from jaxlm.base.metrics import values as values_of
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.rl import forward
from jaxlm.rl.config import CriterionWeight, GRPOConfig, KLConfig, OnlineDPOConfig, PPOConfig, ReinforceConfig, RLConfig
from jaxlm.rl.learner import (
    Assessed,
    Learner,
    Models,
    RLState,
    assess,
    order_of_answers,
    rollout_figures,
    rollout_sums,
    updates_a_rollout,
)
from jaxlm.rl.rollout import Rollout
from jaxlm.train.state import TrainState

P, K, S, T = 2, 4, 10, 5
B = P * K
SHAPE = dict(vocab_size=272, layers=1, width=16, heads=2, feed_forward=32, compute="float32")
POLICY = define_model(ModelConfig(**SHAPE).complete())
VALUE = define_model(ModelConfig(**SHAPE, criteria=("value",)).complete())
REWARD = define_model(ModelConfig(**SHAPE, criteria=("overall", "short", "kind")).complete())
LENGTHS = (1, 5, 3, 5, 2, 4, 5, 1)
ENDED = (True, False, True, True, True, True, False, True)


def config(**fields) -> RLConfig:
    made: dict[str, Any] = dict(
        model="unread",
        reward_model="unread",
        verifiers=(VerifierConfig(kind="exact"),),
        sources=(ChatSource(name="train", path="unread.jsonl"),),
        criteria=(CriterionWeight(name="overall", weight=2.0), CriterionWeight(name="kind", weight=-0.5)),
        ppo=PPOConfig(),
        prompts=P,
        samples=K,
        max_prompt_tokens=S - T,
        max_tokens=T,
        minibatch_answers=4,
    )
    return RLConfig(**made | fields)


def grpo(**fields) -> dict:
    return dict(ppo=None, grpo=GRPOConfig(**fields))


def rollout(seed: int = 0) -> Rollout:
    """Eight answers; `seed` fills what lies behind them and nothing else."""
    ids = np.random.default_rng(100 + seed).integers(0, 272, (B, S))
    behind = np.random.default_rng(100 + seed).standard_normal((B, T))
    fixed = np.random.default_rng(7)
    prompts = np.repeat([3, 5], K)
    for row in range(B):
        ids[row, : prompts[row] + LENGTHS[row]] = fixed.integers(0, 259, prompts[row] + LENGTHS[row])
        behind[row, : LENGTHS[row]] = -1.0
    return Rollout(
        ids=jnp.asarray(ids, jnp.int32),
        prompt_lengths=jnp.asarray(prompts, jnp.int32),
        answer_lengths=jnp.array(LENGTHS, jnp.int32),
        ended=jnp.array(ENDED),
        scores=jnp.asarray(0.73 + np.arange(B), jnp.float32),
        sampler_logprobs=jnp.asarray(behind, jnp.float32),
    )


def assessed(logprob: float = -1.0, reference: float = -1.0) -> Assessed:
    """Made-up numbers, NaN outside of the answers."""
    mask = rollout().answer_mask
    each = lambda x: jnp.where(mask, x, jnp.nan)
    values = 0.1 * jnp.arange(B * T, dtype=jnp.float32).reshape(B, T)
    return Assessed(each(logprob), each(reference), each(values), jnp.zeros(B))


def state_of(params: Any = (), value: Any = (), coefficient: float = 0.05, buffer: Any = ()) -> RLState:
    train = lambda params, optimizer: TrainState(jnp.int32(0), params, optimizer, {}, jnp.int32(0))
    return RLState(
        step=jnp.int32(0),
        policy=train(params, buffer),
        value=train(value, ()) if value else (),
        coefficient=jnp.float32(coefficient),
        kl=jnp.float32(0),
        skipped=jnp.int32(0),
    )


def examples_of(config: RLConfig, scores: Any, made: Assessed | None = None, coefficient: float = 0.05) -> Any:
    learner = Learner(config, Models(POLICY, POLICY, None, None), lambda *_: None)
    scores = jnp.asarray(scores, jnp.float32)
    return learner._examples(state_of(coefficient=coefficient), rollout(), made or assessed(), scores)


def test_a_score_is_read_at_the_last_real_token_and_survives_whole():
    ppo = PPOConfig(gamma=0.5, lam=1.0)
    found = examples_of(config(ppo=ppo), [0.73] * B, coefficient=0.0)
    for row, length in enumerate(LENGTHS):
        # With λ = 1 a return is the discounted sum of the rewards to come, whatever the values are.
        expected = np.float32(0.73) * 0.5 ** np.arange(length - 1, -1, -1)
        np.testing.assert_allclose(found.returns[row, :length], expected, atol=1e-6)
        assert (found.returns[row, length:] == 0).all()


def test_the_penalty_is_k1_at_every_token_in_the_reward():
    ppo = PPOConfig(gamma=1.0, lam=1.0)
    found = examples_of(config(ppo=ppo), np.zeros(B), assessed(-1.0, -1.3), coefficient=0.1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found.returns[row, :length], -0.03 * np.arange(length, 0, -1), rtol=1e-5)


def test_advantages_are_whitened_over_the_whole_rollout():
    found = examples_of(config(), np.arange(B))
    mask = np.asarray(found.mask)
    kept = np.asarray(found.advantages, np.float64)[mask]
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert (np.asarray(found.advantages)[~mask] == 0).all()


def test_groups_are_the_answers_of_one_prompt():
    scores = [1.0, 0, 0, 1, 5, 5, 5, 5]
    for baseline, one in (("group", 0.865875), ("leave_one_out", 2 / 3)):
        found = examples_of(config(**grpo(baseline=baseline)), scores)
        expected = [one, -one, -one, one, 0, 0, 0, 0]
        np.testing.assert_allclose(found.advantages, np.repeat(np.array(expected)[:, None], T, axis=1), atol=1e-6)
        assert (found.advantages[4:] == 0).all()


def test_pairs_are_the_best_and_the_worst_answer_to_a_prompt():
    scores = [0.5, 0.9, 0.9, 0.1, 5, 5, 5, 5]
    dpo = dict(ppo=None, dpo=OnlineDPOConfig())
    found = examples_of(config(**dpo), scores)
    assert found.advantages[:, 0].tolist() == [0, 1, 0, -1, 0, 0, 0, 0]
    # An answer that was cut off can be made to be in no pair: of prompt 0 it is the second, of prompt 1 the third.
    found = examples_of(config(**dpo, missing_eos="exclude"), scores)
    assert found.advantages[:, 0].tolist() == [0, 0, 1, -1, 0, 0, 0, 0]
    found = examples_of(config(**dpo, missing_eos="replace", missing_eos_amount=-1.0), scores)
    assert found.advantages[:, 0].tolist() == [0, -1, 1, 0, 1, 0, -1, 0]
    thrice = config(**dpo, passes=3)
    order = order_of_answers(thrice, jnp.int32(2), examples_of(config(**dpo), scores))
    assert order.shape == (updates_a_rollout(thrice), 4) == (3, 4)
    assert [sorted(map(tuple, row)) for row in np.asarray(order).reshape(3, 2, 2).tolist()] == [[(1, 3), (4, 4)]] * 3


CUT = ~np.array(ENDED)


@pytest.mark.parametrize(("kind", "amount"), [("none", 0.0), ("penalty", 2.0), ("replace", -3.0), ("exclude", 0.0)])
def test_cut_off_answers(kind, amount):
    scores = np.arange(B) + 0.5
    ruled = dict(none=scores, penalty=scores - 2.0 * CUT, replace=np.where(CUT, -3.0, scores), exclude=scores)[kind]
    fields = dict(missing_eos=kind, missing_eos_amount=amount)
    ppo = PPOConfig(gamma=1.0, lam=1.0)
    found = examples_of(config(ppo=ppo, **fields), scores, coefficient=0.0)
    real = np.asarray(rollout().answer_mask)
    trained = real & ~CUT[:, None] if kind == "exclude" else real
    np.testing.assert_array_equal(found.mask, trained)
    np.testing.assert_allclose(found.returns, np.where(trained, ruled[:, None], 0), rtol=1e-6)
    advantages = np.asarray(found.advantages)
    assert (advantages[~trained] == 0).all()
    assert advantages[trained].mean() == pytest.approx(0, abs=1e-6), "whitened over what is trained on"
    found = examples_of(config(**grpo(baseline="leave_one_out"), **fields), scores)
    np.testing.assert_array_equal(found.mask, trained)
    groups = ruled.reshape(P, K)
    expected = (groups - (groups.sum(axis=1, keepdims=True) - groups) / (K - 1)).reshape(-1)
    np.testing.assert_allclose(found.advantages[:, 0], expected, atol=1e-5)


def recorded(policy: TrainState, value: Any, examples: Any, rows: dict, frozen=None) -> Any:
    """An update that notes which answers it was given, and changes nothing else."""
    noted = policy.optimizer.at[policy.step].set(examples.rollout.scores)
    skipped = policy.skipped + jnp.any(jnp.isnan(examples.rollout.scores)).astype(jnp.int32)
    policy = policy._replace(step=policy.step + 1, optimizer=noted, skipped=skipped)
    return (policy, value), {"rl/old_kl": Mean(jnp.float32(0), jnp.float32(1))}


class Whole:
    """A learner with all its models, compiled once; `recorded` in the updates' place."""

    def __init__(self):
        kl = KLConfig(kind="adaptive", coefficient=0.15, target=2.0, horizon=80)
        self.config = config(ppo=PPOConfig(kl=kl), passes=2, temperature=0.7)
        self.models = Models(POLICY, POLICY, VALUE, REWARD, ("overall", "short", "kind"), 259)
        seeds = {"policy": 0, "reference": 1, "value": 2, "reward": 3}
        definitions = {"policy": POLICY, "reference": POLICY, "value": VALUE, "reward": REWARD}
        make = lambda: {name: initialize(definitions[name], seed) for name, seed in seeds.items()}
        self.params = jax.jit(make)()
        self.frozen = {name: self.params[name] for name in ("reference", "reward")}
        self.updates = updates_a_rollout(self.config)
        self.learn = jax.jit(Learner(self.config, self.models, recorded))

    def state(self, **fields) -> RLState:
        buffer = jnp.zeros((self.updates, self.config.minibatch_answers))
        return state_of(self.params["policy"], self.params["value"], 0.15, buffer)._replace(**fields)

    def __call__(self, made: Rollout, **fields):
        return jax.device_get(self.learn(self.state(**fields), {"frozen": self.frozen, "rollout": made}))

    @functools.cached_property
    def assessed(self) -> Assessed:
        params = self.params
        return jax.jit(functools.partial(assess, self.config, self.models))(
            params["policy"], params["value"], self.frozen, rollout()
        )


@pytest.fixture(scope="module")
def whole() -> Whole:
    return Whole()


def test_each_pass_takes_every_answer_once_in_an_order_of_its_own(whole):
    assert whole.updates == 4
    taken = whole(rollout())[0].policy.optimizer.reshape(2, B)
    assert sorted(taken[0]) == sorted(taken[1]) == np.asarray(rollout().scores).tolist()
    assert taken[0].tolist() != taken[1].tolist()
    later = whole(rollout(), step=jnp.int32(1))[0].policy.optimizer.reshape(2, B)
    assert later[0].tolist() not in (taken[0].tolist(), taken[1].tolist())
    assert sorted(later[0]) == sorted(taken[0])


def test_all_models_are_asked_at_the_rollouts_temperature_with_their_own_parameters(whole):
    found, params, mask = whole.assessed, whole.params, np.asarray(rollout().answer_mask)
    tokens = jax.jit(lambda p: forward.answer_tokens(POLICY, p, rollout(), 0.7, 0, 259).logprobs)
    for name, got in (("policy", found.logprobs), ("reference", found.reference)):
        np.testing.assert_allclose(got[mask], tokens(params[name])[mask], atol=1e-5)
    values = jax.jit(lambda p: forward.answer_values(VALUE, p, rollout()))(params["value"])
    np.testing.assert_allclose(found.values[mask], values[mask], atol=1e-5)
    scores = np.asarray(jax.jit(lambda p: forward.rewards(REWARD, p, rollout()))(params["reward"]))
    # Criteria by name, not by place: "short" is none of those that count.
    np.testing.assert_allclose(found.model_scores, 2 * scores[:, 0] - 0.5 * scores[:, 2], atol=1e-5)


def test_measurements_of_a_rollout(whole):
    state, measured, answers = whole(rollout())
    found, mask = jax.device_get(whole.assessed), np.asarray(rollout().answer_mask)
    shown = values_of(measured)
    drift = np.where(mask, found.logprobs - found.reference, 0).sum(axis=1)
    scores = np.asarray(rollout().scores) + found.model_scores
    np.testing.assert_allclose(answers.kl, drift, atol=1e-5)
    np.testing.assert_allclose(answers.score, scores, atol=1e-5)
    expected = {
        "rl/reward": scores.mean(),
        "rl/reward_std": scores.std(),
        "rl/reward_model": found.model_scores.mean(),
        "rl/verifier": np.mean(0.73 + np.arange(B)),
        "rl/kl": drift.mean(),
        "rl/answer_tokens": np.mean(LENGTHS),
        "rl/eos_rate": np.mean(ENDED),
        "rl/kl_coefficient": 0.15,
        "rl/sampler_difference": np.abs(found.logprobs + 1)[mask].mean(),
        "train/skipped_steps": 0,
    }
    for name, value in expected.items():
        assert shown[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert state.kl == pytest.approx(drift.mean(), rel=1e-5)
    assert state.step == 1


def test_the_coefficient_turns_with_the_kl_of_the_rollout(whole):
    observed = float(whole.assessed.kl(rollout()).mean())
    error = np.clip(observed / 2.0 - 1, -0.2, 0.2)
    assert whole(rollout())[0].coefficient == pytest.approx(0.15 * (1 + error * B / 80), rel=1e-5)


def test_what_lies_behind_an_answer_changes_no_bit(whole):
    (*one, answers), (*other, also) = whole(rollout(0)), whole(rollout(1))
    jax.tree.map(np.testing.assert_array_equal, (one, answers[:2]), (other, also[:2]))


def test_rollouts_with_a_skipped_update_are_counted_and_leave_the_controller_alone(whole):
    # The loop ends runs in which nothing but skipping goes on: it counts rollouts, whatever their updates.
    lost = rollout()._replace(scores=jnp.full(B, jnp.nan))
    state, measured, _ = whole(lost)
    assert (state.policy.skipped, state.skipped, measured["train/skipped_steps"].sum) == (4, 1, 1)
    assert state.coefficient == np.float32(0.15), "nothing was learned"
    part = rollout()._replace(scores=rollout().scores.at[2].set(jnp.nan))
    state, measured, _ = whole(part, skipped=jnp.int32(6))
    assert (state.policy.skipped, state.skipped, measured["train/skipped_steps"].sum) == (2, 7, 7)
    assert state.coefficient != np.float32(0.15)
    # Neither does a KL that is no number.
    broken = whole.frozen | {"reference": jax.tree.map(lambda x: x * jnp.nan, whole.frozen["reference"])}
    state, _, _ = jax.device_get(whole.learn(whole.state(), {"frozen": broken, "rollout": rollout()}))
    assert state.coefficient == np.float32(0.15)
    assert np.isnan(state.kl)


def test_rows_that_only_fill_a_batch_count_nowhere():
    made = rollout()._replace(answer_lengths=jnp.array([*LENGTHS[:5], 0, 0, 0], jnp.int32))
    mask = np.asarray(made.answer_mask)
    logprobs = jnp.where(mask, -1.0, jnp.nan)
    seen = Assessed(logprobs, logprobs - 0.2, logprobs, jnp.zeros(B))
    scores = jnp.where(made.answer_lengths > 0, jnp.arange(B, dtype=jnp.float32), jnp.nan)
    figures = rollout_figures(rollout_sums(made, seen, scores), "eval/")
    assert figures["eval/reward"] == 2
    assert figures["eval/reward_std"] == pytest.approx(np.sqrt(2))
    assert figures["eval/kl"] == pytest.approx(0.2 * sum(LENGTHS[:5]) / 5)
    assert figures["eval/answer_tokens"] == sum(LENGTHS[:5]) / 5
    assert figures["eval/eos_rate"] == 0.8


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_takes_the_reward_to_come_over_the_whole_rollout(baseline):
    asked = config(ppo=None, reinforce=ReinforceConfig(baseline=baseline, gamma=0.5), prompts=2)
    scores = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    found = examples_of(asked, scores, assessed(-1.0, -1.3), coefficient=0.1)
    if baseline == "group":
        scores -= np.repeat([0.5, 1.5], K)
    mask = np.arange(T)[None, :] < np.array(LENGTHS)[:, None]
    raw = np.zeros((B, T))
    for row, length in enumerate(LENGTHS):
        later = 0.0
        for t in reversed(range(length)):
            later = -0.03 + (scores[row] if t == length - 1 else 0.0) + 0.5 * later
            raw[row, t] = later
    expected = (raw - raw[mask].mean()) / np.sqrt(raw[mask].var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.asarray(found.advantages)[mask], expected[mask], atol=1e-5)
    assert (np.asarray(found.advantages)[~mask] == 0).all()
    assert (found.returns == 0).all()


def test_long_answers_lose_softly_before_the_baseline_is_taken():
    plain = examples_of(config(**grpo(baseline="mean")), np.zeros(B))
    assert (plain.advantages == 0).all()
    found = examples_of(config(**grpo(baseline="mean"), overlong_tokens=2), np.zeros(B))
    lost = -np.clip((np.array(LENGTHS, np.float64) - 3) / 2, 0, 1).reshape(P, K)
    expected = (lost - lost.mean(axis=1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(found.advantages[:, 0], expected, atol=1e-6)
