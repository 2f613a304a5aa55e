"""Which tokenizer, and how it is trained."""

import dataclasses
from typing import ClassVar, Literal

from jaxlm.base.config import StageConfig, check

BASIC_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(StageConfig):
    """From documents to a vocabulary."""

    stage: ClassVar[str] = "tokenizer"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "documents", "path")

    documents: str
    """A prepare stage's folder: it is trained on the train documents, and measured on both splits."""
    kind: Literal["sentencepiece", "byte", "existing"] = "sentencepiece"
    """sentencepiece trains one; byte has a token a byte; existing takes what stands at path."""
    path: str = ""
    """existing only: a .model file of sentencepiece, or a folder that holds tokenizer.model or byte_tokenizer.json."""
    vocab_size: int | None = None
    """sentencepiece only: number of tokens, special ones, 256 bytes and single characters included."""
    algorithm: Literal["bpe", "unigram"] = "bpe"
    """sentencepiece only: BPE trains ten times as fast, unigram needs a few percent fewer tokens."""
    special_tokens: tuple[str, ...] = CHAT_TOKENS
    """Tokens that no text turns into, after <pad> <s> </s> <unk>; the chat template needs the two of the default."""
    reserved_tokens: int = 14
    """How many <|reserved_0|>, <|reserved_1|>, ... are set aside for later use."""
    sample_bytes: int = 100 * 2**20
    """Bytes of train documents, chosen by the seed, to train on; and of each split to measure on."""
    seed: int = 0
    """Seed of the choice of the sample."""

    def __post_init__(self):
        check(bool(self.documents), "documents", "is empty; a prepare stage's folder is needed")
        if self.kind == "sentencepiece":
            check(self.vocab_size is not None, "vocab_size", "is not set; sentencepiece needs one, such as 8192")
        else:
            check(self.vocab_size is None, "vocab_size", f"got {self.vocab_size}; kind={self.kind} has its own")
        if self.kind == "existing":
            check(bool(self.path), "path", "is empty; kind=existing needs the path of a tokenizer")
        else:
            check(not self.path, "path", f"got {self.path!r}; only kind=existing reads a path")
        check(self.reserved_tokens >= 0, "reserved_tokens", f"got {self.reserved_tokens}; 0 or more is needed")
        check(self.sample_bytes >= 1, "sample_bytes", f"got {self.sample_bytes}; 1 or more is needed")
        check(self.seed >= 0, "seed", f"got {self.seed}; 0 or more is needed")
        names = [*BASIC_TOKENS, *self.added_tokens]
        for name in self.special_tokens:
            check(bool(name.strip()), "special_tokens", f"got {name!r}; names that are not blank are needed")
            check(names.count(name) == 1, "special_tokens", f"got {name!r} twice, or it is one of the built-in names")
        fixed = 256 + len(names)
        check(
            self.vocab_size is None or self.vocab_size > fixed,
            "vocab_size",
            f"got {self.vocab_size}; {fixed} are taken by bytes and special tokens, so more is needed",
        )

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The special tokens after the basic four, in the order of their ids."""
        return (*self.special_tokens, *(f"<|reserved_{i}|>" for i in range(self.reserved_tokens)))
