"""What a teacher says of packed rows, computed once and kept: its likeliest tokens at each position.

    FOLDER/<hash of the rows>/train/teacher.arrayrecord    a record a row, in the rows' order
                              manifest.json                the rows', the teacher's and the file's hashes

A record is k ids a position, then float32 log-probabilities of these and, last, of all other tokens together, at the
temperature that they were made for: k = 64 takes 390 bytes a token in a vocabulary of up to 65,536, uncompressed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlm.base import files, manifest, precision, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.logging import logger, progress
from jaxlm.data.loader import RowSource, heldout_batches
from jaxlm.data.rows import RowReader, RowWriter
from jaxlm.distill.config import DistillConfig
from jaxlm.distill.losses import truncated
from jaxlm.model.attention import chosen
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import apply
from jaxlm.train.processes import from_first

KIND = "teacher"
NAME = "train/teacher.arrayrecord"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is stored of a teacher."""

    top_k: int
    temperature: float = 1.0


def store(
    folder: epath.PathLike,
    rows: epath.PathLike,
    teacher: Any,
    teacher_hash: str,
    asked: Asked,
    mesh: Mesh,
    *,
    batch_rows: int,
    chunk_tokens: int = 0,
) -> epath.Path:
    """Runs a teacher (a model's directory) over all train rows of a folder; all processes call it together.

    Raises UserError for rows of another tokenizer than the teacher's.
    """
    source = RowSource(rows, "train")
    if source.tokenizer_hash != teacher.tokenizer().hash:
        raise UserError(
            f"{rows}: was packed with another tokenizer ({source.tokenizer_hash[:12]}) than the teacher's "
            f"({teacher.tokenizer().hash[:12]}): its probabilities would be of other tokens"
        )
    vocab_size = teacher.config.vocab_size
    if not 1 <= asked.top_k < vocab_size:
        raise UserError(f"top_k: got {asked.top_k}; 1 to {vocab_size - 1} of {vocab_size} tokens are needed")
    shape = chosen(teacher.config, mesh.devices.flat[0].platform, source.row_length)
    definition = define_model(shape, precision.dtype(shape.compute))
    params = teacher.load_params(definition, definition.shardings(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def said(params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = apply(definition, params, lambda m: m(rows["ids"], rows["segment_ids"], rows["positions"])[0])
        make = lambda hidden: truncated(
            apply(definition, params, lambda m: m.logits(hidden)) / asked.temperature, asked.top_k
        )
        flat = hidden.reshape(-1, hidden.shape[-1])
        if chunk_tokens and flat.shape[0] > chunk_tokens:
            each = jax.lax.map(make, flat.reshape(-1, chunk_tokens, flat.shape[-1]))
        else:
            each = make(flat)
        return jax.tree.map(lambda x: x.reshape(*rows["ids"].shape, x.shape[-1]), each)

    kept = epath.Path(folder) / source.manifest.hash[:16]
    from_first(lambda: files.clear(kept, ("manifest.json", NAME)))
    writer: Any = RowWriter(kept / NAME) if jax.process_index() == 0 else None
    with jax.set_mesh(mesh), progress("teacher", len(source)) as bar:
        own = sharding.own_rows(mesh, batch_rows)
        for batch, real in heldout_batches(source, batch_rows, own=own):
            ids, logprobs = jax.device_get(said(params, sharding.global_batch(mesh, batch, batch_rows)))
            if not np.isfinite(logprobs[:real, :, :-1]).all():
                raise UserError(f"{rows}: the teacher gives a token a log-probability that is not finite")
            for row in range(real) if writer else ():
                writer.write(encode(ids[row], logprobs[row], vocab_size))
            bar.advance(real)
    facts = dataclasses.asdict(asked) | {"vocab_size": vocab_size, "row_length": source.row_length, "rows": len(source)}
    facts |= {"tokenizer_hash": source.tokenizer_hash}
    read_from = {"rows": source.manifest.hash, "teacher": teacher_hash}

    def finish() -> None:
        writer.close()
        manifest.write(kept, KIND, contents=[NAME], inputs=read_from, config={}, facts=facts)

    from_first(finish)
    logger.info("%s: the %d likeliest tokens of %d rows", kept, asked.top_k, len(source))
    return kept


def encode(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> bytes:
    """A row's ids [S, k] and log-probabilities [S, k + 1] as a record."""
    return ids.astype("<u2" if vocab_size <= 2**16 else "<u4").tobytes() + logprobs.astype("<f4").tobytes()


class StoredTeacher:
    """What was stored in a folder: one or more sets of rows, of one teacher."""

    def __init__(self, config: DistillConfig):
        """Raises UserError for a folder that holds nothing of the kind, or not what the config says."""
        self.folder = epath.Path(config.stored)
        found = self.folder.iterdir() if self.folder.exists() else ()
        self._kept = {path.name: path for path in sorted(found) if (path / "manifest.json").exists()}
        manifests = {name: manifest.read(path, KIND) for name, path in self._kept.items()}
        if not manifests:
            raise UserError(f"distill.stored: {self.folder} holds nothing; run tools/store_teacher.py")
        facts = [known.facts for known in manifests.values()]
        teachers = {known.inputs["teacher"] for known in manifests.values()}
        alike = ("top_k", "temperature", "vocab_size", "row_length", "tokenizer_hash")
        if len(teachers) > 1 or any(f[name] != facts[0][name] for f in facts for name in alike):
            raise UserError(f"distill.stored: {self.folder} holds several teachers' rows; give each its own folder")
        self.top_k: int = facts[0]["top_k"]
        self.vocab_size: int = facts[0]["vocab_size"]
        self.row_length: int = facts[0]["row_length"]
        self.tokenizer_hash: str = facts[0]["tokenizer_hash"]
        if config.temperature != facts[0]["temperature"]:
            made = facts[0]["temperature"]
            raise ConfigError("distill.temperature", f"is {config.temperature}; what is stored was made for {made}")
        if config.top_k not in (0, self.top_k):
            raise ConfigError("distill.top_k", f"is {config.top_k}; {self.top_k} are stored. Leave it at 0")
        self.hash = files.hash_json({name: known.hash for name, known in manifests.items()})

    def of(self, source: RowSource) -> "StoredRows":
        """What is stored of a source's rows, its file checked. Raises UserError where there is nothing."""
        kept = self._kept.get(source.manifest.hash[:16])
        if kept is None:
            raise UserError(f"distill.stored: {self.folder} has nothing of {source.folder}; run tools/store_teacher.py")
        known = manifest.read(kept, KIND)
        from_first(lambda: manifest.verify(kept, known))
        if known.inputs["rows"] != source.manifest.hash or known.facts["rows"] != len(source):
            raise UserError(f"distill.stored: {kept} is of other rows than {source.folder}; store them again")
        return StoredRows(RowReader([kept / NAME]), self)

    def stacked(self, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a batch of these rows."""
        ids, logprobs = zip(*found, strict=True)
        return {"teacher_ids": np.stack(ids), "teacher_logprobs": np.stack(logprobs)}


class StoredRows:
    """Of one set of rows, by the row's number: (ids int32 [S, k], log-probabilities float32 [S, k + 1])."""

    def __init__(self, reader: RowReader, teacher: StoredTeacher):
        self._reader, self._teacher = reader, teacher

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        S, k = self._teacher.row_length, self._teacher.top_k
        kind = np.dtype("<u2" if self._teacher.vocab_size <= 2**16 else "<u4")
        record, cut = self._reader[row], S * k * kind.itemsize
        if len(record) != cut + S * (k + 1) * 4:
            raise UserError(f"{self._teacher.folder}: row {row} has {len(record)} bytes; store the rows again")
        ids = np.frombuffer(record, kind, S * k).reshape(S, k).astype(np.int32)
        return ids, np.frombuffer(record, "<f4", offset=cut).reshape(S, k + 1).astype(np.float32)
