"""Tokenizers of Hugging Face's `tokenizers`: byte-level BPE, and those with sentencepiece's sign for a space."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from jaxlm.base.errors import UserError
from jaxlm.tokenizer.sentencepiece import SPACE


class HuggingFaceTokenizer:
    """A tokenizer.json with the ids that it does not name: {"bos": 1 | null, "eos": 2, "pad": 0, "tokenizer": {…}}.

    A model that rewrites text (NFC, a space put in front) decodes to the rewritten one, and counts its bytes.
    """

    file_name = "hf_tokenizer.json"

    def __init__(self, content: bytes):
        """Raises ValueError, KeyError or TypeError where `content` is no such file."""
        self.content, self.hash = content, hashlib.sha256(content).hexdigest()
        values = json.loads(content)
        self.values: dict[str, Any] = values["tokenizer"]
        try:
            self._model = model = tokenizers.Tokenizer.from_str(json.dumps(self.values))
        except Exception as error:  # the library raises no class of its own
            raise ValueError(str(error)) from None
        model.encode_special_tokens = True  # as text, which is what a text that says "</s>" means
        model.no_truncation()
        model.no_padding()
        ids = model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self.bos_id: int | None = values["bos"]
        self.eos_id: int = values["eos"]
        self.pad_id: int = values["pad"]
        for name in ("bos", "eos", "pad"):
            if values[name] not in ids.values() and not (name == "bos" and values[name] is None):
                raise ValueError(f"{name} is {values[name]!r}, which is no id of a token")
        self._added = model.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in self._added.items() if token.special}

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "HuggingFaceTokenizer":
        try:
            return cls(content)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: is not a tokenizer that can be used: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, id: int) -> str:
        return self._model.id_to_token(int(id)) or ""

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        return self._token_bytes.copy()

    @functools.cached_property
    def _token_bytes(self) -> Int32[np.ndarray, " V"]:
        counts = np.zeros(self.vocab_size, np.int32)
        decoder = self.values.get("decoder") or {}
        glued = decoder.get("prefix") if decoder.get("type") == "WordPiece" else None  # others have a space in front
        byte_level = "ByteLevel" in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]
        for piece, id in self._model.get_vocab(with_added_tokens=True).items():
            if id in self._added:
                counts[id] = 0 if self._added[id].special else len(piece.encode())
            elif byte_level:
                counts[id] = len(piece)  # a character a byte
            elif glued:
                counts[id] = len(piece.removeprefix(glued).encode()) + (not piece.startswith(glued))
            else:
                is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                counts[id] = 1 if is_byte else len(piece.replace(SPACE, " ").encode())
        return counts
