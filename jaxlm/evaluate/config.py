"""What a model is measured on; standard library only."""

import dataclasses
from typing import ClassVar

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.sample.config import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Bits per byte, loss and accuracy of a model on held-out rows and on texts."""

    stage: ClassVar[str] = "evaluate"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "model", "rows", "documents", "batch_rows", "mesh")

    model: str = ""
    """Model directory, or a run's folder with one in it."""
    rows: str = ""
    """A pack stage's folder, whose held-out rows are measured; empty: none."""
    documents: str = ""
    """The prepare stage's folder that the rows were packed from, to compare with `xz -9`; empty: no comparison."""
    texts: tuple[str, ...] = ()
    """Files or globs (text, Markdown, JSONL, Parquet), measured one by one: a text file is one document."""
    text_field: str = "text"
    """Where the text stands in a record of JSONL or Parquet."""
    chats: tuple[ChatSource, ...] = ()
    """Held-out chats: bits per byte of the answers, and what the model answers itself."""
    kinds: tuple[str, ...] = ()
    """Only chats whose "kind" is one of these; empty: all."""
    chat_template: str = ""
    """Empty: the model's own; plain asks a base model in plain text (Q: ... A: ...)."""
    answers: int = 200
    """How many of each source's chats the model answers, the first ones; 0: none."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=64)
    """How these answers are drawn."""
    verifiers: tuple[VerifierConfig, ...] = ()
    """Programs that score these answers."""
    row_length: int = 0
    """Tokens of a row of `texts` and `chats`: longer documents are split; 0: as the model was trained."""
    batch_rows: int = 8
    """Rows measured at the same time; changes speed and memory only."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        check(bool(self.rows or self.texts or self.chats), "rows", "give a pack folder as rows, or texts, or chats")
        check(self.answers >= 0, "answers", f"got {self.answers}; 0 or more is needed")
        check(not self.documents or bool(self.rows), "documents", "go with rows: give the pack folder made from them")
        check(self.batch_rows >= 1, "batch_rows", f"got {self.batch_rows}; 1 or more is needed")
        check(self.row_length == 0 or self.row_length >= 8, "row_length", f"got {self.row_length}; 8 or more is needed")
