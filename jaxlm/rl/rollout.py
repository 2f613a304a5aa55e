"""A rollout: prompts and what the policy answered, as arrays that the learner takes.

Prompts and answers lie side by side at the left of a row; what belongs to an answer's tokens lies apart:

    ids             <s> w  h  y  ?  n  o  </s>  .  .       [B, S]     S = longest prompt + most answer tokens
    prompt_lengths  5                                      [B]
    answer_lengths  3                                      [B]
    logprobs        ·  ·  ·                                [B, T]     of n, o, </s>

Rows p·K … p·K + K-1 answer the same prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.base.arrays import Array, Bool, Int
from jaxlm.base.sharding import replicated
from jaxlm.rl.prompts import Prompt
from jaxlm.sample.sampler import Completion


class Rollout(NamedTuple):
    ids: Array
    """int32 `[B, S]`"""
    prompt_lengths: Array
    """int32 `[B]`"""
    answer_lengths: Array
    """int32 `[B]`; 0 in a row that only fills the batch"""
    ended: Array
    """bool `[B]`: the answer ended by itself, with a stop token"""
    scores: Array
    """float32 `[B]`: what verifiers gave, weighted; a reward model's scores are added on the device"""
    sampler_logprobs: Array
    """float32 `[B, T]`: as the sampler computed them, to be compared with the learner's"""

    @property
    def answer_mask(self) -> Bool[Array, "B T"]:
        """True at an answer's own tokens, its stop token included."""
        return jnp.arange(self.sampler_logprobs.shape[1])[None, :] < self.answer_lengths[:, None]

    @property
    def lengths(self) -> Int[Array, "B"]:
        return self.prompt_lengths + self.answer_lengths


def gather(
    prompts: Sequence[Prompt], completions: Sequence[Completion], scores: Sequence[float], *, S: int, T: int, rows: int
) -> Rollout:
    """Arrays on the host, of as many completions for each prompt as there are; filled up to `rows` with empty rows."""
    samples = len(completions) // len(prompts)
    arrays: dict[str, Any] = dict(
        ids=np.zeros((rows, S), np.int32),
        prompt_lengths=np.ones(rows, np.int32),
        answer_lengths=np.zeros(rows, np.int32),
        ended=np.zeros(rows, np.bool_),
        scores=np.zeros(rows, np.float32),
        sampler_logprobs=np.zeros((rows, T), np.float32),
    )
    made = Rollout(**arrays)
    for row, (completion, score) in enumerate(zip(completions, scores, strict=True)):
        prompt = prompts[row // samples]
        begin, count = len(prompt.ids), len(completion.ids)
        made.ids[row, :begin] = prompt.ids
        made.ids[row, begin : begin + count] = completion.ids
        made.prompt_lengths[row], made.answer_lengths[row] = begin, count
        made.ended[row] = completion.stop_reason != "length"
        made.scores[row] = score
        made.sampler_logprobs[row, :count] = completion.logprobs
    return made


def abstract(mesh: Mesh, B: int, S: int, T: int) -> Rollout:
    """Shapes and shardings. It is small, so whole on every device: picking a minibatch out of it moves nothing."""
    whole = replicated(mesh)
    row = lambda kind: jax.ShapeDtypeStruct((B,), kind, sharding=whole)
    arrays: dict[str, Any] = dict(
        ids=jax.ShapeDtypeStruct((B, S), jnp.int32, sharding=whole),
        prompt_lengths=row(jnp.int32),
        answer_lengths=row(jnp.int32),
        ended=row(jnp.bool_),
        scores=row(jnp.float32),
        sampler_logprobs=jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=whole),
    )
    return Rollout(**arrays)


def place(rollout: Rollout, like: Rollout) -> Rollout:
    """Host arrays, the same on every process, as global arrays (all processes call this together)."""

    def put(x: Any, a: Any) -> jax.Array:
        return jax.make_array_from_callback(a.shape, a.sharding, lambda index: x[index])

    return Rollout(*(put(x, a) for x, a in zip(rollout, like, strict=True)))
