"""Reinforcement learning: what is rolled out, rewarded and learned; standard library only."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import LoRAConfig
from jaxlm.text.config import check_sources
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig, WatchdogConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """PPO's and REINFORCE++'s penalty for leaving the reference: k1 of each token, in the reward."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    """adaptive turns the coefficient so that the KL stays near the target (arXiv:1909.08593, section 2.2)."""
    coefficient: float = 0.05
    """What a nat of KL costs in reward; adaptive: what it costs at first."""
    target: float = 6.0
    """adaptive only: the KL that is aimed at, in nats an answer."""
    horizon: int = 10_000
    """adaptive only: answers over which the coefficient grows or falls by a fifth at most."""

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
    """Weight of that loss, in nats a token, beside the policy's."""
    pretraining_rows: int = 8
    """Rows of pretraining in each update."""

    def __post_init__(self):
        for field in ("gamma", "lam"):
            check(0 <= getattr(self, field) <= 1, field, f"got {getattr(self, field)}; 0 to 1 is needed")
        for field in ("clip", "value_clip", "value_rate"):
            check(getattr(self, field) > 0, field, f"got {getattr(self, field)}; above 0 is needed")
        check(not self.value_optimizer.ema, "value_optimizer.ema", "is for models that are kept; leave it at 0")
        check(
            not self.value_optimizer.spike_limit,
            "value_optimizer.spike_limit",
            "stays 0: the policy's optimizer.spike_limit decides for both",
        )
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
    ratio: Literal["token", "sequence"] = "token"
    """To the old policy: of each token; or of the answer, as the geometric mean over its tokens (GSPO,
    arXiv:2507.18071), which strays far less: its authors clip at 3e-4 and clip_high 4e-4."""
    clip: float = 0.2
    """The ratio to the old policy is clipped to 1 ± this."""
    clip_high: float = 0.0
    """Above, the ratio is clipped to 1 + this instead, so that rare tokens can grow faster (DAPO, arXiv:2503.14476); 0:
    clip holds on both sides."""
    kl_coefficient: float = 0.04
    """Weight in the loss of each token's KL to the reference, estimated by k3."""
    kl_ratio: bool = False
    """Each token's KL counts by its ratio to the policy that drew it: unbiased in later minibatches of a rollout too,
    and its gradient is that of KL(policy ‖ reference), which plain k3's is not (arXiv:2512.02556, section 3.1)."""
    normalization: Literal["token", "sequence", "constant"] = "sequence"
    """sequence: an answer's mean counts; token: all tokens of the batch count alike; constant: an answer's sum over
    max_tokens (Dr. GRPO)."""
    extra_prompts: int = 0
    """Dynamic sampling (DAPO, section 3.2): in place of prompts whose answers all get one reward, so that nothing is
    learned from them, at most so many fresh ones a rollout are asked; 0: none."""

    def __post_init__(self):
        check(self.epsilon > 0, "epsilon", f"got {self.epsilon}; above 0 is needed")
        check(self.clip > 0, "clip", f"got {self.clip}; above 0 is needed")
        fits = self.ratio == "token" or self.normalization == "sequence"
        check(fits, "normalization", f"got {self.normalization!r}; a ratio of whole sequences goes with 'sequence'")
        check(self.extra_prompts >= 0, "extra_prompts", f"got {self.extra_prompts}; 0 (none) or more is needed")
        check(self.clip_high >= 0, "clip_high", f"got {self.clip_high}; 0 or more is needed")
        check(self.kl_coefficient >= 0, "kl_coefficient", f"got {self.kl_coefficient}; 0 or more is needed")
        weighs = not self.kl_ratio or (self.ratio == "token" and self.kl_coefficient > 0)
        check(weighs, "kl_ratio", "weighs the KL of tokens; it goes with ratio='token' and a kl_coefficient above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig:
    """Direct preference optimisation on fresh answers: the best and the worst of a prompt's are a pair
    (arXiv:2305.18290; online: arXiv:2402.04792). Prompts whose answers all got one reward give none."""

    beta: float = 0.1
    """Implicit reward for a nat of log-ratio to the reference: the lower, the farther the policy goes from it."""

    def __post_init__(self):
        check(0 < self.beta < math.inf, "beta", f"got {self.beta}; a number above 0 is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """REINFORCE++ (arXiv:2501.03262): PPO without a value function. A token's advantage is the reward to come,
    normalised over the whole rollout and not over a prompt's answers."""

    baseline: Literal["none", "group"] = "none"
    """group: first the mean reward of a prompt's answers is taken off ("with baseline", for several samples; for this
    the paper's later versions have the KL as k2 in the loss, here it stays in the reward)."""
    kl: KLConfig = KLConfig(coefficient=0.01)
    """The penalty for leaving the reference."""
    gamma: float = 1.0
    """Discount a token."""
    clip: float = 0.2
    """The ratio to the old policy is clipped to 1 ± this."""

    def __post_init__(self):
        check(0 <= self.gamma <= 1, "gamma", f"got {self.gamma}; 0 to 1 is needed")
        check(self.clip > 0, "clip", f"got {self.clip}; above 0 is needed")

    @property
    def loss(self) -> GRPOConfig:
        """Its update: the clipped loss, all tokens of a minibatch alike; the KL is in the reward already."""
        return GRPOConfig(clip=self.clip, kl_coefficient=0.0, normalization="token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriterionWeight:
    """How much a criterion of the reward model counts."""

    name: str
    """One of the reward model's criteria."""
    weight: float = 1.0
    """Its score, times this, goes into the reward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig):
    """Reinforcement learning from a reward model, from verifiers, or from both."""

    stage: ClassVar[str] = "rl"
    changeable_fields: ClassVar[tuple[str, ...]] = ("exclude",)
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
    exclude: tuple[str, ...] = ()
    """Prompts to leave out, by their numbers, as a bad update's blackbox/UPDATE/record.json names them: the next one
    stands in each one's place, all else stays where it is. A stopped run goes on with others."""
    ppo: PPOConfig | None = None
    """PPO, with a learned value function. Exactly one of ppo, grpo, dpo and reinforce is given."""
    grpo: GRPOConfig | None = None
    """GRPO and its kin, without a value function: a prompt's answers are compared with each other."""
    dpo: OnlineDPOConfig | None = None
    """Online DPO: a prompt's best answer against its worst."""
    reinforce: ReinforceConfig | None = None
    """REINFORCE++: like PPO, without a value function."""
    prompts: int = 64
    """P: prompts of a rollout."""
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
    overlong_tokens: int = 0
    """Soft punishment of length (DAPO, equation 13): over the last so many of max_tokens, the reward falls linearly by
    up to 1; 0: none."""
    sample_rows: int = 0
    """Answers drawn at a time, where a rollout's cache would not fit; 0: all of a rollout."""
    steps: int = 100
    """Rollouts; each is learned from for `passes`."""
    passes: int = 1
    """How often a rollout's answers are gone through."""
    minibatch_answers: int = 64
    """Answers in each update; with dpo, those of its pairs."""
    lora: LoRAConfig | None = None
    """Trains low-rank adapters beside frozen matrices: of the policy, whose base is the reference, and of PPO's value
    function, whose base is the reward model; none: all weights."""
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
    """Seed of prompts, answers and minibatches."""
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
        given = [field for field in ("ppo", "grpo", "dpo", "reinforce") if getattr(self, field) is not None]
        found = " and ".join(given) or "none"
        check(len(given) == 1, "ppo", f"give exactly one of ppo, grpo, dpo and reinforce; got {found}")
        check(
            bool(self.reward_model or self.verifiers),
            "reward_model",
            "is empty, and there is no verifier either; give one of the two",
        )
        check(bool(self.criteria) or not self.reward_model, "criteria", "is empty; name at least one")
        own = self.criteria == type(self).criteria or bool(self.reward_model)
        check(own, "criteria", "weighs what a reward model says; give reward_model too, or leave it out")
        criteria = [criterion.name for criterion in self.criteria]
        check(len(set(criteria)) == len(criteria), "criteria", f"got {', '.join(criteria)}; each can be given once")
        check_sources(self.sources)
        for field in ("prompts", "samples", "max_prompt_tokens", "max_tokens", "steps", "passes", "minibatch_answers"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        numbers = "kl_budget", "heldout_prompts", "overlong_tokens", "loss_chunk_tokens", "sample_rows", "seed"
        for field in (*numbers, "shown_completions"):
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
            f"{self.minibatch_answers} does not divide a rollout of {answers} answers (prompts x samples)",
        )
        if self.dpo is not None:
            M = self.minibatch_answers
            whole = M % 2 == 0 and 2 * self.prompts % M == 0
            check(whole, "minibatch_answers", f"{M} answers do not divide {self.prompts} pairs a rollout")
        most = self.max_tokens
        check(self.overlong_tokens <= most, "overlong_tokens", f"got {self.overlong_tokens}; max_tokens is {most}")
        if self.grpo or self.dpo or (self.reinforce and self.reinforce.baseline == "group"):
            check(self.samples >= 2, "samples", f"got {self.samples}; a group needs at least 2 answers a prompt")
        if self.grpo is not None and self.grpo.extra_prompts:
            late = "is for verifiers alone: a reward model's scores are hardly ever alike, and come after the drawing"
            check(not self.reward_model, "grpo.extra_prompts", late)
        check(self.schedule.peak > 0, "schedule.peak", "is 0; a learning rate is needed, such as 1e-6")
        if self.lora is not None:
            check(not self.lora.dropout, "lora.dropout", "must be 0: the policy that learns is the one that answered")

    @property
    def penalty(self) -> KLConfig | None:
        """The penalty in the reward, of the methods that have one."""
        method = self.ppo or self.reinforce
        return method.kl if method else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig(StageConfig):
    """Best-of-n and rejection sampling: from the stage sample's answers, those that are worth training on."""

    stage: ClassVar[str] = "select"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "samples", "reward_model", "mesh")

    samples: str = ""
    """A sample stage's folder, drawn with chat=True and several samples a prompt."""
    keep: Literal["best", "above"] = "best"
    """best: of each prompt's n answers the one that scores highest; above: all that score `threshold` or more, each
    text once a prompt."""
    threshold: float | None = None
    """above only: the least score."""
    reward_model: str = ""
    """A reward model made with the tokenizer and chat template of the model that answered; empty: verifiers alone."""
    criteria: tuple[CriterionWeight, ...] = (CriterionWeight(name="overall"),)
    """The reward model's criteria that count."""
    verifiers: tuple[VerifierConfig, ...] = ()
    """Programs whose scores are added."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the reward model's work."""

    def __post_init__(self):
        check(bool(self.samples), "samples", "is empty; a sample stage's folder is needed")
        check(
            bool(self.reward_model or self.verifiers),
            "reward_model",
            "is empty, and there is no verifier either; give one of the two",
        )
        check(bool(self.criteria) or not self.reward_model, "criteria", "is empty; name at least one")
        own = self.criteria == type(self).criteria or bool(self.reward_model)
        check(own, "criteria", "weighs what a reward model says; give reward_model too, or leave it out")
        if self.keep == "above":
            given = self.threshold is not None and math.isfinite(self.threshold)
            check(given, "threshold", f"got {self.threshold}; keep='above' needs the least score to keep")
        else:
            check(self.threshold is None, "threshold", "is for keep='above'; the best of a prompt is kept at any score")
