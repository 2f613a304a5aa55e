"""How documents become rows, and which rows a run trains on."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import StageConfig, check
from jaxlm.text.config import ObjectSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig(StageConfig):
    """From documents and a tokenizer to rows of tokens."""

    stage: ClassVar[str] = "pack"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "documents", "tokenizer")

    documents: str
    """A prepare stage's folder."""
    tokenizer: str
    """A tokenizer stage's folder, a model directory, or a .model file."""
    row_length: int = 1024
    """Tokens a row."""
    add_bos: bool = True
    """Begins each document with <s>; without it, a document's first token is never trained on."""
    add_eos: bool = True
    """Ends each document with </s>."""
    long_documents: Literal["split", "drop"] = "split"
    """What becomes of a document that is longer than a row. No other document is ever cut."""
    window_documents: int = 8192
    """Documents that are sorted by length at a time; more fill rows better and take more memory."""
    rows_per_file: int = 65536
    """Rows an ArrayRecord file."""
    seed: int = 0
    """Seed of the order of the rows."""

    def __post_init__(self):
        check(bool(self.documents), "documents", "is empty; a prepare stage's folder is needed")
        check(bool(self.tokenizer), "tokenizer", "is empty; a tokenizer stage's folder is needed")
        check(self.row_length >= 8, "row_length", f"got {self.row_length}; 8 or more is needed")
        for field in ("window_documents", "rows_per_file"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        check(self.seed >= 0, "seed", f"got {self.seed}; 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSource(ObjectSource):
    """Where some of the chats come from: JSONL, ArrayRecord, Parquet, TFDS or a function of yours; with messages, or
    prompt and completion.

    `split="heldout"` measures; train chats that are equal to a held-out one are dropped.
    """

    general: bool = False
    """Held-out chats of another kind, measured apart (eval/general_loss): what a narrow training forgets."""

    def __post_init__(self):
        super().__post_init__()
        check(not self.general or self.split == "heldout", "general", "is measured only; set split='heldout' too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRowsConfig:
    """How chats become rows."""

    long_chats: Literal["truncate", "drop"] = "truncate"
    """What becomes of a chat that is longer than a row. A cut answer has no stop token: none is made up."""
    max_record_bytes: int = 16 * 2**20
    """A record of more bytes counts as bad."""
    max_bad_share: float = 0.01
    """The stage refuses when more than this share of any source's records is bad."""
    seed: int = 0
    """Seed of the order of the rows."""

    def __post_init__(self):
        check(self.max_record_bytes >= 1, "max_record_bytes", f"got {self.max_record_bytes}; at least 1 is needed")
        check(0 <= self.max_bad_share <= 1, "max_bad_share", f"got {self.max_bad_share}; a share from 0 to 1 is needed")
        check(self.seed >= 0, "seed", f"got {self.seed}; 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """Packed rows and their share of the batches."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("path",)
    changeable_fields: ClassVar[tuple[str, ...]] = ("weight", "exclude")

    path: str
    """A pack stage's folder."""
    weight: float = 1.0
    """Rows drawn from here, in proportion to the other sources' weights; 0 leaves it out. A stopped run goes on with
    another weight from the step that it has reached."""
    name: str = ""
    """Name by which overrides reach it, such as --config.data.NAME.weight."""
    exclude: tuple[str, ...] = ()
    """Rows and documents to leave out, such as row:12 or document:345, as a bad step's blackbox/STEP/record.json names
    them: they become padding in their place, all else stays where it is. A stopped run goes on with others."""

    def __post_init__(self):
        check(bool(self.path), "path", "is empty; a pack stage's folder is needed")
        check_exclude(self.exclude)
        check(0 <= self.weight < math.inf, "weight", f"got {self.weight}; a number of 0 or more is needed")


def check_exclude(exclude: tuple[str, ...]) -> None:
    """Refuses what names neither a row nor a document."""
    parts = [(out, *out.partition(":")[::2]) for out in exclude]
    wrong = [out for out, kind, number in parts if kind not in ("row", "document") or not number.isdecimal()]
    check(not wrong, "exclude", f"got {', '.join(wrong)}; row:NUMBER or document:NUMBER is needed")
