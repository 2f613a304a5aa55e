"""What `prepare` reads, and which documents it keeps."""

import dataclasses
import zlib
from typing import ClassVar, Literal

from jaxlm.base.config import StageConfig, check

Format = Literal["auto", "jsonl", "text", "markdown", "parquet", "array_record", "tfds", "python"]
Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where some of the records come from."""

    name: str
    """Stands in the report, and at the start of a document's id."""
    path: str = ""
    """A file, a glob or a folder, local or remote; for tfds the dataset, such as wikipedia/20230601.en; for python your
    own function, package.module:function."""
    format: Format = "auto"
    """auto goes by each file's ending: .jsonl[.gz|.zst] .txt .md .parquet .array_record (of JSON objects).
    python calls function(modules, split), which yields objects, the same ones each time; of documents {"text"}, and
    "source" and "where" if it likes."""
    split: Split = "train"
    """heldout is kept out of training: train documents that overlap with it are dropped."""
    heldout_share: float = 0.0
    """split train only: this share of its records, drawn by their place (rankings: by their prompt), is held out all
    the same, and is what evaluate reads of them."""
    language: str = ""
    """Language of its records, such as en: evaluate shows figures by language."""
    modules: tuple[str, ...] = ()
    """python only: what the function is given, names of modules such as json and numpy.linalg."""
    tfds_split: str = "train"
    """tfds only: the dataset's own split, slices allowed, such as train[:10%]."""
    tfds_folder: str = ""
    """tfds only: folder of prepared datasets; TFDS's own default when empty."""

    def __post_init__(self):
        check(bool(self.name) and "/" not in self.name, "name", f"got {self.name!r}; a name without / is needed")
        check(0 <= self.heldout_share < 1, "heldout_share", f"got {self.heldout_share}; from 0 to below 1 is needed")
        check(not self.heldout_share or self.split == "train", "heldout_share", "the source is held out as a whole")
        check(bool(self.path), "path", f"is empty; the format {self.format} needs a path")
        if self.format == "python":
            module, _, function = self.path.partition(":")
            check(bool(module and function), "path", f"got {self.path!r}; package.module:function is needed")
        else:
            check(not self.modules, "modules", f"are read by the format python only, not by {self.format}")

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("heldout", "train") if self.heldout_share else (self.split,)

    def split_of(self, key: object) -> Split:
        """The split of the record whose place or prompt `key` is."""
        drawn = zlib.crc32(f"{self.name}:{key}".encode()) < self.heldout_share * 2**32
        return "heldout" if drawn else self.split


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Source):
    """Where some of the documents come from."""

    part_characters: int = 0
    """text and markdown only: a file is cut at blank lines into documents of about so many characters; 0: a file is a
    document."""
    text_field: str = "text"
    """Name of the field or column that holds the text."""

    def __post_init__(self):
        super().__post_init__()
        check(self.part_characters >= 0, "part_characters", f"got {self.part_characters}; 0 (off) or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectSource(Source):
    """Where some of the chats or rankings come from."""

    def __post_init__(self):
        super().__post_init__()
        readable = self.format not in ("text", "markdown")
        check(readable, "format", f"got {self.format!r}; it holds texts: jsonl, parquet, array_record, tfds or python")


def check_sources(sources: tuple[Source, ...]) -> None:
    """Refuses sources none of which trains, and names that stand twice."""
    check(any(source.split == "train" for source in sources), "sources", "none has split='train'; at least one must")
    names = [source.name for source in sources]
    for name in names:
        check(names.count(name) == 1, "sources", f"{names.count(name)} are named {name!r}; names must differ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig(StageConfig):
    """From raw sources to clean shards of documents."""

    stage: ClassVar[str] = "prepare"

    sources: tuple[SourceConfig, ...]
    """What is read; at least one source of the split train."""
    min_characters: int = 50
    """Shorter documents are dropped."""
    max_characters: int = 1_000_000
    """Longer documents are dropped."""
    max_record_bytes: int = 64 * 2**20
    """A line, record or text file of more bytes is not even read into memory; it counts as bad."""
    max_bad_share: float = 0.01
    """The stage refuses when more than this share of any source's records cannot be read as text."""
    ngram_words: int = 13
    """A train document is compared with the held-out ones by runs of this many words; 0 turns it off."""
    max_overlap_share: float = 0.0
    """The largest share of a train document's n-grams that may stand in a held-out document."""
    shard_bytes: int = 64 * 2**20
    """Bytes of text a shard, before compression."""

    def __post_init__(self):
        check_sources(self.sources)
        check(self.min_characters >= 1, "min_characters", f"got {self.min_characters}; at least 1 is needed")
        check(
            self.max_characters >= self.min_characters,
            "max_characters",
            f"got {self.max_characters}; at least min_characters ({self.min_characters}) is needed",
        )
        for field in ("max_record_bytes", "shard_bytes"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; at least 1 is needed")
        for field in ("max_bad_share", "max_overlap_share"):
            check(0 <= getattr(self, field) <= 1, field, f"got {getattr(self, field)}; a share from 0 to 1 is needed")
        check(self.ngram_words >= 0, "ngram_words", f"got {self.ngram_words}; 0 (off) or more is needed")
