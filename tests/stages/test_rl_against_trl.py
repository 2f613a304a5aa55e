"""Step 0 of reinforcement learning against TRL's trainers, on the same tiny weights and answers, in float32.

`make_trl_rl_numbers.py` says how TRL's numbers are made. Both sides score given answers, make advantages of their
rewards, and take the gradient of one update; jaxlm by the stage's own learner and step. Where the two define something
differently, the test says how and holds the exact relation:

- answers that are left out for having no end count in TRL's number of answers, in jaxlm's they do not;
- TRL's RLOO has a ratio of whole answers, not averaged over their tokens, and takes the KL off the reward;
- its online DPO's formula is written out in its step: it is DPO's, and it trains on ties, which jaxlm leaves out;
- TRL's PPO gives the score, and a value, to the state after an answer's end, where its arrays have room for that;
- TRL's `scale_rewards="batch"` divides by the deviation of all rewards, which jaxlm has not.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import make_trl_rl_numbers as tool
import numpy as np
import pytest
from trl_tool import SHAPE, SOURCES, Numbers, close, numbers, weights

from jaxlm.base.metrics import values as values_of
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl import advantages as adv
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import GRPOConfig, KLConfig, OnlineDPOConfig, PPOConfig, RLConfig
from jaxlm.rl.learner import Answers, Assessed, Examples, Learner, Models, RLState, assess
from jaxlm.rl.programs import bound
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rollout import Rollout
from jaxlm.sample.sampler import Completion
from jaxlm.stages import rl
from jaxlm.train import optimizer as optimizers
from jaxlm.train.state import initial_state

pytestmark = pytest.mark.slow

# What the tool printed, with the versions of trl, transformers, torch and NumPy.
STORED: Numbers = json.loads((Path(__file__).parent / "fixtures/trl_rl.json").read_text())
del STORED["versions"]

S = 16


@pytest.fixture(scope="module", params=SOURCES)
def trl(request) -> Numbers:
    return numbers(request, "make_trl_rl_numbers", STORED)


def config(groups: list, **more: Any) -> RLConfig:
    """One update on all answers."""
    samples = len(groups[0].answers)
    return RLConfig(
        model="unread",
        verifiers=(VerifierConfig(kind="exact"),),
        sources=(ChatSource(name="unread", path="unread"),),
        prompts=len(groups),
        samples=samples,
        max_prompt_tokens=S - tool.T,
        minibatch_answers=len(groups) * samples,
        **dict(max_tokens=tool.T) | more,
    )


def rollout(groups: list) -> Rollout:
    prompts = [Prompt(n, "", tuple(one.prompt), {}) for n, one in enumerate(groups)]
    completions = [
        Completion("", tuple(ids), (0.0,) * len(ids), "eos" if ids[-1] == tool.EOS else "length")
        for one in groups
        for ids in one.answers
    ]
    scores = [reward for one in groups for reward in one.rewards] or [0.0] * len(completions)
    made = rollouts.gather(prompts, completions, scores, S=S, T=tool.T, rows=len(completions))
    return jax.tree.map(jnp.asarray, made)


class Side:
    """jaxlm's models with the tool's weights, and a rollout that was drawn by the policy or by an older one."""

    def __init__(self, config: RLConfig, groups: list, old: bool):
        self.config, self.rollout = config, rollout(groups)
        policy, self.policy = weights("policy", SHAPE)
        _, drawn = weights("old policy" if old else "policy", SHAPE)
        _, reference = weights("reference", SHAPE)
        self.frozen: Any = {"reference": reference}
        self.value, older, value, reward = {}, {}, None, None
        if config.ppo is not None:
            value, self.value = weights("value", with_score("value"))
            _, older = weights("old value" if old else "value", with_score("value"))
            reward, self.frozen["reward"] = weights("reward", with_score("overall"))
        self.models = Models(policy, policy, value, reward, ("overall",))
        self.update = bound(config, self.models, rl.step_of(config))
        score = jax.jit(lambda *given: assess(config, self.models, *given))
        self.assessed: Assessed = score(drawn, older, self.frozen, self.rollout)

    def state(self) -> RLState:
        penalty = self.config.penalty
        begun = lambda params, definition, rule: initial_state(
            params, optimizers.make_optimizer(rule, definition), ema=False
        )
        return RLState(
            step=jnp.int32(0),
            policy=begun(self.policy, self.models.policy, self.config.optimizer),
            value=begun(self.value, self.models.value, self.config.ppo.value_optimizer) if self.config.ppo else (),
            coefficient=jnp.float32(penalty.coefficient if penalty else 0.0),
            kl=jnp.float32(0),
            skipped=jnp.int32(0),
        )

    def learn(self) -> tuple[dict[str, float], Answers]:
        """What is measured, and what the update saw of the answers."""
        learner = Learner(self.config, self.models, self.update)
        _, measured, answers = jax.jit(learner.learn)(self.state(), self.rollout, self.assessed, {}, self.frozen)
        return values_of(measured), answers

    def step(self, examples: Examples) -> dict[str, float]:
        """What one update measures on given examples."""
        state = self.state()
        return values_of(jax.jit(self.update)(state.policy, state.value, examples, {}, self.frozen)[1])


def with_score(criterion: str) -> Any:
    return dataclasses.replace(SHAPE, criteria=(criterion,))


# As `tool.GRPO`, in jaxlm's fields: the method's, and the stage's.
SEQUENCE: dict[str, Any] = dict(ratio="sequence", clip=tool.GSPO_CLIP)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo on-policy": (dict(kl_coefficient=tool.KL), {}),
    "grpo": (dict(kl_coefficient=tool.KL), {}),
    "grpo weighted kl": (dict(kl_coefficient=tool.KL, kl_ratio=True), {}),
    "dapo": (dict(normalization="token", clip=tool.CLIP, clip_high=tool.CLIP_HIGH, kl_coefficient=0.0), {}),
    "dapo accumulated": (dict(normalization="token", kl_coefficient=tool.KL), {}),
    "bnpo": (dict(normalization="token", kl_coefficient=tool.KL), {}),
    "dr_grpo": (dict(normalization="constant", baseline="mean", kl_coefficient=tool.KL), {}),
    "batch": (dict(baseline="mean", kl_coefficient=0.0), {}),
    "gspo": (SEQUENCE | dict(clip_high=tool.GSPO_CLIP_HIGH, kl_coefficient=0.0), {}),
    "gspo kl": (SEQUENCE | dict(kl_coefficient=tool.KL), {}),
    "temperature": (dict(kl_coefficient=tool.KL), dict(temperature=tool.TEMPERATURE)),
    "grpo cut off": (dict(kl_coefficient=tool.KL), dict(missing_eos="exclude")),
    "dapo cut off": (dict(normalization="token", kl_coefficient=tool.KL), dict(missing_eos="exclude")),
}


@pytest.mark.parametrize("name", METHODS)
def test_grpo_and_its_kin(trl, name):
    method, more = METHODS[name]
    groups, given, theirs = tool.GROUPS, tool.GRPO[name], trl[name]
    side = Side(config(groups, grpo=GRPOConfig(**method), **more), groups, given.get("old", False))
    measured, answers = side.learn()
    scale = 1.0
    if name == "batch":
        scale = 1 / (np.std(side.rollout.scores, ddof=1) + 1e-4)
    elif name == "grpo cut off":
        scale = float(np.mean(side.rollout.ended))
        assert scale < 1
    close((scale if name == "batch" else 1.0) * answers.examples.advantages[:, 0], theirs["advantages"])
    close(scale * measured["rl/policy_loss"], theirs["loss"])
    close(scale * measured["train/gradient_norm"], theirs["gradient_norm"])
    if "accumulate" not in given:
        # Of micro-batches TRL logs means of means.
        close(measured["rl/entropy"], theirs["entropy"])
    if "ratio" not in method and "accumulate" not in given:
        # Of whole answers' ratios TRL counts answers, jaxlm tokens.
        close(measured["rl/clip_fraction"], theirs["clipped"])
    assert (theirs["clipped"] > 0) == ("old" in given)


def test_rloo(trl):
    groups, theirs = tool.GROUPS, trl["rloo"]
    method = GRPOConfig(baseline="leave_one_out", normalization="constant", kl_coefficient=0.0)
    measured, answers = Side(config(groups, grpo=method), groups, False).learn()
    close(answers.examples.advantages[:, 0], theirs["advantages"])
    # The gradient of an answer's ratio exp(Σ d), with d = 0, is that of Σ exp(d); jaxlm divides this by max_tokens.
    close(tool.T * measured["train/gradient_norm"], theirs["gradient_norm"])
    # Both are -A for each answer, TRL's as such, jaxlm's for each token: the former sums to 0 in a group.
    np.testing.assert_allclose(theirs["loss"], 0, atol=1e-7)


def test_rloo_takes_the_kl_off_the_reward(trl):
    groups = tool.GROUPS
    side = Side(config(groups, grpo=GRPOConfig(baseline="leave_one_out")), groups, True)
    rewards = side.rollout.scores - tool.KL * side.assessed.kl(side.rollout)
    close(adv.leave_one_out(rewards.reshape(-1, tool.K)).reshape(-1), trl["rloo kl"]["advantages"], atol=1e-6)


def test_rloo_of_answers_of_one_token(trl):
    groups, theirs = tool.SHORT_GROUPS, trl["rloo short"]
    method = GRPOConfig(baseline="leave_one_out", kl_coefficient=0.0)
    measured, answers = Side(config(groups, grpo=method), groups, True).learn()
    close(answers.examples.advantages[:, 0], theirs["advantages"])
    close(measured["rl/policy_loss"], theirs["loss"])
    close(measured["train/gradient_norm"], theirs["gradient_norm"])
    close(measured["rl/clip_fraction"], theirs["clipped"])


PPO: dict[str, Any] = dict(
    ppo=PPOConfig(
        kl=KLConfig(coefficient=tool.PPO_KL),
        gamma=tool.GAMMA,
        lam=tool.LAMBDA,
        clip=tool.CLIP,
        value_clip=tool.VALUE_CLIP,
    ),
    reward_model="unread",
    temperature=tool.TEMPERATURE,
)


def test_ppo(trl):
    theirs = trl["ppo"]
    side = Side(config(tool.EVEN, **PPO), tool.EVEN, True)
    measured, answers = side.learn()
    mask = np.asarray(answers.examples.mask)
    close(answers.examples.advantages, theirs["advantages"], atol=1e-5)
    close(measured["rl/policy_loss"], theirs["loss"])
    close(measured["rl/value_loss"], theirs["value loss"])
    close(measured["train/gradient_norm"], theirs["gradient_norm"])
    close(measured["rl/value_gradient_norm"], theirs["value gradient_norm"])
    close(measured["rl/clip_fraction"], theirs["clipped"])
    close(measured["rl/value_clip_fraction"], theirs["value clipped"])
    close(measured["rl/kl"], theirs["kl"])
    close(measured["rl/reward"], theirs["score"])
    assert mask.all()


def test_ppo_of_unequal_lengths(trl):
    """As if an answer that leaves room had one more token, of probability 1, at which the score is given."""
    theirs = trl["ppo ragged"]
    side = Side(config(tool.RAGGED, **PPO), tool.RAGGED, True)
    made, mask = side.assessed, side.rollout.answer_mask
    longer = jnp.arange(tool.T)[None, :] <= side.rollout.answer_lengths[:, None]
    certain = lambda x: jnp.where(mask, x, 0.0)
    rewards = adv.token_rewards(made.model_scores, certain(made.logprobs), certain(made.reference), longer, tool.PPO_KL)
    gains, returns = adv.generalized_advantages(rewards, made.values, longer, tool.GAMMA, tool.LAMBDA)
    close(np.where(mask, gains, 0), theirs["gae"], atol=1e-5)
    white = adv.whitened(gains, mask)
    close(white, theirs["advantages"], atol=1e-5)
    examples = Examples(side.rollout, made.logprobs, made.reference, made.values, white, returns, mask)
    of_policy, of_value = side.step(examples), side.step(examples._replace(mask=longer))
    close(of_policy["rl/policy_loss"], theirs["loss"])
    close(of_policy["train/gradient_norm"], theirs["gradient_norm"])
    close(of_policy["rl/clip_fraction"], theirs["clipped"])
    close(of_value["rl/value_loss"], theirs["value loss"])
    close(of_value["rl/value_gradient_norm"], theirs["value gradient_norm"])
    close(of_value["rl/value_clip_fraction"], theirs["value clipped"])
    close(jnp.mean(made.kl(side.rollout)), theirs["kl"])
    close(jnp.mean(made.model_scores), theirs["score"])


def test_online_dpo(trl):
    theirs = trl["online dpo"]
    measured, _ = Side(config(tool.PAIRED, dpo=OnlineDPOConfig(beta=tool.BETA)), tool.PAIRED, False).learn()
    close(measured["rl/policy_loss"], theirs["loss"])
    close(measured["train/gradient_norm"], theirs["gradient_norm"])
    close(measured["rl/pair_margin"], theirs["margin"])


def test_functions(trl):
    theirs = trl["functions"]
    values, mask = map(jnp.asarray, tool.to_whiten())
    close(adv.whitened(values, mask), theirs["whitened"], atol=1e-6)  # differences of numbers about 3
    close(adv.whitened(values, mask, center=False), theirs["whitened about its mean"])
    close(adv.overlong(rollout(tool.GROUPS).answer_lengths, tool.T, tool.OVERLONG), theirs["overlong"])
