"""A token a byte: ids 0 to 255 are the bytes of UTF-8, special tokens follow."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxlm.base.errors import UserError


class ByteTokenizer:
    """
    >>> ByteTokenizer(("<pad>", "<s>", "</s>")).encode("é!")
    [195, 169, 33]
    """

    file_name = "byte_tokenizer.json"

    def __init__(self, special_tokens: Sequence[str]):
        """`special_tokens` hold at least <pad>, <s> and </s>."""
        self.special_ids = {name: 256 + number for number, name in enumerate(special_tokens)}
        self.vocab_size = 256 + len(self.special_ids)
        self.pad_id = self.special_ids["<pad>"]
        self.bos_id: int | None = self.special_ids["<s>"]
        self.eos_id = self.special_ids["</s>"]
        self.content = json.dumps({"kind": "byte", "special_tokens": [*special_tokens]}).encode() + b"\n"
        self.hash = hashlib.sha256(self.content).hexdigest()
        self._names = {number: name for name, number in self.special_ids.items()}

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "ByteTokenizer":
        try:
            values = json.loads(content)
            if values["kind"] != "byte":
                raise ValueError(f"its kind is {values['kind']!r}")
            return cls(values["special_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: is not a byte tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        self._check(ids)
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def piece(self, id: int) -> str:
        self._check([id])
        if id >= 256:
            return self._names[id]
        return chr(id) if 32 <= id < 127 else f"<0x{id:02X}>"

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def _check(self, ids: Sequence[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token {i} is not in the vocabulary of {self.vocab_size}")
