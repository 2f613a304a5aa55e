"""What models say of a rollout: log-probabilities, values and rewards, each by the learner's own forward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float, Float32
from jaxlm.model.weights import Definition, Params, apply
from jaxlm.rl.objectives import entropy, token_logprobs
from jaxlm.rl.rollout import Rollout


class AnswerTokens(NamedTuple):
    """Of each answer token, float32 `[B, T]`; what stands beyond an answer's end means nothing."""

    logprobs: Array
    """of the token, under softmax(logits / temperature), nats"""
    entropy: Array
    """of the distribution that it was drawn from, nats"""


def hidden_states(definition: Definition, params: Params, rollout: Rollout) -> Float[Array, "B S D"]:
    B, S = rollout.ids.shape
    places = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    segments = (places < rollout.lengths[:, None]).astype(jnp.int32)
    return apply(definition, params, lambda model: model(rollout.ids, segments, places)[0])


def before_answers(hidden: Float[Array, "B S D"], rollout: Rollout) -> Float[Array, "B T D"]:
    """The states in which the answers' tokens are drawn: from the prompt's last token on."""
    T = rollout.sampler_logprobs.shape[1]
    at = rollout.prompt_lengths[:, None] - 1 + jnp.arange(T)[None, :]
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1, mode="clip")


def answer_tokens(
    definition: Definition,
    params: Params,
    rollout: Rollout,
    temperature: float,
    chunk_tokens: int = 0,
    vocabulary: int | None = None,
) -> AnswerTokens:
    """Makes logits at the answers' tokens only, `chunk_tokens` of them at a time (0: all).

    `vocabulary`: the tokenizer's size, where the model has more logits: the sampler draws none of those either.
    """
    T = rollout.sampler_logprobs.shape[1]
    hidden = before_answers(hidden_states(definition, params, rollout), rollout)
    at = rollout.prompt_lengths[:, None] + jnp.arange(T)[None, :]
    ids = jnp.take_along_axis(rollout.ids, at, axis=1, mode="clip")

    def each(part: tuple[Array, Array]) -> AnswerTokens:
        logits = apply(definition, params, lambda model: model.logits(part[0])) / temperature
        if vocabulary is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1])[None, :] < vocabulary, logits, -jnp.inf)
        return AnswerTokens(token_logprobs(logits, part[1]), jax.lax.stop_gradient(entropy(logits)))

    flat = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    tokens = ids.size
    if not chunk_tokens or tokens <= chunk_tokens:
        made = each(flat)
    else:
        # Chunk c takes tokens c, c + C, …, so that each is spread over the devices as the rows are.
        chunks = jax.tree.map(lambda x: x.reshape(chunk_tokens, -1, *x.shape[1:]).swapaxes(0, 1), flat)
        made = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), jax.lax.map(jax.checkpoint(each), chunks))
    return jax.tree.map(lambda x: x.reshape(ids.shape), made)


def answer_values(definition: Definition, params: Params, rollout: Rollout) -> Float32[Array, "B T"]:
    """The value function at the states in which the answers' tokens are drawn."""
    hidden = before_answers(hidden_states(definition, params, rollout), rollout)
    return apply(definition, params, lambda model: model.scores(hidden))[..., 0]


def rewards(definition: Definition, params: Params, rollout: Rollout) -> Float32[Array, "B C"]:
    """A reward model's scores, read at each row's last real token."""
    hidden = hidden_states(definition, params, rollout)
    last = jnp.take_along_axis(hidden, (rollout.lengths - 1)[:, None, None], axis=1)[:, 0]
    return apply(definition, params, lambda model: model.scores(last))
