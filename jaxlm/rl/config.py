"""Reinforcement learning: what is rolled out, rewarded and learned; standard library only."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig, WatchdogConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """PPO's penalty for leaving the reference: k1 of each token, in the reward."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    """adaptive turns the coefficient so that the KL stays near the target (arXiv:1909.08593, section 2.2)."""
    coefficient: float = 0.05
    """Reward a nat; where it begins if it is adaptive."""
    target: float = 6.0
    """adaptive only: nats an answer."""
    horizon: int = 10_000
    """adaptive only: answers in which the coefficient may about double or halve five times over."""

    def __post_init__(self):
        check(0 <= self.coefficient < math.inf, "coefficient", f"got {self.coefficient}; 0 or more is needed")
        if self.kind == "adaptive":
            check(self.coefficient > 0, "coefficient", "is 0; an adaptive one is multiplied, so it must be above 0")
        check(self.target > 0, "target", f"got {self.target}; nats above 0 are needed")
        check(self.horizon >= 1, "horizon", f"got {self.horizon}; 1 answer or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation with a learned value function (arXiv:1707.06347, arXiv:2203.02155)."""

    kl: KLConfig = KLConfig()
    """The penalty for leaving the reference."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's λ: 1 trusts the returns, 0 the values."""
    clip: float = 0.2
    """The ratio to the old policy is clipped to 1 ± this."""
    value_clip: float = 0.2
    """New values are clipped to ± this around the rollout's."""
    value_optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    """The value function's update rule."""
    value_rate: float = 1.0
    """The value function's learning rate over the policy's."""
    pretraining: tuple[MixtureSource, ...] = ()
    """PPO-ptx: folders of packed pretraining rows whose loss is added, so that less is forgotten."""
    pretraining_coefficient: float = 1.0
    """Weight of that loss, nats a token, beside the policy's."""
    pretraining_rows: int = 8
    """Rows of it an update."""

    def __post_init__(self):
        for field in ("gamma", "lam"):
            check(0 <= getattr(self, field) <= 1, field, f"got {getattr(self, field)}; 0 to 1 is needed")
        for field in ("clip", "value_clip", "value_rate"):
            check(getattr(self, field) > 0, field, f"got {getattr(self, field)}; above 0 is needed")
        check(not self.value_optimizer.ema, "value_optimizer.ema", "is for models that are kept; leave it at 0")
        check(self.pretraining_coefficient >= 0, "pretraining_coefficient", "is below 0")
        check(self.pretraining_rows >= 1, "pretraining_rows", f"got {self.pretraining_rows}; 1 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group-relative policy optimisation: an answer's baseline is its group (arXiv:2402.03300)."""

    baseline: Literal["group", "mean", "leave_one_out"] = "group"
    """group: (reward - mean) / std of the prompt's answers; mean: not divided (Dr. GRPO, arXiv:2503.20783);
    leave_one_out: minus the others' mean (RLOO, arXiv:2402.14740)."""
    epsilon: float = 1e-4
    """Added to the group's standard deviation."""
    clip: float = 0.2
    """The ratio to the old policy is clipped to 1 ± this."""
    clip_high: float = 0.0
    """To 1 + this above, so that rare tokens can grow faster (DAPO, arXiv:2503.14476); 0: as below."""
    kl_coefficient: float = 0.04
    """Weight of k3 to the reference in the loss, a token."""
    normalization: Literal["token", "sequence", "constant"] = "sequence"
    """sequence: an answer's mean counts; token: all tokens of the batch count alike; constant: an answer's sum over
    max_tokens (Dr. GRPO)."""

    def __post_init__(self):
        check(self.epsilon > 0, "epsilon", f"got {self.epsilon}; above 0 is needed")
        check(self.clip > 0, "clip", f"got {self.clip}; above 0 is needed")
        check(self.clip_high >= 0, "clip_high", f"got {self.clip_high}; 0 or more is needed")
        check(self.kl_coefficient >= 0, "kl_coefficient", f"got {self.kl_coefficient}; 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriterionWeight:
    """How much a criterion of the reward model counts."""

    name: str
    """One of the reward model's criteria."""
    weight: float = 1.0
    """Its score times this goes into the reward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig):
    """Reinforcement learning from a reward model, from verifiers, or from both."""

    stage: ClassVar[str] = "rl"
    runtime_fields: ClassVar[tuple[str, ...]] = (
        "workdir",
        "name",
        "model",
        "reward_model",
        "mesh",
        "loop",
        "loss_chunk_tokens",
        "sample_rows",
        "shown_completions",
    )

    model: str = ""
    """The policy to start from, which is the reference too: a model directory, or a run's folder."""
    reward_model: str = ""
    """A reward model made with the same tokenizer and chat template; empty: verifiers alone."""
    criteria: tuple[CriterionWeight, ...] = (CriterionWeight(name="overall"),)
    """The reward model's criteria that count."""
    verifiers: tuple[VerifierConfig, ...] = ()
    """Programs whose scores are added to the reward."""
    gold: VerifierConfig | None = None
    """A score that is measured beside the reward and never trained on: where it falls, the reward is being gamed."""
    sources: tuple[ChatSource, ...] = ()
    """Prompts: {"messages"} up to the assistant's turn, or {"prompt"}; other fields are kept for the verifiers."""
    ppo: PPOConfig | None = None
    """Give either this ..."""
    grpo: GRPOConfig | None = None
    """... or this."""
    prompts: int = 64
    """P: prompts a rollout."""
    samples: int = 1
    """K: answers to each of them."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped and counted."""
    max_tokens: int = 128
    """T: most tokens of an answer."""
    temperature: float = 1.0
    """Divides the logits, of policy and reference alike."""
    missing_eos: Literal["none", "penalty", "replace", "exclude"] = "none"
    """Answers cut off at max_tokens: scored as they are, less by the amount, as the amount, or not trained on (their
    score still counts in a group's baseline)."""
    missing_eos_amount: float = 0.0
    """For penalty and replace; with a reward model, whose mean score is about 0, replace needs one below 0."""
    sample_rows: int = 0
    """Answers drawn at a time, where a rollout's cache would not fit; 0: all of a rollout."""
    steps: int = 100
    """Rollouts; each is learned from for `passes`."""
    passes: int = 1
    """How often a rollout's answers are gone through."""
    minibatch_answers: int = 64
    """Answers an update."""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    """The policy's update rule."""
    schedule: ScheduleConfig = ScheduleConfig(kind="linear", peak=1e-6, warmup_steps=10)
    """The policy's learning rate, over all updates."""
    kl_budget: float = 0.0
    """Ends the run at the first rollout whose KL to the reference exceeds so many nats an answer: nothing is learned
    from it; 0: never."""
    heldout_prompts: int = 0
    """Held-out prompts an evaluation answers, the first ones; 0: all."""
    loss_chunk_tokens: int = 0
    """Makes the logits of so many answer tokens at a time, for less memory; 0: of all at once."""
    shown_completions: int = 4
    """Answers of each logged rollout that go to completions.jsonl."""
    seed: int = 0
    """Of prompts, answers and minibatches."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""
    loop: LoopConfig = LoopConfig(
        log_every_steps=1,
        evaluate_every_steps=20,
        checkpoint=CheckpointConfig(every_steps=10),
        watchdog=WatchdogConfig(step_seconds=3600.0),
    )
    """Logging, evaluation, saving; in rollouts."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        check((self.ppo is None) != (self.grpo is None), "ppo", "give exactly one of ppo and grpo")
        check(bool(self.reward_model or self.verifiers), "reward_model", "is empty, and there is no verifier either")
        check(bool(self.criteria) or not self.reward_model, "criteria", "is empty; name at least one")
        criteria = [criterion.name for criterion in self.criteria]
        check(len(set(criteria)) == len(criteria), "criteria", f"got {', '.join(criteria)}; each can be given once")
        check(any(s.split == "train" for s in self.sources), "sources", "none has split='train'; at least one must")
        for field in ("prompts", "samples", "max_prompt_tokens", "max_tokens", "steps", "passes", "minibatch_answers"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        for field in ("kl_budget", "heldout_prompts", "loss_chunk_tokens", "sample_rows", "seed", "shown_completions"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check(self.temperature > 0, "temperature", f"got {self.temperature}; above 0 is needed to explore")
        check(self.seed < 2**32 - 1, "seed", f"got {self.seed}; below 2**32 - 1 is needed")
        amount = self.missing_eos_amount
        if self.missing_eos == "penalty":
            check(amount > 0, "missing_eos_amount", f"got {amount}; what a cut off answer loses, above 0, is needed")
        elif self.missing_eos == "replace":
            low = amount < 0 or not self.reward_model
            check(low, "missing_eos_amount", f"got {amount}, about a reward model's mean; a score below 0 is needed")
        else:
            check(amount == 0, "missing_eos_amount", f"is for penalty and replace; missing_eos is {self.missing_eos}")
        answers = self.prompts * self.samples
        check(
            answers % self.minibatch_answers == 0,
            "minibatch_answers",
            f"{self.minibatch_answers} does not divide a rollout of {answers} answers",
        )
        if self.grpo is not None:
            check(self.samples >= 2, "samples", f"got {self.samples}; a group needs at least 2 answers a prompt")
        check(self.schedule.peak > 0, "schedule.peak", "is 0; a learning rate is needed, such as 1e-6")
