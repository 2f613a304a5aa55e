"""A trained model in Python: `jaxlm.load(path)`.

lm = jaxlm.load("runs/demo")
lm.generate(["The array is"], max_tokens=32, temperature=0.7)[0].text
lm.chat([{"role": "user", "content": "What does textwrap.dedent do?"}])         # of a model trained on chats
lm.score(["A sentence."])[0].bits_per_byte
lm.logits([[1, 17, 23]]).shape                                         # (1, 3, V)
jaxlm.load("runs/reward").reward([[question, answer]])                 # of a reward model: float32 [1]
jaxlm.load("models/bert").embed(["A sentence."])                       # of an encoder: float32 [1, D]
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlm.base.arrays import Array, Float32
from jaxlm.base.config import from_dict
from jaxlm.base.errors import UserError, nearest
from jaxlm.base.precision import Compute
from jaxlm.hub import forward, hugging_face, peft
from jaxlm.hub.forward import SCORE_ROWS, padded, scoring_windows
from jaxlm.hub.generation import Generation
from jaxlm.hub.opened import open_model
from jaxlm.hub.pooling import Pooling
from jaxlm.hub.tokenizers import read_template
from jaxlm.model.config import ModelConfig, adapted
from jaxlm.model.transformer import for_inference
from jaxlm.model.weights import Params
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.sampler import Completion, Sampler
from jaxlm.sample.scoring import TokenScores, token_scores
from jaxlm.tokenizer.chat import ASSISTANT, ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
Prompt = str | Conversation | Sequence[int]

# Most tokens of an answer where nobody says how many.
ANSWER_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a text is."""

    logprob: float
    """Sum over its tokens, nats."""
    bits_per_byte: float
    """-logprob / ln 2 over the UTF-8 bytes of those tokens; NaN where no token was scored."""
    tokens: int
    """Tokens scored: all of the text's, but for the first where the tokenizer has no BOS to predict it from."""


def load(
    path: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    verify: bool = True,
    compute: Compute | None = None,
    adapter: epath.PathLike | None = None,
) -> "LanguageModel":
    """The model in a model directory, in a Hugging Face directory or a GGUF file, or the newest one in a run's folder.

    `mesh` (of `jaxlm.base.sharding.make_mesh`) spreads it over devices; without one it lies on the first.
    `verify=False` skips the sha256 of its files. `compute` is the type of matrix products, in place of the model's own
    (of a Hugging Face directory: bfloat16 where most tensors are that, else float32). `adapter`: a directory of peft's,
    LoRA or DoRA, which stays beside the model's matrices; with a reward model's heads it makes one of a language model,
    and its chat template, where it has one, is taken for the model's.
    Raises UserError for folders without a finished model, for damaged ones, and for what is not understood of a Hugging
    Face directory.
    """
    directory = open_model(path, verify=verify, encoders=True)
    config = dataclasses.replace(directory.config, compute=compute or directory.config.compute)
    definition = for_inference(config)[1]
    params = directory.load_params(definition, definition.shardings(mesh) if mesh else None)
    template = None
    if adapter is not None:
        theirs = isinstance(directory, hugging_face.HuggingFaceDirectory)
        read = peft.read(adapter, directory.family if theirs else peft.family_of(directory), directory.config)
        config = adapted(read.shape(config), read.lora)
        definition = for_inference(config)[1]
        params = jax.device_put(read.beside(params, definition), definition.shardings(mesh) if mesh else None)
        template = read_template(epath.Path(adapter), directory.tokenizer())
    return LanguageModel(
        config,
        params,
        directory.tokenizer(),
        chat_template=template or directory.chat_template(),
        context_tokens=directory.context_tokens(),
        generation=Generation.read(directory.folder, getattr(directory, "values", {})),
        pooling=_pooling(directory),
        mesh=mesh,
    )


class LanguageModel:
    """A model with its tokenizer, ready to score and to speak; a reward model (with `config.criteria`) only rewards;
    an encoder (`config.causal` off) gives vectors, and logits of the tokens that stand there (of [MASK])."""

    config: ModelConfig
    params: Params
    """Nested dict: layers unrolled ("layers" → "0" → ...), matrices in the compute type."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None for a model that was not trained on chats."""
    context_tokens: int
    """Length of the rows it was trained on; 0 if its directory does not say."""
    defaults: dict[str, Any]
    """Fields of SamplingConfig that an imported model's makers sample with; they hold where a call says nothing."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        context_tokens: int = 0,
        generation: Generation | None = None,
        pooling: Pooling | None = None,
        mesh: Mesh | None = None,
    ):
        """`params` as `jaxlm.sample.decoding.prepare(config, params)` gives them."""
        self.config, self.definition = for_inference(config)
        self.params = params
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.context_tokens = context_tokens
        self.mesh = mesh
        self.pooling: Pooling = pooling or "mean"
        # A chat model can still go on with a document, which ends with EOS.
        ends = (tokenizer.eos_id, *chat_template.stop_ids) if chat_template else ()
        if generation is not None:
            ends = (tokenizer.eos_id, *ends, *(id for id in generation.eos_ids if id < tokenizer.vocab_size))
        self.defaults = generation.sampling() if generation else {}
        self.sampler = Sampler(config, tokenizer, context_tokens, ends)

    def logits(
        self, ids: Sequence[Sequence[int]] | np.ndarray | Array, lengths: Sequence[int] | np.ndarray | None = None
    ) -> Float32[Array, "B S V"]:
        """Logits after each token of the rows `ids[B, S]`, padded on the right where `lengths[B]` say so.

        What stands in the padding changes nothing; the logits there mean nothing. Compiles once for each [B, S].
        """
        self._require_logits("logits")
        given = np.asarray(ids)
        if given.ndim != 2 or given.dtype.kind not in "iu" or not given.size:
            raise UserError(f"ids: got shape {given.shape} of {given.dtype}; whole numbers [B, S] are needed")
        if given.min() < 0 or given.max() >= self.config.vocab_size:
            raise UserError(
                f"ids: {given.min()} to {given.max()} are not all in the vocabulary of {self.config.vocab_size}"
            )
        B, S = given.shape
        counts = np.full(B, S) if lengths is None else np.asarray(lengths)
        if counts.shape != (B,) or counts.min() < 1 or counts.max() > S:
            raise UserError(f"lengths: got {counts.tolist()}; a number from 1 to {S} for each of {B} rows is needed")
        segments = np.arange(S)[None] < counts[:, None]
        with self._on_mesh():
            return forward.logits(self.definition, self.params, given.astype(np.int32), segments.astype(np.int32))

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 128,
        *,
        step: int = 0,
        prompt_ids: Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Completions of texts, the assistant's next message in conversations (lists of {"role", "content"}), or
        completions of ids (which are taken as they are: put BOS in front where the model expects it).

        Further arguments are the fields of `SamplingConfig`: temperature, top_p, top_k, min_p, repetition_penalty,
        stop, stop_tokens, samples, seed, ... With samples=K, each prompt's K completions follow each other. The same
        seed, `step`, prompt id (by default its index) and sample number give the same completion, in any company.
        """
        self._require_speech("generate")
        if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], Mapping)):
            raise UserError("prompts: got a single one; a list of texts, of conversations or of lists of ids is needed")
        config = _sampling(max_tokens, self.defaults | sampling)
        encoded = [self.encode(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
        with self._on_mesh():
            return self.sampler.generate(self.params, encoded, config, step=step, prompt_ids=prompt_ids)

    def chat(self, messages: Conversation, max_tokens: int = 0, **sampling: Any) -> str:
        """The assistant's next message; `max_tokens` 0 leaves it what the context has room for, at most 512."""
        self._require_speech("chat")
        ids = self.encode(messages, "messages")
        room = max_tokens or self.room(ids, context_tokens=sampling.get("context_tokens", 0))
        return self.generate([ids], room, **sampling)[0].text

    def room(self, ids: Sequence[int], most: int = ANSWER_TOKENS, context_tokens: int = 0) -> int:
        """Tokens that fit behind a prompt into the context (0: the trained row length), at most `most`.

        Raises UserError for a prompt that fills the context.
        """
        context = context_tokens or self.context_tokens
        left = context - len(ids) if context else most
        if left < 1:
            raise UserError(f"the prompt has {len(ids)} tokens, and the context of {context} has no room behind it")
        return min(left, most)

    def stream(
        self, prompt: Prompt, max_tokens: int = 128, *, step: int = 0, prompt_id: int = 0, **sampling: Any
    ) -> Iterator[str]:
        """The text of one completion in pieces, as it is drawn; arguments as for `generate`."""
        self._require_speech("stream")
        config = _sampling(max_tokens, self.defaults | sampling)
        encoded = self.encode(prompt, "prompt")
        pieces = self.sampler.stream(self.params, encoded, config, step=step, prompt_id=prompt_id)
        while True:
            with self._on_mesh():  # and not around the yield, which would set it for the caller too
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def score(self, texts: Sequence[str], *, context_tokens: int = 0) -> list[Score]:
        """The log-probability of each text after BOS, without an end-of-text token.

        A text longer than the context (by default the trained row length) is read in windows of that many tokens, each
        starting half a window after the one before: every token is scored once, those after the first window with at
        least half a context in front of them.
        """
        self._require_speech("score")
        context = context_tokens or self.context_tokens
        if context < 2:
            raise UserError(f"context_tokens: is {context} and the model's row length is unknown; give 2 or more")
        if isinstance(texts, str):
            raise UserError("texts: got a single one; a list of texts is needed")
        encoded = [self.sampler.encode(text) for text in texts]
        windows = [(t, *window) for t, ids in enumerate(encoded) for window in scoring_windows(len(ids), context)]
        windows.sort(key=lambda window: window[2] - window[1])
        logprobs = [0.0] * len(texts)
        for at in range(0, len(windows), SCORE_ROWS):
            group = windows[at : at + SCORE_ROWS]
            scores = self.token_scores([encoded[t][begin:end] for t, begin, end, _ in group]).logprobs
            for row, (t, begin, end, first) in enumerate(group):
                logprobs[t] += float(np.sum(scores[row, first - begin : end - begin], dtype=np.float64))
        bytes_of = self.tokenizer.token_bytes()
        return [_score(logprob, ids[1:], bytes_of) for logprob, ids in zip(logprobs, encoded, strict=True)]

    def reward(self, conversations: Sequence[Conversation], criterion: str = "") -> Float32[np.ndarray, "B"]:
        """A reward model's reward for the last message of each conversation, which is the assistant's.

        `criterion` is one of `config.criteria`; by default "overall", or the only one.
        """
        criteria = self._criteria("reward")
        chosen = criterion or ("overall" if "overall" in criteria else criteria[0])
        if chosen not in criteria:
            raise UserError(f"criterion: the model has no {criterion!r}" + nearest(criterion, criteria))
        if not criterion and len(criteria) > 1 and chosen != "overall":
            raise UserError(f"criterion: the model has no 'overall'; give one of {', '.join(criteria)}")
        return self.rewards(conversations)[:, criteria.index(chosen)]

    def rewards(self, conversations: Sequence[Conversation]) -> Float32[np.ndarray, "B C"]:
        """The rewards by all criteria, in the order of `config.criteria`.

        They are read at the answer's stop token, the last token that the assistant wrote: what a template puts behind
        it counts for nothing. A conversation's rewards do not depend on the others but for rounding.
        """
        criteria = self._criteria("rewards")
        if isinstance(conversations, str | Mapping) or (conversations and isinstance(conversations[0], Mapping)):
            raise UserError("conversations: got a single one; a list of conversations is needed")
        rows = [self._judged(conversation, f"conversations[{i}]") for i, conversation in enumerate(conversations)]
        return self._each(rows, forward.last_scores, len(criteria))

    def embed(self, texts: Sequence[str], pooling: Pooling | None = None) -> Float32[np.ndarray, "B D"]:
        """An encoder's vector for each text, made of the last layer's states of its tokens; not normalised.

        A text is encoded as documents are packed and as BERT takes it: BOS ([CLS]), the text, EOS ([SEP]). mean: the
        mean over all of them, these two included; first: BOS's; pooler: what the model's pooler makes of BOS's; None:
        as a sentence-transformers directory says, else mean. Padding and other texts change nothing but rounding.
        """
        pooling = pooling or self.pooling
        if self.config.causal:
            raise UserError("embed: the model is a decoder, whose tokens know nothing of what follows; load an encoder")
        if isinstance(texts, str):
            raise UserError("texts: got a single one; a list of texts is needed")
        if pooling not in get_args(Pooling) or (pooling == "pooler" and self.config.head != "pooler"):
            raise UserError(f"pooling: the model has no {pooling!r}; take mean or first")
        rows = [np.array([*self.sampler.encode(text), self.tokenizer.eos_id]) for text in texts]
        for number, row in enumerate(rows):
            if self.context_tokens and len(row) > self.context_tokens:
                raise UserError(f"texts[{number}]: has {len(row)} tokens, the context is {self.context_tokens}; cut it")
        return self._each(rows, functools.partial(forward.embeddings, pooling=pooling), self.config.width)

    def _each(self, rows: Sequence[np.ndarray], run: Callable[..., Array], size: int) -> Float32[np.ndarray, "B size"]:
        """`run`'s `size` numbers for each row of ids, those of like length together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        made = np.zeros((len(rows), size), np.float32)
        for at in range(0, len(order), SCORE_ROWS):
            group = order[at : at + SCORE_ROWS]
            with self._on_mesh():
                found = run(self.definition, self.params, *padded([rows[index] for index in group]))
            made[group] = found[: len(group)]
        return made

    def _judged(self, conversation: Conversation, where: str) -> np.ndarray:
        """The ids of a conversation up to the stop token of its last message."""
        if self.chat_template is None:
            raise UserError(f"{where}: the model has no chat template, so conversations cannot be put before it")
        if not isinstance(conversation, Sequence) or not all(isinstance(item, Mapping) for item in conversation):
            raise UserError(f"{where}: got {conversation!r}; a list of messages is needed")
        try:
            encoded = self.chat_template.encode(conversation)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        written = np.flatnonzero(encoded.targets)
        role = conversation[-1]["role"]
        if role != ASSISTANT or not len(written) or encoded.messages[written[-1]] != len(conversation) - 1:
            raise UserError(f"{where}: ends with a message of {role!r}; the last must be the assistant's answer")
        ids = encoded.ids[: written[-1] + 1]
        if self.context_tokens and len(ids) > self.context_tokens:
            raise UserError(f"{where}: has {len(ids)} tokens, the context is {self.context_tokens}; shorten it")
        return ids

    def _criteria(self, method: str) -> tuple[str, ...]:
        if not self.config.criteria:
            raise UserError(
                f"{method}: the model is a language model and has no rewards; load a reward model, or take `score`, "
                "the log-probability of texts"
            )
        return self.config.criteria

    def _require_speech(self, method: str) -> None:
        self._require_logits(method)
        if not self.config.causal:
            raise UserError(
                f"{method}: the model is an encoder, which reads texts both ways and writes none; take `embed`, or "
                "`logits` of the tokens that stand there"
            )

    def _require_logits(self, method: str) -> None:
        if self.config.head == "pooler":
            raise UserError(f"{method}: the model is a bare encoder without an output head; take `embed`")
        if self.config.criteria:
            raise UserError(
                f"{method}: the model is a reward model, which says nothing; take `reward` or `rewards`, for "
                f"conversations ({', '.join(self.config.criteria)})"
            )

    def token_scores(self, rows: Sequence[Sequence[int]]) -> TokenScores:
        """`[SCORE_ROWS, S]`, on the host: each token given those before it in at most SCORE_ROWS rows of ids; S is a
        power of two."""
        self._require_speech("token_scores")
        ids, segments, positions = padded(rows)
        with self._on_mesh():
            return jax.device_get(token_scores(self.definition, self.params, ids, segments, positions))

    def encode(self, prompt: Prompt, where: str) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.sampler.encode(prompt)
        if isinstance(prompt, Mapping):
            raise UserError(f"{where}: is one message; a conversation is a list of them")
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if not messages:
            return [int(token) for token in prompt if not isinstance(token, Mapping)]
        if len(messages) < len(prompt):
            raise UserError(f"{where}: mixes messages with other things; give a conversation or ids")
        if self.chat_template is None:
            raise UserError(f"{where}: is a conversation, but the model has no chat template; give a text or ids")
        return self.chat_template.prompt(messages)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()


def _score(logprob: float, scored: Sequence[int], bytes_of: np.ndarray) -> Score:
    count = int(bytes_of[np.array(scored, np.int64)].sum())
    return Score(logprob, -logprob / math.log(2) / count if count else math.nan, len(scored))


def _pooling(directory: Any) -> Pooling | None:
    """As a Hugging Face directory says, or the one that a model directory was imported from."""
    if isinstance(directory, hugging_face.HuggingFaceDirectory):
        return directory.pooling()
    return (directory.manifest.facts.get("hugging_face") or {}).get("pooling")


def _sampling(max_tokens: int, fields: Mapping[str, Any]) -> SamplingConfig:
    return from_dict(SamplingConfig, {"max_tokens": max_tokens, **fields}, "generate")
