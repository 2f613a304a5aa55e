"""Metrics are (sum, weight) pairs, merged by adding and divided once: a mean of means is never taken.

>>> total = merge(Mean(jnp.float32(6), jnp.float32(4)), Mean(jnp.float32(1), jnp.float32(1)))
>>> float(total.value())
1.4
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The one table of metric names; the writer refuses others, so that plots and reports know what they read.
NAMES = {
    "train/loss": "cross-entropy over the global batch, nats per counted token",
    "train/divergence": "from the teacher's next tokens, nats per counted token, before its weight and temperature²",
    "train/z_loss": "squared log-normaliser, per counted token, before its coefficient",
    "train/balance_loss": "load-balancing loss of the experts, mean over layers; 1: all are chosen alike",
    "train/router_z_loss": "squared log-normaliser of routers' logits, a real token and layer, before its coefficient",
    "train/expert_load": "tokens of the most chosen expert over the mean, mean over layers",
    "train/least_expert_load": "the same of the least chosen one",
    "train/dropped_tokens": "share of choices that found their expert full (model.experts.capacity)",
    "train/accuracy": "share of counted tokens whose most likely prediction is right",
    "train/gradient_norm": "global norm of the gradient before clipping",
    "train/gradient_norm/embedding": "the same of the embedding alone",
    "train/gradient_norm/layers_1": "... of the first quarter of the layers (of all, where they are fewer than four)",
    "train/gradient_norm/layers_2": "... of the second",
    "train/gradient_norm/layers_3": "... of the third",
    "train/gradient_norm/layers_4": "... of the fourth",
    "train/gradient_norm/head": "... of the last norm and the output head",
    "train/update_norm": "global norm of the parameters' change",
    "train/parameter_norm": "global norm of the parameters",
    "train/learning_rate": "the schedule's value at this step",
    "train/skipped_steps": "steps skipped so far because loss or gradient was not finite, or a spike",
    "train/tokens_per_second": "positions of rows, padding included, over wall time since the last line",
    "train/step_seconds": "wall time a step since the last line",
    "train/mfu": "model FLOPs over the peak of the devices (a measured product's rate on CPU)",
    "train/goodput": "share of the time since the run's first start that went into steps that stayed",
    "time/start_seconds": "all starts of the run: imports excepted, up to compiling (train/goodput.py)",
    "time/compile_seconds": "compiling the step",
    "time/step_seconds": "steps, without waiting for data",
    "time/data_seconds": "waiting for data",
    "time/save_seconds": "the part of saving that the loop waits for",
    "time/eval_seconds": "evaluations",
    "time/lost_seconds": "steps, in time/step_seconds too, that a restart took again",
    "train/data_wait": "share of wall time in which the loop waited for data",
    "reward/loss": "ranking loss, nats a prompt with an untied pair",
    "reward/accuracy": "share of pairs whose better answer scores higher; a prompt's pairs weigh 1 in all",
    "reward/difference": "better's reward - worse's, mean over pairs weighed so",
    "reward/level": "mean of the two rewards, over pairs weighed so",
    "eval/pair_accuracy": "share of held-out pairs whose better answer has the higher reward, all pairs alike",
    "preference/loss": "the method's loss (jaxlm/preference/losses.py), nats a prompt with an untied pair",
    "preference/accuracy": "share of pairs whose chosen answer has the higher implicit reward; a prompt's weigh 1",
    "preference/margin": "implicit reward of the chosen - of the rejected answer, mean over pairs weighed so",
    "preference/chosen_reward": "implicit reward of the chosen answers: beta times log-ratio or mean, or log odds",
    "preference/rejected_reward": "the same of the rejected answers",
    "preference/chosen_logprob": "log p of a whole chosen answer, nats",
    "preference/rejected_logprob": "log p of a whole rejected answer, nats",
    "preference/kl": "KTO: mean log-ratio of answers to other prompts, nats, before it is cut at 0",
    "eval/margin": "preference/margin of held-out rankings",
    "eval/chosen_reward": "preference/chosen_reward of them",
    "eval/rejected_reward": "preference/rejected_reward of them",
    "eval/chosen_logprob": "preference/chosen_logprob of them",
    "eval/rejected_logprob": "preference/rejected_logprob of them",
    "rl/reward": "reward of an answer as trained on, before the KL penalty and the rule for missing ends",
    "rl/first_reward": "dynamic sampling: the same of the prompts asked first, before any was replaced",
    "rl/extra_prompts": "dynamic sampling: fresh prompts that were asked in this rollout",
    "rl/replaced_prompts": "dynamic sampling: prompts of one reward that a fresh one took the place of",
    "rl/reward_std": "standard deviation of it over a rollout's answers",
    "rl/reward_model": "the reward model's part of it",
    "rl/verifier": "the verifiers' part of it",
    "rl/gold": "score that is measured and never trained on",
    "rl/kl": "log p - log p_reference summed over an answer, nats",
    "rl/kl_coefficient": "penalty a nat in this rollout's rewards (PPO, REINFORCE++)",
    "rl/entropy": "entropy of the policy at each answer token, nats",
    "rl/answer_tokens": "tokens an answer, stop token included",
    "rl/eos_rate": "share of answers that ended by themselves",
    "rl/repetition": "share of an answer's 4-grams that stood in it before",
    "rl/sampler_difference": "|log p of the sampler - log p of the learner|, nats a token",
    "rl/policy_loss": "clipped surrogate, and with GRPO its KL term; online DPO: its loss, nats a pair",
    "rl/clip_fraction": "share of answer tokens whose gradient the clipping stops",
    "rl/ratio": "p / p_old as clipped (GSPO's: of whole answers), mean over answer tokens and updates",
    "rl/old_kl": "KL of the old policy to the new one over all updates, nats a token",
    "rl/first_old_kl": "the same at a rollout's first update, where both should be one",
    "rl/value_loss": "half the squared error of the value function",
    "rl/equal_groups": "share of prompts whose answers all got one reward: from such a group nothing is learned",
    "rl/pair_margin": "online DPO: implicit reward of the best - of the worst answer, over pairs and updates",
    "rl/pair_accuracy": "online DPO: share of pairs whose best answer has the higher implicit reward",
    "rl/value_gradient_norm": "gradient norm of the value function, before clipping",
    "rl/value_clip_fraction": "share of answer tokens at which the clipped value counts",
    "rl/explained_variance": "share of the returns' variance that the values at the rollout explain",
    "rl/pretraining_loss": "PPO-ptx: cross-entropy on the pretraining rows, nats per counted token",
    "rl/rollout_seconds": "drawing a rollout's answers",
    "rl/reward_seconds": "verifiers, on the host",
    "rl/learning_seconds": "scoring and all updates, on the devices",
    "eval/reward": "reward of the answers to held-out prompts",
    "eval/reward_std": "standard deviation of it over the answers",
    "eval/gold": "gold score of them",
    "eval/kl": "rl/kl of them",
    "eval/answer_tokens": "tokens an answer of them",
    "eval/eos_rate": "share of them that ended by themselves",
    "eval/loss": "cross-entropy on held-out rows, nats per counted token (of an encoder: per missing word, always the "
    "same ones); of held-out rankings, the stage's own loss",
    "eval/bits_per_byte": "bits a UTF-8 byte of held-out text",
    "eval/accuracy": "share of held-out tokens (of an encoder: missing words) predicted right",
    "eval/general_loss": "eval/loss on chats of another kind than those trained on",
    "eval/general_bits_per_byte": "eval/bits_per_byte on them",
    "eval/general_accuracy": "eval/accuracy on them",
    "eval/ema_loss": "eval/loss of the averaged parameters",
    "eval/ema_bits_per_byte": "eval/bits_per_byte of the averaged parameters",
}


class Mean(NamedTuple):
    """A sum and the number of units it runs over; both float32 scalars."""

    sum: jax.Array
    weight: jax.Array

    def value(self) -> jax.Array:
        """The mean; NaN where nothing was counted."""
        return self.sum / self.weight


def merge(a: Any, b: Any) -> Any:
    """Adds two trees of `Mean`s of the same structure."""
    return jax.tree.map(jnp.add, a, b)


def scalar(value: jax.Array) -> Mean:
    """A value that is already global, as a `Mean` of weight 1."""
    return Mean(jnp.asarray(value, jnp.float32), jnp.float32(1))


def values(metrics: dict[str, Mean]) -> dict[str, float]:
    """Divides on the host; blocks until the devices have the numbers."""
    fetched = jax.device_get(metrics)
    return {
        name: float(mean.sum) / float(mean.weight) if mean.weight else float("nan") for name, mean in fetched.items()
    }
