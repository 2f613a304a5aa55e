"""A model on held-out chats: how well it predicts the answers, and what it answers itself.

Bits per byte are over the answers' own text, the stop tokens apart: so models with other templates, a base model on
plain text among them, are measured on the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.base.errors import UserError
from jaxlm.data import chats, packing
from jaxlm.data.config import ChatSource
from jaxlm.data.rows import Piece
from jaxlm.evaluate import intervals
from jaxlm.evaluate.intervals import Figure
from jaxlm.evaluate.likelihood import PACKING_WINDOW
from jaxlm.feedback.config import VerifierConfig
from jaxlm.feedback.verifying import verifier_for
from jaxlm.sample.sampler import Completion
from jaxlm.text import readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import Source
from jaxlm.tokenizer.chat import Encoded

MAX_RECORD_BYTES = 2**24


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    """up to and with the assistant's last message"""
    record: Mapping[str, Any]
    where: str


def read(source: ChatSource, kinds: Sequence[str]) -> list[Chat]:
    """The chats of a source; with `kinds`, those whose "kind" is one of them. Raises UserError for what is no chat."""
    found = []
    for where, value, _ in measured(source):
        messages = value if isinstance(value, Reason) else chats.messages_of(value)
        if isinstance(messages, Reason) or isinstance(value, Reason):
            reason = messages if isinstance(messages, Reason) else value
            raise UserError(f"chats: {where}: {reason}: it must be a chat to be measured")
        if messages[-1].get("role") != "assistant":
            raise UserError(f"chats: {where}: its last message is not the assistant's: nothing can be measured")
        if not kinds or value.get("kind") in kinds:
            found.append(Chat(messages, value, where))
    if not found:
        raise UserError(f"chats: {source.name}: holds no chat" + (f" of kind {', '.join(kinds)}" if kinds else ""))
    return found


def measured(source: Source) -> Iterator[readers.ObjectRecord]:
    """The records that an evaluation reads of a source: all, or what other stages hold out of it."""
    if source.heldout_share:
        return readers.read_split(source, "heldout", MAX_RECORD_BYTES)
    return readers.read_objects(source, MAX_RECORD_BYTES)


def pack(some: Sequence[Encoded], row_length: int, bytes_of: np.ndarray) -> Iterator[list[Piece]]:
    """Rows whose targets are the answers' text without the stop tokens; a longer chat is cut at the row's end."""

    def pieces() -> Iterator[Piece]:
        for number, encoded in enumerate(some):
            text = encoded.targets & (bytes_of[encoded.ids] > 0)
            yield Piece(encoded.ids[:row_length], number, text[:row_length])

    return packing.pack(pieces(), row_length, PACKING_WINDOW)


def scores_of(
    some: Sequence[Chat], answers: Sequence[Completion], verifiers: Sequence[VerifierConfig]
) -> dict[str, Figure]:
    """A score for each verifier: means over answers."""
    found = {}
    for config in verifiers:
        name = config.function.rpartition(":")[2] if config.kind == "function" else config.kind
        found[name] = intervals.share(
            [
                verifier_for(config, chat.record, f"chats: {chat.where}")(question(chat), answer.text).score
                for chat, answer in zip(some, answers, strict=True)
            ]
        )
    return found


def question(chat: Chat) -> str:
    """The last message before the answer."""
    return str(chat.messages[-2]["content"]) if len(chat.messages) > 1 else ""
