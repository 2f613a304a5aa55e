"""What a stage trains of a model: all of it, or low-rank adapters and new heads beside a frozen base.

The base lies in the compute type, in which its products are taken anyway. It is no part of the state: every batch
carries it under "base" (the same arrays, never donated), the optimizer and the checkpoints know the adapters alone, and
a checkpoint goes on with a base of the same hash only (`train/loop.run_identity`). `Tuned` without a LoRAConfig is the
model itself, so that a stage is written once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.adapters import weights
from jaxlm.adapters.quantising import Quantising, is_quantised
from jaxlm.base import precision
from jaxlm.base.arrays import Array
from jaxlm.model import lora as adapters
from jaxlm.model.attention import chosen
from jaxlm.model.config import LoRAConfig, ModelConfig, adapted
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.state import Program, make_program, with_shardings


class Tuned:
    """A model as a stage trains it."""

    config: ModelConfig
    """the shape, with adapters where there are some"""
    definition: Definition
    """of the whole model as it is trained, keys of dropout among its weights"""
    measured: Definition
    """of the whole model without dropout"""
    trained: Definition
    """of what changes: the state's parameters"""
    frozen: Definition
    """of the rest"""
    reference: Definition
    """of the model without adapters, whose parameters the base is, heads aside"""

    def __init__(
        self,
        lora: LoRAConfig | None,
        shape: ModelConfig,
        model: ModelDirectory,
        mesh: Mesh,
        seed: int,
        first: Callable[[Definition, Any], Params] | None = None,
    ):
        """`shape`: the model's, with what the stage adds to it; heads that the model has not are always trained.
        `first`: (definition, shardings) → first parameters, where they are not all the model's."""
        self.lora, self.model, self.mesh, self.seed = lora, Quantising.of(model), mesh, seed
        self._first = first or model.load_params
        self.config, frozen, kind = shape, shape, jnp.dtype(jnp.float32)
        self._plain = define_model(shape)
        if lora is not None:
            weights.require_targets(self._plain, lora)
            self.config, kind = adapted(shape, dataclasses.replace(lora, dropout=0.0)), precision.dtype(shape.compute)
            frozen = adapted(shape, lora, adapters=False)
        self.measured = define_model(self.config, kind)
        self.definition = define_model(adapted(shape, lora), kind) if lora is not None else self.measured
        self.trained = adapters.trained(self.measured)
        self.reference = define_model(frozen, kind)
        self.frozen = self.reference.part(lambda w: lora is not None and not _is_head(w))

    @functools.cached_property
    def _base(self) -> Params:
        return self._read(self.frozen)

    def _read(self, part: Definition) -> Params:
        """These weights alone, of the model."""
        stored = define_model(dataclasses.replace(self.model.config, scan_layers=self.config.scan_layers))
        return self.model.load_params(stored, part.shardings(self.mesh), part=part)

    def base(self) -> dict[str, Params]:
        """What every batch takes: {"base": the frozen weights}, read from the model once; {} where all train."""
        return {"base": self._base} if self.lora is not None else {}

    def abstract(self) -> dict[str, Any]:
        """Shapes and places of `base`, without reading it."""
        if self.lora is None:
            return {}
        return {"base": with_shardings(self.frozen.abstract(), self.frozen.shardings(self.mesh))}

    def start(self, placed: Any) -> Params:
        """The first parameters of the state, on these shardings."""
        if self.lora is None:
            return self._first(self.measured, placed)
        params = weights.begin(self.measured, self._base, self.seed, placed)
        return params | (self._read(self.trained.part(_is_head)) if self.model.config.criteria else {})

    def merged(self, params: Params) -> Params:
        """The plain model, float32, of a state's parameters: W + scale · A B in place of each adapted matrix, W as the
        run had it where it is quantised."""
        if self.lora is None:
            return params
        shardings = self._plain.shardings(self.mesh)
        base = self._read(self._plain.part(lambda w: not _is_head(w)))
        if self.lora.base != "compute":
            base = adapters.joined(base, adapters.part_of(self.frozen.part(is_quantised), self._base))
        make = functools.partial(weights.merged, config=self.lora)
        return jax.jit(make, out_shardings=shardings)(adapters.joined(base, params))


def tune(
    config: Any,
    mesh: Mesh,
    model: ModelDirectory,
    scan_layers: bool,
    shape: ModelConfig | None = None,
    first: Callable[[Definition, Any], Params] | None = None,
) -> Tuned:
    """The model as a stage of this config trains it, its attention chosen for the mesh and the rows; `shape` and
    `first` as `Tuned` has them."""
    shape = dataclasses.replace(shape or model.config, scan_layers=scan_layers)
    fitting = chosen(shape, mesh.devices.flat[0].platform, config.row_length)
    return Tuned(config.lora, fitting, model, mesh, config.seed, first)


def program_of(
    config: Any,
    step: Callable[..., Any],
    tuned: Tuned,
    batch: dict[str, Any],
    base: Callable[[], dict[str, Params]] = dict,
    **more: Any,
) -> Program:
    """The compiled-once step, pinned shardings, of a stage that trains `tuned`, whose weights are read later. `batch`:
    its abstract arrays beside the base; `base`: what else is the same in every batch; `more`: the step's own."""
    optimizer = make_optimizer(config.optimizer, tuned.trained)
    step = functools.partial(step, config=config, definition=tuned.definition, optimizer=optimizer, **more)
    given: Any = dict(rule=config.optimizer, start=tuned.start, base=lambda: tuned.base() | base())
    return make_program(step, tuned.trained, optimizer, batch | tuned.abstract(), tuned.mesh, **given)


def first_adapters(
    seed: int, frozen: Callable[[], dict[str, Params]], definition: Definition, name: str, placed: Any
) -> Params:
    """The first adapters over the frozen weights of that name, or where there are none, over the "reference"."""
    under = frozen()
    return weights.begin(definition, under.get(name, under["reference"]), seed, placed)


def _is_head(declared: Weight) -> bool:
    return declared.name in ("score", "score_bias")


def separated(batch: dict[str, Any], pieces: int) -> tuple[Params, dict[str, Any]]:
    """(the frozen base, {} without one; the batch itself, each row with the number of the piece it will be in)."""
    rows = {name: x for name, x in batch.items() if name != "base"}
    if "base" in batch:
        rows["piece"] = jnp.arange(batch["ids"].shape[0], dtype=jnp.uint32) % pieces
    return batch.get("base", {}), rows


def whole(definition: Definition, base: Params, params: Params, seed: int, step: Array, rows: dict[str, Any]) -> Params:
    """The parameters of the whole model as a piece of a step sees them, keys of dropout among them."""
    if not base:
        return params
    keys = weights.dropout_keys(definition, seed, step, rows["piece"][0])
    return adapters.joined(adapters.joined(base, params), keys)


def with_base(
    batches: Callable[..., Iterator[dict[str, Any]]], base: dict[str, Params]
) -> Callable[..., Iterator[dict[str, Any]]]:
    """The same batches, each with the base."""
    return lambda *position: (batch | base for batch in batches(*position))
