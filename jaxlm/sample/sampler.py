"""Completions of prompts: buckets and batches around `decoding.py`, stop strings, text.

    sampler = Sampler(config, tokenizer)
    params = prepare(config, params)                                # once for each new set of parameters
    completions = sampler.generate(params, [[1, 17, 23]], SamplingConfig(max_tokens=64, samples=4))

Prompts are padded to 16, 32, 64, … tokens, new tokens to 32, 64, …, rows to 1, 2, 4, …, so that few programs are
compiled. Works on one device and, with sharded parameters, under `jax.set_mesh(mesh)`.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxlm.base import sharding
from jaxlm.base.errors import JaxlmError, UserError, nearest
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import for_inference
from jaxlm.model.weights import Params
from jaxlm.sample import decoding
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.distribution import settings_of
from jaxlm.tokenizer.tokenizer import Tokenizer

# Tokens between two looks at the text, for stop strings: a row may draw so many for nothing.
STOP_STRING_CHUNK = 32
# The same for a stream, where somebody watches.
STREAM_CHUNK = 4

StopReason = Literal["eos", "stop_token", "stop_string", "length"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model said: `ids` and `logprobs` hold every token that was drawn for it, `text` what it is to be read as.

    A token that stops (`eos`, `stop_token`) is the last of `ids` and no part of `text`. At a stop string, `ids` end
    with the token that completes it and `text` just before it. With "length" nothing was added: EOS is never made up.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the distribution drawn from (cut and tempered), nats; greedy: of the model's own."""
    stop_reason: StopReason


class Row(NamedTuple):
    """One completion to draw."""

    prompt: Sequence[int]
    prompt_id: int
    sample: int


class Sampler:
    """Draws completions from models of one config; the parameters are given to each call, as `prepare` makes them."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        context_tokens: int = 0,
        ends: Sequence[int] = (),
        prompt_room: int = 0,
    ):
        """`context_tokens`: length of the rows the model was trained on; 0: unknown, any length goes. `ends`: the
        tokens that end a completion by itself ("eos"), such as a chat template's stop tokens; empty: EOS alone.
        `prompt_room`: what prompts up to this length are padded to, so that one program serves them all."""
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
                "take the tokenizer that the model was trained with"
            )
        # Rows of the embedding beyond the tokenizer (padding to a round size) name no token and are never drawn.
        self.vocabulary = None if tokenizer.vocab_size == config.vocab_size else tokenizer.vocab_size
        self.source_config = config
        self.config, self.definition = for_inference(config)
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.ends = [*ends] or [tokenizer.eos_id]
        self.prompt_room = prompt_room

    def encode(self, text: str) -> list[int]:
        """The prompt's ids, with BOS before them where the tokenizer has one (as documents are packed)."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + list(self.tokenizer.encode(text))

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        step: int = 0,
        prompt_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`sampling.samples` completions for each prompt, prompt by prompt.

        The random bits of a completion depend on the seed, `step`, its prompt's id (by default the prompt's index) and
        its sample number; not on the batch, the padding or the devices. Raises UserError for empty prompts, ids outside
        of the vocabulary and prompts that leave no room for `max_tokens`.
        """
        for index, prompt in enumerate(prompts):
            self._check(prompt, sampling, f"prompts[{index}]")
        names = range(len(prompts)) if prompt_ids is None else prompt_ids
        rows = [
            Row(prompt, name, sample)
            for prompt, name in zip(prompts, names, strict=True)
            for sample in range(sampling.samples)
        ]
        chunk = STOP_STRING_CHUNK if sampling.stop else sampling.max_tokens
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
        completions: dict[int, Completion] = {}
        for first in range(0, len(rows), sampling.batch_rows):
            batch = order[first : first + sampling.batch_rows]
            *_, final = self._grow(params, [rows[index] for index in batch], sampling, step, chunk)
            completions |= zip(batch, final, strict=True)
        return [completions[index] for index in range(len(rows))]

    def stream(
        self, params: Params, prompt: Sequence[int], sampling: SamplingConfig, *, step: int = 0, prompt_id: int = 0
    ) -> Iterator[str]:
        """The text of one completion, piece by piece; the pieces together are `generate`'s text.

        No piece splits a character, or holds the beginning of what may become a stop string.
        """
        self._check(prompt, sampling, "prompt")
        given, completion = 0, None
        for (completion,) in self._grow(params, [Row(prompt, prompt_id, 0)], sampling, step, STREAM_CHUNK):
            ready = settled(completion.text, sampling.stop) if completion.stop_reason == "length" else None
            if piece := completion.text[given:ready]:
                given += len(piece)
                yield piece
        if completion is not None and completion.text[given:]:
            yield completion.text[given:]

    def _check(self, prompt: Sequence[int], sampling: SamplingConfig, where: str) -> None:
        if not self.config.causal:
            raise UserError("the model is an encoder, which writes no text; give a decoder, or take `embed`")
        if not len(prompt):
            raise UserError(f"{where}: is empty, and the tokenizer has no BOS token; give at least one token")
        for token in prompt:
            if not 0 <= token < self.tokenizer.vocab_size:
                raise UserError(f"{where}: token {token} is outside of the vocabulary of {self.tokenizer.vocab_size}")
        context = sampling.context_tokens or self.context_tokens
        if context and len(prompt) + sampling.max_tokens > context:
            raise UserError(
                f"{where}: {len(prompt)} tokens and max_tokens {sampling.max_tokens} exceed the context of {context}; "
                "shorten the prompt, lower max_tokens, or raise sampling.context_tokens to go past the trained length"
            )

    def _grow(
        self, params: Params, rows: Sequence[Row], sampling: SamplingConfig, step: int, chunk: int
    ) -> Iterator[list[Completion]]:
        """The completions as they stand after every `chunk` tokens; "length" on those that may still grow."""
        settings = settings_of(sampling, self.vocabulary)
        stops = self._stop_tokens(sampling)
        state = decoding.start(
            self.definition,
            self.config,
            bucket(sampling.max_tokens, 32),
            params,
            _batch(rows, sampling.seed, step, self.prompt_room),
            stops,
            settings,
        )
        limit = 1
        completions: list[Completion | None] = [None] * len(rows)
        while True:
            limit = min(limit + chunk, sampling.max_tokens)
            state = decoding.advance(self.definition, params, state, stops, settings, np.int32(limit))
            tokens, logprobs, counts, done = map(np.array, (state.tokens, state.logprobs, state.counts, state.done))
            for index, before in enumerate(completions):
                if before is None or before.stop_reason == "length":
                    count, stopped = int(counts[index]), bool(done[index])
                    made = self._completion(tokens[index, :count], logprobs[index, :count], stopped, sampling)
                    completions[index] = made
                    done[index] |= made.stop_reason == "stop_string"
            yield [c for c in completions if c is not None]
            if limit == sampling.max_tokens or done.all():
                return
            state = state._replace(done=jax.device_put(done, state.done.sharding))

    def _stop_tokens(self, sampling: SamplingConfig) -> np.ndarray:
        """int32 ids, filled up with -1 to a multiple of 8, so that their number seldom recompiles."""
        special = self.tokenizer.special_ids
        ids = list(self.ends) if sampling.stop_at_eos else []
        for name in sampling.stop_tokens:
            if name not in special and not (name.isdecimal() and int(name) < self.tokenizer.vocab_size):
                raise UserError(f"stop_tokens: {name!r} is neither an id nor a special token{nearest(name, special)}")
            ids.append(special[name] if name in special else int(name))
        return np.array(ids + [-1] * (8 - len(ids) % 8), np.int32)

    def _completion(self, ids: np.ndarray, logprobs: np.ndarray, stopped: bool, sampling: SamplingConfig) -> Completion:
        """The completion whose drawn tokens are these; `stopped`: the last of them is one of the stop tokens."""
        if not np.isfinite(logprobs).all():
            raise JaxlmError("the model's logits are not finite; are its parameters damaged?")
        kept = ids.tolist()
        text = self.tokenizer.decode(kept[:-1] if stopped else kept)
        reason: StopReason = "length"
        if stopped:
            reason = "eos" if sampling.stop_at_eos and kept[-1] in self.ends else "stop_token"
        if any(stop in text for stop in sampling.stop):
            complete = lambda n: any(stop in self.tokenizer.decode(kept[:n]) for stop in sampling.stop)
            kept = kept[: bisect.bisect_left(range(len(kept)), True, key=complete)]
            text = self.tokenizer.decode(kept)
            text = text[: min(at for stop in sampling.stop if (at := text.find(stop)) >= 0)]
            reason = "stop_string"
        return Completion(text, tuple(kept), tuple(logprobs[: len(kept)].tolist()), reason)


def bucket(size: int, least: int = 1) -> int:
    """The next power of two from `least` on.

    >>> bucket(33, 16)
    64
    """
    return max(least, 1 << (size - 1).bit_length())


def settled(text: str, stops: Sequence[str]) -> int:
    """How many of the text's first characters no further token can change or cut off.

    A last U+FFFD may be the first bytes of a character; a last "\\nUs" may become the stop string "\\nUser:".
    """
    text = text.rstrip("\ufffd")
    beginnings = (stop[:size] for stop in stops for size in range(1, len(stop)))
    return len(text) - max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def _batch(rows: Sequence[Row], seed: int, step: int, room: int) -> decoding.Prompts:
    """The rows, padded to their buckets (prompts to `room` where that is enough), under a mesh to what it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    pieces = 1 if mesh.empty else sharding.batch_pieces(mesh.shape)
    B = -(-bucket(len(rows)) // pieces) * pieces
    longest = max(len(row.prompt) for row in rows)
    P = room if longest <= room else bucket(longest, 16)
    ids = np.zeros((B, P), np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row.prompt)] = row.prompt
    fill = [1] * (B - len(rows))
    arrays: dict[str, Any] = dict(
        ids=ids,
        lengths=np.array([len(row.prompt) for row in rows] + fill, np.int32),
        real=np.arange(B) < len(rows),
        prompt_ids=np.array([row.prompt_id for row in rows] + fill, np.uint32),
        samples=np.array([row.sample for row in rows] + fill, np.uint32),
        seed=np.array(seed, np.uint32),
        step=np.array(step, np.uint32),
    )
    return decoding.Prompts(**arrays)
