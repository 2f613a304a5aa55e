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
    "train/z_loss": "squared log-normaliser, per counted token, before its coefficient",
    "train/accuracy": "share of counted tokens whose most likely prediction is right",
    "train/gradient_norm": "global norm of the gradient before clipping",
    "train/update_norm": "global norm of the parameters' change",
    "train/parameter_norm": "global norm of the parameters",
    "train/learning_rate": "the schedule's value at this step",
    "train/skipped_steps": "steps skipped so far because loss or gradient was not finite",
    "train/tokens_per_second": "positions of rows, padding included, over wall time since the last line",
    "train/step_seconds": "wall time a step since the last line",
    "train/mfu": "model FLOPs over the peak of the devices (a measured product's rate on CPU)",
    "train/data_wait": "share of wall time in which the loop waited for data",
    "reward/loss": "ranking loss, nats a prompt with an untied pair",
    "reward/accuracy": "share of pairs whose better answer scores higher; a prompt's pairs weigh 1 in all",
    "reward/difference": "better's reward - worse's, mean over pairs weighed so",
    "reward/level": "mean of the two rewards, over pairs weighed so",
    "eval/pair_accuracy": "reward/accuracy of held-out rankings, all pairs alike",
    "rl/reward": "reward of an answer as trained on, before the KL penalty and the rule for missing ends",
    "rl/reward_std": "standard deviation of it over a rollout's answers",
    "rl/reward_model": "the reward model's part of it",
    "rl/verifier": "the verifiers' part of it",
    "rl/gold": "score that is measured and never trained on",
    "rl/kl": "log p - log p_reference summed over an answer, nats",
    "rl/kl_coefficient": "PPO's penalty a nat in this rollout",
    "rl/entropy": "entropy of the policy at each answer token, nats",
    "rl/answer_tokens": "tokens an answer, stop token included",
    "rl/eos_rate": "share of answers that ended by themselves",
    "rl/repetition": "share of an answer's 4-grams that stood in it before",
    "rl/sampler_difference": "|log p of the sampler - log p of the learner|, nats a token",
    "rl/policy_loss": "clipped surrogate, and with GRPO its KL term",
    "rl/clip_fraction": "share of answer tokens whose gradient the clipping stops",
    "rl/ratio": "p / p_old, mean over answer tokens and updates",
    "rl/old_kl": "KL of the old policy to the new one over all updates, nats a token",
    "rl/first_old_kl": "the same at a rollout's first update, where both should be one",
    "rl/value_loss": "half the squared error of the value function",
    "rl/equal_groups": "GRPO: share of prompts whose answers all got one reward, from which nothing is learned",
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
    "eval/loss": "cross-entropy on held-out rows, nats per counted token",
    "eval/bits_per_byte": "bits a UTF-8 byte of held-out text",
    "eval/accuracy": "share of held-out tokens predicted right",
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
