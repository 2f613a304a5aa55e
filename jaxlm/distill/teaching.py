"""What a stage trains on: the data's tokens alone, a teacher that reads the same rows, or what was stored of one.

Each says what a batch has besides its rows, and what a piece of it costs, so that a stage is written once. A teacher's
weights lie on the mesh as its declaration says, in its compute type, under "teacher" in every batch: the same arrays,
never donated. They are no part of the state, so that the optimizer and the checkpoints do not know them; a checkpoint
goes on with a teacher of the same hash only, which is among the run's inputs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.base import precision, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.metrics import Mean
from jaxlm.data.loader import Loader
from jaxlm.data.mixture import History
from jaxlm.distill import losses as divergences
from jaxlm.distill.config import DistillConfig
from jaxlm.distill.stored import StoredTeacher
from jaxlm.model.attention import chosen
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params
from jaxlm.train import losses
from jaxlm.train.loop import global_batches
from jaxlm.train.losses import TokenSums
from jaxlm.train.state import with_shardings

Batch = dict[str, Any]


class CrossEntropy:
    """Of the data's tokens."""

    def abstract(self, rows: int) -> Batch:
        """What a batch of so many rows has besides them, without reading it."""
        return {}

    def base(self) -> Batch:
        """That part of it which is the same in all batches."""
        return {}

    def batches(self, loader: Loader, mesh: Mesh) -> Callable[[int, History], Iterator[Batch]]:
        """The batches, as a `Task` wants them; `base` is still to be added."""
        return global_batches(loader, mesh)

    def separated(self, batch: Batch) -> tuple[Params, Batch]:
        """(what is the same in all pieces of a batch, what is cut into pieces)."""
        return {}, batch

    def row_sums(
        self, params: Params, rows: Batch, teacher: Params, definition: Definition, chunk_tokens: int
    ) -> TokenSums:
        return losses.row_sums(params, rows, definition, chunk_tokens)

    def total(self, sums: TokenSums) -> jax.Array:
        """What falls, summed over the targets."""
        return sums.loss

    def metrics(self, sums: TokenSums) -> dict[str, Mean]:
        return losses.as_metrics(sums)


class _Distilled(CrossEntropy):
    def __init__(self, config: DistillConfig):
        self.config = config

    def total(self, sums: TokenSums) -> jax.Array:
        assert sums.divergence is not None
        share = self.config.weight
        return share * self.config.temperature**2 * sums.divergence + (1 - share) * sums.loss

    def metrics(self, sums: TokenSums) -> dict[str, Mean]:
        assert sums.divergence is not None
        return losses.as_metrics(sums) | {"train/divergence": Mean(sums.divergence, sums.targets)}


class LiveTeacher(_Distilled):
    """A teacher that reads every batch."""

    def __init__(self, config: DistillConfig, directory: Any, mesh: Mesh, row_length: int):
        """`directory`: a model's, which has config, folder, tokenizer() and load_params()."""
        super().__init__(config)
        shape = chosen(directory.config, mesh.devices.flat[0].platform, row_length)
        if shape.criteria:
            raise ConfigError("distill.teacher", f"{config.teacher} is a reward model; a language model is needed")
        if shape.learned_positions and shape.learned_positions < row_length:
            raise ConfigError(
                "distill.teacher", f"{config.teacher} has {shape.learned_positions} positions, rows {row_length} tokens"
            )
        self.directory, self.mesh = directory, mesh
        self.definition = define_model(shape, precision.dtype(shape.compute))

    @functools.cached_property
    def _params(self) -> Params:
        return self.directory.load_params(self.definition, self.definition.shardings(self.mesh))

    def abstract(self, rows: int) -> Batch:
        return {"teacher": with_shardings(self.definition.abstract(), self.definition.shardings(self.mesh))}

    def base(self) -> Batch:
        return {"teacher": self._params}

    def separated(self, batch: Batch) -> tuple[Params, Batch]:
        return batch["teacher"], {name: x for name, x in batch.items() if name != "teacher"}

    def row_sums(
        self, params: Params, rows: Batch, teacher: Params, definition: Definition, chunk_tokens: int
    ) -> TokenSums:
        of: Any = dict(config=self.config, definition=definition, teacher_definition=self.definition)
        return divergences.live_sums(params, rows, teacher, chunk_tokens=chunk_tokens, **of)


class FromStorage(_Distilled):
    """What was stored of a teacher, row by row."""

    def __init__(self, config: DistillConfig, stored: StoredTeacher, mesh: Mesh, row_length: int):
        super().__init__(config)
        self.stored, self.mesh, self.row_length = stored, mesh, row_length

    def abstract(self, rows: int) -> Batch:
        placed, shape = sharding.batch_sharding(self.mesh), (rows, self.row_length)
        make = lambda size, kind: jax.ShapeDtypeStruct((*shape, size), kind, sharding=placed)
        k = self.stored.top_k
        return {"teacher_ids": make(k, jnp.int32), "teacher_logprobs": make(k + 1, jnp.float32)}

    def batches(self, loader: Loader, mesh: Mesh) -> Callable[[int, History], Iterator[Batch]]:
        found = [self.stored.of(source) for source in loader.sources]

        def batches(step: int, history: History) -> Iterator[Batch]:
            placed = loader.with_history(history)
            for at, rows in placed.batches(step):
                own = [found[source][row] for source, row in placed.located(at)]
                yield sharding.global_batch(mesh, rows | self.stored.stacked(own), loader.global_batch)

        return batches

    def row_sums(
        self, params: Params, rows: Batch, teacher: Params, definition: Definition, chunk_tokens: int
    ) -> TokenSums:
        of: Any = dict(config=self.config, definition=definition)
        return divergences.stored_sums(params, rows, chunk_tokens=chunk_tokens, **of)


class OpenModel(Protocol):
    def __call__(self, path: str, field: str) -> Any: ...


def objective_of(
    stage: Any, open_model: OpenModel, mesh: Mesh, vocab_size: int, tokenizer_hash: Callable[[], str]
) -> CrossEntropy:
    """The objective of a stage with this config (`distill`, `row_length`) whose model has this vocabulary; a teacher of
    another tokenizer is refused."""
    config, row_length = stage.distill, stage.row_length
    if config is None:
        return CrossEntropy()
    _require_given(config)
    if config.stored:
        stored = StoredTeacher(config)
        _require_same(config.stored, stored.tokenizer_hash, stored.vocab_size, tokenizer_hash(), vocab_size)
        return FromStorage(config, stored, mesh, row_length)
    directory = open_model(config.teacher, "distill.teacher")
    theirs = directory.config.vocab_size
    _require_same(config.teacher, directory.tokenizer().hash, theirs, tokenizer_hash(), vocab_size)
    if config.top_k >= vocab_size:
        raise ConfigError("distill.top_k", f"{config.top_k} is all of the {vocab_size} tokens; 0 takes each by itself")
    return LiveTeacher(config, directory, mesh, row_length)


def _require_given(config: DistillConfig) -> None:
    if not config.teacher and not config.stored:
        raise ConfigError("distill.teacher", "is empty; give a model, or in distill.stored what was stored of one")


def _require_same(teacher: str, theirs: str, size: int, ours: str, vocab_size: int) -> None:
    if theirs != ours:
        raise UserError(
            f"distill: the teacher {teacher} has another tokenizer ({theirs[:12]}) than the rows ({ours[:12]}), so "
            "that its probabilities are of other tokens; pack with the teacher's"
        )
    if size != vocab_size:
        raise ConfigError(
            "model.vocab_size", f"is {vocab_size}, but the teacher {teacher} has {size} rows of logits; give both one"
        )


def inputs(config: DistillConfig | None, hash_of: Callable[[str, str], str]) -> dict[str, str]:
    """What the teacher, or what was stored of it, is among the inputs of a run: path → hash."""
    if config is None:
        return {}
    _require_given(config)
    if config.stored:
        return {config.stored: StoredTeacher(config).hash}
    return {config.teacher: hash_of(config.teacher, "distill.teacher")}
