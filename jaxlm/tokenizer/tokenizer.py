"""What a tokenizer is to the rest of jaxlm, and how one is loaded and saved.

>>> tokenizer = load("runs/demo/tokenizer")
>>> tokenizer.decode(tokenizer.encode("any text"))
'any text'
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int32

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.hugging_face import HuggingFaceTokenizer
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer


@runtime_checkable
class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int | None
    """None where the model was made without one."""
    eos_id: int
    pad_id: int
    special_ids: dict[str, int]
    """Name → id of the tokens that stand for no text: <pad>, </s>, <|im_start|>, ..."""
    file_name: str
    """The one file that it is saved as: tokenizer.model or byte_tokenizer.json."""
    content: bytes
    """That file's content."""
    hash: str
    """The content's sha256: what rows, checkpoints and models compare."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never a special one: a text that says "<|im_start|>" becomes ordinary tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out; bytes that are not UTF-8 become U+FFFD."""
        ...

    def piece(self, id: int) -> str:
        """A token as a reader should see it."""
        ...

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """UTF-8 bytes that each token stands for, 0 for special ones.

        Their sum over `encode(text)` is `len(text.encode())`, to the byte, so that bits per byte is exact. Only an
        existing sentencepiece model that rewrites its text has another sum: see `SentencePieceTokenizer`.
        """
        ...


KINDS = {kind.file_name: kind for kind in (SentencePieceTokenizer, ByteTokenizer, HuggingFaceTokenizer)}


def load(path: epath.PathLike) -> Tokenizer:
    """The tokenizer of a tokenizer stage's folder, of a model directory, or of a single .model file.

    Raises UserError for a path without one, and for a file that is damaged or differs from its folder's manifest.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a tokenizer is needed")
    if not path.is_dir():
        kind = KINDS.get(path.name, SentencePieceTokenizer)
        return kind.from_bytes(path.read_bytes(), str(path))
    found = [name for name in KINDS if (path / name).exists()]
    if len(found) != 1:
        held = " and ".join(found) or "neither"
        raise UserError(f"{path}: holds {held}; exactly one of {' or '.join(KINDS)} is needed")
    name = found[0]
    tokenizer = KINDS[name].from_bytes((path / name).read_bytes(), str(path / name))
    if (path / "manifest.json").exists():
        listed = files.read_json(path / "manifest.json").get("files", {}).get(name, {}).get("sha256", tokenizer.hash)
        if listed != tokenizer.hash:
            raise UserError(f"{path / name}: differs from the sha256 in manifest.json; it is damaged or was edited")
    return tokenizer


def save(tokenizer: Tokenizer, folder: epath.PathLike) -> str:
    """Writes the tokenizer's file into `folder`; returns the file's name."""
    files.write_bytes(epath.Path(folder) / tokenizer.file_name, tokenizer.content)
    return tokenizer.file_name
