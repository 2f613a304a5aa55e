"""What is done with a rollout, as one compiled program: scores, advantages, and the updates that a stage gives.

    learn = Learner(config, models, update)
    state, measured, answers = jax.jit(learn)(state, {"frozen": …, "rollout": …})

Order: score (policy, reference, values, rewards; minibatch by minibatch, at the updates' own shape), then advantages
over the whole rollout, then `passes` times all minibatches in an order drawn anew. After a bad update policy and value
function stand still until the next rollout, so that it can be looked at (`Updated`, `replay/blackbox.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base import metrics, rng, sharding
from jaxlm.base.arrays import Array, Bool, Float32
from jaxlm.base.metrics import Mean
from jaxlm.model import lora
from jaxlm.model.weights import Definition, Params
from jaxlm.rl import advantages as adv
from jaxlm.rl import forward, kl, objectives
from jaxlm.rl.config import RLConfig
from jaxlm.rl.rollout import Rollout
from jaxlm.train import optimizer as optimizers
from jaxlm.train.state import TrainState


class RLState(NamedTuple):
    """All that an iteration changes; saved at its end."""

    step: Any
    """int32 `[]`: rollouts learned from"""
    policy: Any
    """TrainState"""
    value: Any
    """TrainState of the value function; () where there is none"""
    coefficient: Any
    """float32 `[]`: PPO's and REINFORCE++'s KL penalty for the next rollout"""
    kl: Any
    """float32 `[]`: the last rollout's KL to the reference, nats an answer"""
    skipped: Any
    """int32 `[]`: rollouts with an update that changed nothing, since loss or gradient was not finite, or a spike"""


class Updated(NamedTuple):
    """What an update changes; as `replay/blackbox.py` wants a state."""

    policy: Any
    value: Any

    @property
    def step(self) -> Any:
        """Updates, over all rollouts."""
        return self.policy.step

    @property
    def skipped(self) -> Any:
        return self.policy.skipped

    @property
    def halt(self) -> Any:
        return self.policy.halt

    def turned(self, back: Any, halt: Any) -> "Updated":
        return Updated(*(part.turned(back, halt) if part else part for part in self))


@dataclasses.dataclass(frozen=True)
class Models:
    """Definitions, without numbers; None: there is no such model."""

    policy: Definition
    reference: Definition
    value: Definition | None
    reward: Definition | None
    criteria: tuple[str, ...] = ()
    """of the reward model"""
    vocabulary: int | None = None
    """of the tokenizer, where the policy has more logits than that"""


class Assessed(NamedTuple):
    """Of a rollout, before anything is learned from it."""

    logprobs: Array
    """float32 `[B, T]`: of the policy that drew it, by the learner's own forward pass"""
    reference: Array
    """float32 `[B, T]`"""
    values: Array
    """float32 `[B, T]`; zeros without a value function"""
    model_scores: Array
    """float32 `[B]`: the reward model's, criteria weighted; zeros without one"""

    def kl(self, rollout: Rollout) -> Float32[Array, "B"]:
        """k1 summed over each answer, nats."""
        mask = rollout.answer_mask
        return jnp.sum(jnp.where(mask, kl.k1(self.logprobs, self.reference), 0.0), axis=1)


class Examples(NamedTuple):
    """What an update sees of answers; leading axis B."""

    rollout: Rollout
    logprobs: Array
    reference: Array
    values: Array
    advantages: Array
    """float32 `[B, T]`; DPO's: 1 for the best answer to a prompt, -1 for the worst, 0 for others"""
    returns: Array
    """float32 `[B, T]`; PPO's"""
    mask: Array
    """bool `[B, T]`: the tokens to learn from"""


class Answers(NamedTuple):
    """Of each answer."""

    score: Array
    """float32 `[B]`"""
    kl: Array
    """float32 `[B]`"""
    examples: Examples


Update = Callable[..., tuple[tuple[TrainState, Any], dict[str, Mean]]]
Frozen = dict[str, Params]
"""{"reference", "reward"}, what is not trained; with adapters the bases of policy and value function."""


def updates_a_rollout(config: RLConfig) -> int:
    answers = 2 if config.dpo else config.samples
    return config.passes * config.prompts * answers // config.minibatch_answers


def rows_of_updates(config: RLConfig, rows: dict[str, Array]) -> dict[str, Array]:
    """Of a rollout's pretraining rows, those of each update: every U-th, as devices split their own."""
    return jax.tree.map(lambda x: x.reshape(-1, updates_a_rollout(config), *x.shape[1:]).swapaxes(0, 1), rows)


def order_of_answers(config: RLConfig, step: Array, examples: Examples) -> Array:
    """int32 [updates, minibatch]: which answers each update takes; every pass takes all of them once.

    With DPO: those of all pairs, each one's best and worst answer side by side.
    """
    P, K = config.prompts, config.samples
    units = jnp.arange(P * K)[:, None]
    if config.dpo is not None:
        signs = examples.advantages[:, 0].reshape(P, K)
        units = K * jnp.arange(P)[:, None] + jnp.stack([jnp.argmax(signs, 1), jnp.argmin(signs, 1)], axis=1)
    passes = [
        jax.random.permutation(rng.key(config.seed, "minibatches", step, number), units.shape[0])
        for number in range(config.passes)
    ]
    return units[jnp.concatenate(passes)].reshape(-1, config.minibatch_answers)


class Learner:
    def __init__(self, config: RLConfig, models: Models, update: Update):
        """`update(policy, value, examples, pretraining rows, frozen)` is one step on a minibatch."""
        self.config, self.models, self.update = config, models, update

    def __call__(self, state: RLState, batch: dict[str, Any]) -> tuple[RLState, dict[str, Mean], Answers]:
        """One iteration; `batch`: "frozen" {"reference", "reward"}, "rollout", and "pretraining" rows for PPO-ptx."""
        rollout: Rollout = batch["rollout"]
        value = state.value.params if state.value else {}
        assessed = assess(self.config, self.models, state.policy.params, value, batch["frozen"], rollout)
        return self.learn(state, rollout, assessed, batch.get("pretraining", {}), batch["frozen"])

    def learn(
        self,
        state: RLState,
        rollout: Rollout,
        assessed: Assessed,
        pretraining: dict[str, Array],
        frozen: Frozen | None = None,
    ) -> tuple[RLState, dict[str, Mean], Answers]:
        """What follows scoring: advantages over the whole rollout, and all updates; `pretraining` rows or {}."""
        scores = rollout.scores + assessed.model_scores
        examples = self._examples(state, rollout, assessed, scores)

        def update(carry: tuple[TrainState, Any], picked: tuple[Array, dict[str, Array]]) -> Any:
            part = whole(jax.tree.map(lambda x: x[picked[0]], examples))
            return self.update(carry[0], carry[1], part, picked[1], frozen)

        order = order_of_answers(self.config, state.step, examples)
        rows = rows_of_updates(self.config, pretraining)
        drift = assessed.kl(rollout)
        observed = jnp.sum(drift) / jnp.maximum(jnp.sum(rollout.answer_lengths > 0).astype(jnp.float32), 1.0)
        begun = Updated(state.policy, state.value).turned(0, jnp.int32(0))
        (policy, value), each = jax.lax.scan(update, (begun.policy, begun.value), (order, rows))
        measured = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
        measured["rl/first_old_kl"] = jax.tree.map(lambda x: x[0], each["rl/old_kl"])
        # The loop counts rollouts, not updates.
        missed = policy.skipped - state.policy.skipped
        skipped = state.skipped + (missed > 0).astype(jnp.int32)
        measured["train/skipped_steps"] = metrics.scalar(skipped)
        measured |= self._measurements(state, rollout, assessed, scores, examples)

        # A policy that could not move shall not be pushed harder and harder.
        moved = policy.step - state.policy.step > missed
        turned = jnp.where(moved, self._coefficient(state.coefficient, observed), state.coefficient)
        if self.config.kl_budget:
            # The run ends here: with the policy that was measured, not with one that went further.
            over = observed > self.config.kl_budget
            policy, value = optimizers.where(over, (state.policy, state.value), (policy, value))
        kept = RLState(
            step=state.step + 1, policy=policy, value=value, coefficient=turned, kl=observed, skipped=skipped
        )
        return kept, measured, Answers(scores, drift, examples)

    def _examples(self, state: RLState, rollout: Rollout, assessed: Assessed, scores: Float32[Array, "B"]) -> Examples:
        """Advantages over the whole rollout, before it is cut into minibatches."""
        config, mask = self.config, rollout.answer_mask
        if config.missing_eos == "exclude":
            mask &= rollout.ended[:, None]
        else:
            scores = adv.missing_eos(scores, rollout.ended, config.missing_eos, config.missing_eos_amount)
        if config.overlong_tokens:
            scores += adv.overlong(rollout.answer_lengths, config.max_tokens, config.overlong_tokens)
        gains, returns = self._advantages(state, assessed, scores, mask)
        return Examples(rollout, assessed.logprobs, assessed.reference, assessed.values, gains, returns, mask)

    def _advantages(
        self, state: RLState, assessed: Assessed, scores: Float32[Array, "B"], mask: Bool[Array, "B T"]
    ) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
        """(advantages, the value function's returns: zeros where there is none)."""
        config = self.config
        groups = scores.reshape(config.prompts, config.samples)
        if config.ppo is not None:
            rewards = adv.token_rewards(scores, assessed.logprobs, assessed.reference, mask, state.coefficient)
            gains, returns = adv.generalized_advantages(
                rewards, assessed.values, mask, config.ppo.gamma, config.ppo.lam
            )
            return adv.whitened(gains, mask), returns
        none = jnp.zeros_like(assessed.values)
        if config.reinforce is not None:
            if config.reinforce.baseline == "group":
                scores = adv.group_advantages(groups, 0.0, scale=False).reshape(-1)
            rewards = adv.token_rewards(scores, assessed.logprobs, assessed.reference, mask, state.coefficient)
            return adv.whitened(adv.rewards_to_come(rewards, mask, config.reinforce.gamma), mask), none
        if config.grpo is None:
            gains = adv.best_and_worst(groups, jnp.any(mask, axis=1).reshape(groups.shape))
        elif config.grpo.baseline == "leave_one_out":
            gains = adv.leave_one_out(groups)
        else:
            gains = adv.group_advantages(groups, config.grpo.epsilon, scale=config.grpo.baseline == "group")
        return jnp.broadcast_to(gains.reshape(-1, 1), mask.shape), none

    def _coefficient(self, coefficient: Array, observed: Array) -> Array:
        penalty = self.config.penalty
        if penalty is None or penalty.kind == "fixed":
            return coefficient
        answers = self.config.prompts * self.config.samples
        turned = kl.adaptive(coefficient, observed, penalty.target, penalty.horizon, answers)
        return jnp.where(jnp.isfinite(turned), turned, coefficient)

    def _measurements(
        self,
        state: RLState,
        rollout: Rollout,
        assessed: Assessed,
        scores: Float32[Array, "B"],
        examples: Examples,
    ) -> dict[str, Mean]:
        sums = rollout_sums(rollout, assessed, scores)
        measured = {f"rl/{name}": total for name, total in sums.items() if name != "squared_reward"}
        measured["rl/reward_std"] = metrics.scalar(spread(sums))
        if self.models.reward is not None:
            measured["rl/reward_model"] = _over(assessed.model_scores, rollout)
        if self.config.verifiers:
            measured["rl/verifier"] = _over(rollout.scores, rollout)
        measured["rl/kl_coefficient"] = metrics.scalar(state.coefficient)
        mask = rollout.answer_mask
        off = jnp.abs(rollout.sampler_logprobs - assessed.logprobs)
        tokens = jnp.sum(mask.astype(jnp.float32))
        measured["rl/sampler_difference"] = Mean(jnp.sum(jnp.where(mask, off, 0.0)), tokens)
        if self.config.ppo is None and self.config.samples > 1:
            groups = scores.reshape(-1, self.config.samples)
            equal = jnp.all(groups == groups[:, :1], axis=1)
            measured["rl/equal_groups"] = metrics.scalar(jnp.mean(equal.astype(jnp.float32)))
        if self.config.dpo is not None:
            paired = jnp.any(examples.advantages[:, 0].reshape(-1, self.config.samples) > 0, axis=1)
            measured["rl/equal_groups"] = metrics.scalar(1.0 - jnp.mean(paired.astype(jnp.float32)))
        if self.config.ppo is not None:
            sums = objectives.value_loss(assessed.values, assessed.values, examples.returns, examples.mask, 1.0)
            measured["rl/explained_variance"] = metrics.scalar(objectives.explained_variance(sums))
        return measured


def policy_of(models: Models, params: Params, frozen: Frozen | None) -> Params:
    """The whole policy: with adapters, over the reference's own arrays."""
    return lora.over(models.policy, frozen and frozen["reference"], params)


def value_of(models: Models, params: Params, frozen: Frozen | None) -> Params:
    """The whole value function: with adapters, over the arrays of the reward model, or else of the reference."""
    return lora.over(models.value, frozen and frozen.get("reward", frozen["reference"]), params) if models.value else {}


def answer_tokens(
    config: RLConfig, models: Models, definition: Definition, params: Params, rollout: Rollout
) -> forward.AnswerTokens:
    """What a policy says of the answers' tokens, under the distribution that they are drawn from."""
    return forward.answer_tokens(
        definition, params, rollout, config.temperature, config.loss_chunk_tokens, models.vocabulary
    )


def assess(
    config: RLConfig, models: Models, policy: Params, value: Params, frozen: dict[str, Params], rollout: Rollout
) -> Assessed:
    """What all models say of a rollout, `minibatch_answers` at a time: the updates' own shape."""
    B = rollout.ids.shape[0]
    M = min(config.minibatch_answers, B)

    def part(rows: Rollout) -> Assessed:
        tokens = lambda definition, params: answer_tokens(config, models, definition, params, rows).logprobs
        logprobs = tokens(models.policy, policy_of(models, policy, frozen))
        values, scores = jnp.zeros_like(logprobs), jnp.zeros(logprobs.shape[0], jnp.float32)
        if models.value is not None:
            values = forward.answer_values(models.value, value_of(models, value, frozen), rows)
        if models.reward is not None:
            scores = weighted(config, models.criteria, forward.rewards(models.reward, frozen["reward"], rows))
        return Assessed(logprobs, tokens(models.reference, frozen["reference"]), values, scores)

    made = jax.lax.map(part, jax.tree.map(lambda x: x.reshape(-1, M, *x.shape[1:]), rollout))
    return whole(jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), made))


def whole(tree: Any) -> Any:
    """The same arrays, whole on every device: they are small, and advantages and minibatches then move nothing."""
    return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), tree)


def weighted(config: RLConfig, criteria: tuple[str, ...], scores: Float32[Array, "B C"]) -> Float32[Array, "B"]:
    """The sum over a reward model's criteria, each times its weight. No product of matrices: a TPU's rounds to bf16."""
    given = {criterion.name: criterion.weight for criterion in config.criteria}
    return jnp.sum(scores * jnp.array([[given.get(name, 0.0) for name in criteria]], jnp.float32), axis=1)


def rollout_sums(rollout: Rollout, assessed: Assessed, scores: Float32[Array, "B"]) -> dict[str, Mean]:
    """Reward, KL, length and ends of a rollout's answers, also of one that nothing is learned from."""
    return {
        "reward": _over(scores, rollout),
        "squared_reward": _over(jnp.square(scores), rollout),
        "kl": _over(assessed.kl(rollout), rollout),
        "answer_tokens": _over(rollout.answer_lengths.astype(jnp.float32), rollout),
        "eos_rate": _over(rollout.ended.astype(jnp.float32), rollout),
    }


def spread(sums: dict[str, Mean]) -> Array:
    """The rewards' standard deviation from their sums."""
    return jnp.sqrt(jnp.maximum(sums["squared_reward"].value() - jnp.square(sums["reward"].value()), 0.0))


def rollout_figures(sums: dict[str, Mean], prefix: str) -> dict[str, float]:
    """The figures of sums over any number of batches, on the host."""
    named = {f"{prefix}{name}": total for name, total in sums.items() if name != "squared_reward"}
    return metrics.values(named) | {f"{prefix}reward_std": float(spread(sums))}


def policy_metrics(
    sums: objectives.PolicySums, tokens: forward.AnswerTokens, mask: Array, loss: Array, units: Array
) -> dict[str, Mean]:
    return {
        "rl/policy_loss": Mean(jax.lax.stop_gradient(loss), units),
        "rl/clip_fraction": Mean(sums.clipped, sums.tokens),
        "rl/ratio": Mean(sums.ratio, sums.tokens),
        "rl/old_kl": Mean(sums.old_kl, sums.tokens),
        "rl/entropy": Mean(jnp.sum(jnp.where(mask, tokens.entropy, 0.0)), sums.tokens),
    }


def pair_metrics(sums: objectives.PairSums, tokens: forward.AnswerTokens, examples: Examples) -> dict[str, Mean]:
    mask = examples.mask
    off = objectives.policy_loss(tokens.logprobs, examples.logprobs, jnp.zeros_like(tokens.logprobs), mask, 1.0, 1.0)
    measured = policy_metrics(off, tokens, mask, sums.loss, sums.pairs)
    del measured["rl/clip_fraction"]
    return measured | {
        "rl/pair_margin": Mean(sums.margin, sums.pairs),
        "rl/pair_accuracy": Mean(sums.correct, sums.pairs),
    }


def _over(x: Float32[Array, "B"], rollout: Rollout) -> Mean:
    """The mean over real answers."""
    real = rollout.answer_lengths > 0
    return Mean(jnp.sum(jnp.where(real, x, 0.0)), jnp.sum(real.astype(jnp.float32)))
