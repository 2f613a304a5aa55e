"""Sentencepiece models: those that `train` makes, and any other."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int32

from jaxlm.base.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space inside its pieces


class SentencePieceTokenizer:
    """Decodes what it encodes to the same text, if the model comes from `train`.

    Existing models may rewrite text first (NFKC, a space put in front, runs of spaces joined). They work, but decode
    to the rewritten text, and `token_bytes` counts its bytes, the space in front included; an unknown character
    counts 0 in a model without byte fallback.
    """

    file_name = "tokenizer.model"

    def __init__(self, content: bytes):
        """Raises RuntimeError where `content` is not a model, ValueError where it has no end-of-text token."""
        self.content = content
        self.hash = hashlib.sha256(content).hexdigest()
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if model.eos_id() < 0:
            raise ValueError("it has no end-of-text token </s>")
        self.vocab_size: int = model.vocab_size()
        self.eos_id: int = model.eos_id()
        self.bos_id: int | None = model.bos_id() if model.bos_id() >= 0 else None
        self.pad_id: int = model.pad_id() if model.pad_id() >= 0 else model.unk_id()
        ids = range(self.vocab_size)
        byte_fallback = any(model.is_byte(i) for i in ids)
        # With byte fallback no text becomes <unk>, so it is a special token like the others.
        special = [i for i in ids if model.is_control(i) or (byte_fallback and model.is_unknown(i))]
        self.special_ids = {model.id_to_piece(i): i for i in special}
        self._special = frozenset(special)
        # A text's own U+2581 would come back as a space, so its bytes are spelled out; not where a text cannot be
        # encoded in parts, because the model puts a space in front of each.
        adds_prefix = "".join(model.encode("a", out_type=str)) != "a"
        self._space_ids = (
            [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            if byte_fallback and not adds_prefix
            else []
        )

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "SentencePieceTokenizer":
        try:
            return cls(content)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{where}: is not a sentencepiece model that can be used: {error}") from error

    def encode(self, text: str) -> list[int]:
        if SPACE not in text or not self._space_ids:
            return self._model.encode(text)
        first, *rest = text.split(SPACE)
        ids = self._model.encode(first)
        for part in rest:
            ids += [*self._space_ids, *self._model.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i not in self._special])

    def piece(self, id: int) -> str:
        return self._model.id_to_piece(int(id))

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        return self._token_bytes.copy()

    @functools.cached_property
    def _token_bytes(self) -> Int32[np.ndarray, " V"]:
        model = self._model
        counts = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                counts[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i)):
                counts[i] = len(model.id_to_piece(i).replace(SPACE, " ").encode())
        return counts
