"""The model that is measured, as the metrics see it, and what an evaluation leaves for its readers."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm.base import files, logging, sharding
from jaxlm.base.config import check
from jaxlm.base.errors import ConfigError
from jaxlm.data import packing
from jaxlm.data.rows import Piece
from jaxlm.evaluate import intervals, toxicity
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.evaluate.intervals import Figure
from jaxlm.evaluate.likelihood import PACKING_WINDOW, DocumentSums, measure
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.repetition import repetition
from jaxlm.sample.sampler import Completion, Sampler
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what of it metrics need, whatever it lies on."""

    name: str
    """Its folder, for messages."""
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """The model's own, or the config's `chat_template`."""
    row_length: int
    measure: Callable[[Iterable[Sequence[Piece]], int], dict[int, DocumentSums]]
    """(packed rows, their length) → document number → sums over its targets."""
    generate: Callable[[Sequence[Sequence[int]], SamplingConfig], list[Completion]]
    """Prompts' ids → a completion each."""
    cut: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the pieces that lost the beginning of their prompt since this was cleared."""

    def chat(self) -> ChatTemplate:
        """The template. Raises ConfigError where there is none."""
        if self.template is None:
            raise ConfigError("chat_template", f"{self.name} has none; plain asks it in plain text")
        return self.template

    def encode(self, text: str) -> list[int]:
        """Ids with BOS before them where the tokenizer has one."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + list(self.tokenizer.encode(text))

    def continuation(self, context: str, text: str, number: int) -> Piece:
        """`text` after `context`, with what of it is a target; `number` names it in `measure`'s result.

        Both are encoded as one text, so that tokens are those of running text. The targets begin where the ids part
        from the context's own: a token that reaches over the border belongs to the text.
        """
        before, ids = self.encode(context), self.encode(context + text)
        begin = next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        return self._piece(ids, np.arange(len(ids)) >= min(begin, len(ids) - 1), number)

    def answer(self, messages: Messages, text: str, number: int) -> Piece:
        """The same of an assistant's answer to messages, its stop token apart."""
        encoded = self.chat().encode([*messages, {"role": "assistant", "content": text}])
        last = encoded.messages == len(messages)
        return self._piece(
            encoded.ids, encoded.targets & last & (self.tokenizer.token_bytes()[encoded.ids] > 0), number
        )

    def _piece(self, ids: Sequence[int] | np.ndarray, targets: np.ndarray, number: int) -> Piece:
        """Cut to the row from the left: what stands right before the answer stays. A longer answer is refused."""
        begin = max(0, len(ids) - self.row_length)
        if begin:
            self.cut.add(number)
            problem = f"{self.row_length} tokens are too few for an answer of {int(np.sum(targets))} and one before it"
            check(not targets[: begin + 1].any(), "row_length", problem)
        return Piece(np.asarray(ids, np.int32)[begin:], number, targets[begin:])

    def sums(self, pieces: Iterable[Piece]) -> dict[int, DocumentSums]:
        return self.measure(packing.pack(iter(pieces), self.row_length, PACKING_WINDOW), self.row_length)


class Answer(NamedTuple):
    """What the model said."""

    asked_in: str
    """Which part of the evaluation asked."""
    text: str
    language: str


class Records:
    """WORKDIR/examples/NAME.jsonl, a line for each example, and all answers of the model."""

    def __init__(self, workdir: epath.PathLike, toxic: toxicity.WordLists):
        self.workdir, self.toxic = epath.Path(workdir), toxic
        self.answers: list[Answer] = []
        self.names: list[str] = []

    def write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        path = f"examples/{name}.jsonl"
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_bytes(self.workdir / path, content.encode())
        self.names.append(path)

    def figures(self, name: str, said: Sequence[Completion], languages: Sequence[str]) -> dict[str, Figure]:
        """Of all answers to one part's prompts: how they end, their length, repetition, toxicity."""
        self.answers += [Answer(name, c.text, language) for c, language in zip(said, languages, strict=True)]
        return {
            "ended": intervals.share([completion.stop_reason != "length" for completion in said]),
            "answer_tokens": intervals.mean([len(completion.ids) for completion in said]),
            "repetition": intervals.mean([repetition(completion.ids) for completion in said]),
            "toxic": intervals.share([bool(self.toxic.found(completion.text)) for completion in said]),
        }

    def toxicity(self) -> Figure:
        """The share of all answers with a listed word, by part and language, and how often which word."""
        found = [self.toxic.found(answer.text) for answer in self.answers]
        hits = [bool(words) for words in found]
        words = [word for some in found for word in some]
        return intervals.share(hits) | {
            "by_part": intervals.by_group(hits, [answer.asked_in for answer in self.answers]),
            "by_language": intervals.by_group(hits, [answer.language for answer in self.answers]),
            "words": {word: words.count(word) for word in sorted(set(words))},
        }


def numbered(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines, each with its "number"."""
    return ({"number": number, **line} for number, line in enumerate(lines))


def subject_of(config: EvaluateConfig, lm: Any, name: str, template: str | None = None) -> Subject:
    """A `hub.LanguageModel` as metrics see it; `template` None: the config's `chat_template`."""
    if not lm.config.causal:
        raise ConfigError("model", f"{name} is an encoder: its tokens see what they would have to predict")
    chosen = config.chat_template if template is None else template
    own = chat.load(chosen, lm.tokenizer) if chosen else lm.chat_template
    row_length = config.row_length or lm.context_tokens
    ends = (lm.tokenizer.eos_id, *(own.stop_ids if own else ()))
    sampler = Sampler(lm.config, lm.tokenizer, row_length, ends)
    mesh = lm.mesh
    assert mesh is not None
    pieces = sharding.batch_pieces(mesh.shape)

    def sums(rows: Iterable[Sequence[Piece]], length: int) -> dict[int, DocumentSums]:
        with jax.set_mesh(mesh), logging.progress("evaluate") as progress:
            return measure(
                lm.definition,
                lm.params,
                rows,
                row_length=length,
                bytes_of=lm.tokenizer.token_bytes(),
                batch_rows=math.ceil(config.batch_rows / pieces) * pieces,
                progress=progress,
            )

    def generate(prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Completion]:
        with jax.set_mesh(mesh):
            return sampler.generate(lm.params, prompts, sampling)

    return Subject(
        name=name, tokenizer=lm.tokenizer, template=own, row_length=row_length, measure=sums, generate=generate
    )
