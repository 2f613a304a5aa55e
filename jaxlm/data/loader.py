"""Batches of rows: a function of the step, the same rows on any number of hosts.

Source → shuffled by seed, anew each epoch → repeated → mixed by weight → the step's `global_batch` rows, of which each
process takes its own. Nothing is kept between steps, so a run resumes by asking for the next one.
"""

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np
from etils import epath

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import rows
from jaxlm.data.mixture import History, Mixture
from jaxlm.data.prefetch import prefetched
from jaxlm.data.rows import Row
from jaxlm.text.config import Split

Change = Callable[[dict[str, np.ndarray], int, Sequence[int]], dict[str, np.ndarray]]
"""(a batch, its step, its rows' numbers in the global batch) → what is trained on; a function of these alone."""


class RowSource:
    """One split of a pack stage's folder: rows in the order of its files, by random access."""

    def __init__(self, folder: epath.PathLike, split: Split, exclude: Sequence[str] = ()):
        """`exclude`: what reads as padding, "row:12" or "document:345", as `documents` counts them.

        Raises UserError for a folder that holds no rows of this split, or not those that its manifest lists."""
        self.folder = epath.Path(folder)
        self.manifest = manifest.read(folder, "rows")
        facts = self.manifest.facts
        if not facts.get(split, {}).get("rows"):
            raise UserError(f"{folder}: holds no {split} rows; give prepare a source with split={split!r}, pack again")
        self.split = split
        self.row_length: int = facts["row_length"]
        self.pad_id: int = facts["pad_id"]
        self.tokenizer_hash: str = facts["tokenizer_hash"]
        names = sorted(name for name in self.manifest.files if name.startswith(f"{split}/"))
        for name in names:
            # Sizes only: ArrayRecord checks the hash of each record that it reads.
            path, size = self.folder / name, self.manifest.files[name]["bytes"]
            if not path.exists() or path.stat().length != size:
                raise UserError(f"{path}: is missing or is not the {size} bytes that the manifest lists; pack again")
        self._reader = rows.RowReader([self.folder / name for name in names])
        self._excluded = {*exclude}
        if beyond := [o for o in exclude if o.startswith("row:") and int(o.partition(":")[2]) >= len(self)]:
            raise ConfigError("exclude", f"{beyond[0]}: {folder} has the rows 0 to {len(self) - 1}")

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Row:
        pieces = rows.decode(self._reader[index])
        out = [f"row:{index}" in self._excluded or f"document:{p.document}" in self._excluded for p in pieces]
        return rows.expand(pieces, self.row_length, self.pad_id, out if self._excluded else ())

    def documents(self, index: int) -> list[int]:
        """Which documents' pieces a row has: their places among the documents of the split, from 0."""
        return [piece.document for piece in rows.decode(self._reader[index])]


class Loader:
    """
    >>> loader = Loader([("runs/demo/pack", 1.0)], "train", global_batch=16, seed=0)
    >>> loader.batch(step=1000)["ids"].shape
    (16, 1024)
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        split: Split,
        *,
        global_batch: int,
        seed: int,
        own: Sequence[int] | None = None,
        prefetch: int = 2,
        exclude: Sequence[Sequence[str]] = (),
        change: Change | None = None,
    ):
        """`sources` are (pack folder, weight). `own`: which of a global batch's rows to load; None: all. `prefetch`
        counts batches. `exclude`: of each source, what reads as padding. `change`: what is done to every batch.

        Raises ConfigError or UserError for sources that do not fit together.
        """
        if not sources:
            raise ConfigError("data", "is empty; at least one pack folder is needed")
        if global_batch < 1:
            raise ConfigError("batch_rows", f"got {global_batch}; at least 1 is needed")
        excluded = exclude or ((),) * len(sources)
        self.sources = [RowSource(path, split, out) for (path, _), out in zip(sources, excluded, strict=True)]
        for source in self.sources[1:]:
            _require_alike(self.sources[0], source)
        self.row_length = self.sources[0].row_length
        self.tokenizer_hash = self.sources[0].tokenizer_hash
        self.weights = tuple(weight for _, weight in sources)
        self.mixture = Mixture(((0, self.weights),), global_batch)
        self.global_batch, self.prefetch, self.change = global_batch, prefetch, change
        self.own = range(global_batch) if own is None else own
        self._orders = [
            self._order(grain.MapDataset.source(source), seed, number) for number, source in enumerate(self.sources)
        ]
        # The same order of the rows' numbers.
        self._numbers = [
            self._order(grain.MapDataset.range(len(source)), seed, number) for number, source in enumerate(self.sources)
        ]

    def _order(self, source: grain.MapDataset, seed: int, number: int) -> grain.MapDataset:
        return source.shuffle(seed=zlib.crc32(f"{seed}/{number}".encode())).repeat()

    def with_history(self, history: History) -> "Loader":
        """The same with the weights of `history`, instead of the sources' from step 0 on."""
        other = copy.copy(self)
        other.mixture = Mixture(history, self.global_batch)
        if other.mixture.sources != len(self.sources):
            raise ConfigError("history", f"has {other.mixture.sources} weights a step for {len(self.sources)} sources")
        return other

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The own rows of a step, as the arrays of `Row`, each [len(own), row_length]."""
        first = step * self.global_batch
        places = (self.mixture.locate(first + row) for row in self.own)
        made = _stack([cast(Row, self._orders[source][number]) for source, number in places])
        return self.change(made, step, self.own) if self.change else made

    def described(self, step: int, history: History) -> list[dict[str, Any]]:
        """Of each row of the step's whole batch: the source's folder, the row's number in it, and its documents."""
        mixture, found = Mixture(history, self.global_batch), []
        for source, place in map(mixture.locate, range(step * self.global_batch, (step + 1) * self.global_batch)):
            row, of = int(cast(int, self._numbers[source][place])), self.sources[source]
            found.append({"source": str(of.folder), "row": row, "documents": of.documents(row)})
        return found

    def located(self, step: int) -> list[tuple[int, int]]:
        """(which source, the row's number in it) of each of the own rows of a step."""
        places = (self.mixture.locate(step * self.global_batch + row) for row in self.own)
        return [(source, int(cast(int, self._numbers[source][place]))) for source, place in places]

    def batches(self, start_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, batch) from `start_step` on, without end, made ahead in a thread."""
        return prefetched(self.batch, start_step, self.prefetch)

    def epochs(self, step: int) -> list[float]:
        """How often each source has been gone through before `step`."""
        drawn = self.mixture.drawn(step * self.global_batch)
        return [count / len(source) for count, source in zip(drawn, self.sources, strict=True)]


def heldout_batches(
    source: RowSource, global_batch: int, *, own: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(the own rows of a batch, the number of real rows in the whole batch): all rows once, in order.

    The last batch is filled up with rows of padding, which count for nothing, so that all have one shape. `limit`
    bounds the number of batches; packed rows lie in random order, so the first ones are a fair sample.
    """
    if global_batch < 1:
        raise ConfigError("batch_rows", f"got {global_batch}; at least 1 is needed")
    padding = rows.expand([], source.row_length, source.pad_id)
    count = math.ceil(len(source) / global_batch)
    for number in range(count if limit is None else min(count, limit)):
        first = number * global_batch
        indices = [first + row for row in (range(global_batch) if own is None else own)]
        batch = _stack([source[index] if index < len(source) else padding for index in indices])
        yield batch, min(global_batch, len(source) - first)


def _stack(made: Sequence[Row]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in made]) for name in Row.__annotations__}


def _require_alike(first: RowSource, other: RowSource) -> None:
    if other.row_length != first.row_length:
        raise UserError(
            f"{other.folder}: has rows of {other.row_length} tokens, {first.folder} has rows of {first.row_length}; "
            "pack both with one row_length"
        )
    if other.tokenizer_hash != first.tokenizer_hash:
        raise UserError(
            f"{other.folder}: was packed with another tokenizer ({other.tokenizer_hash[:12]}) than {first.folder} "
            f"({first.tokenizer_hash[:12]}); pack both with one tokenizer"
        )
