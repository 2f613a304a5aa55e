"""How documents become rows, and which rows a run trains on."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import StageConfig, check


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
    """Of the order of the rows."""

    def __post_init__(self):
        check(bool(self.documents), "documents", "is empty; a prepare stage's folder is needed")
        check(bool(self.tokenizer), "tokenizer", "is empty; a tokenizer stage's folder is needed")
        check(self.row_length >= 8, "row_length", f"got {self.row_length}; 8 or more is needed")
        for field in ("window_documents", "rows_per_file"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        check(self.seed >= 0, "seed", f"got {self.seed}; 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """Packed rows and their share of the batches."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("path",)
    changeable_fields: ClassVar[tuple[str, ...]] = ("weight",)

    path: str
    """A pack stage's folder."""
    weight: float = 1.0
    """Rows drawn from here, in proportion to the other sources' weights; 0 leaves it out. A stopped run goes on with
    another weight from the step that it has reached."""
    name: str = ""
    """By which --config.data.NAME.weight reaches it."""

    def __post_init__(self):
        check(bool(self.path), "path", "is empty; a pack stage's folder is needed")
        check(0 <= self.weight < math.inf, "weight", f"got {self.weight}; a number of 0 or more is needed")
