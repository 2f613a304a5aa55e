"""Held-out figures in the course of training: loss and bits per byte over rows that nothing is trained on."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.base import manifest, metrics, sharding
from jaxlm.base.arrays import Array
from jaxlm.base.metrics import Mean
from jaxlm.data.loader import Change, RowSource, heldout_batches
from jaxlm.data.rows import Row
from jaxlm.model.lora import joined
from jaxlm.model.weights import Definition, Params
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.train import losses
from jaxlm.train.state import Program, TrainState


class HeldoutSet(NamedTuple):
    """Rows to be measured together, as eval/loss and so on, or with a name as eval/NAME_loss."""

    folders: Sequence[str]
    """Pack folders; those without held-out rows count for nothing."""
    name: str = ""


def evaluate_batch(params: Params, batch: Mapping[str, Array], *, definition: Definition, chunk_tokens: int) -> Any:
    """Held-out sums of one batch; its "bytes" are those that each token stands for, int32 `[B, S]`.

    Rows with "targets" of their own have words missing: what those stand for is not the text, and has no bits per byte.
    """
    sums = losses.row_sums(params, batch, definition, chunk_tokens)
    bytes_ = jnp.sum(jnp.where(batch["loss_mask"], batch["bytes"], 0)).astype(jnp.float32)
    found = {"loss": Mean(sums.loss, sums.targets), "accuracy": Mean(sums.correct, sums.targets)}
    return found if "targets" in batch else found | {"bits_per_byte": Mean(sums.loss / math.log(2), bytes_)}


def evaluator(
    program: Program,
    definition: Definition,
    sets: Sequence[HeldoutSet],
    *,
    batch_rows: int,
    limit: int = 0,
    chunk_tokens: int = 0,
    change: Change | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """state → figures of its parameters, and of their average if it has one.

    A batch has `batch_rows` rows; `limit` bounds the batches of a folder, 0: all. `change` is done to every batch; its
    rows are numbered through each folder.
    """
    mesh = program.mesh
    rows = sharding.batch_sharding(mesh)
    names = [name for name in (*Row.__annotations__, "targets") if name in program.shardings.batch]
    placed = dict.fromkeys([*names, "bytes"], rows)
    params_placed = joined(program.shardings.batch.get("base", {}), program.shardings.state.params)
    step = jax.jit(
        functools.partial(evaluate_batch, definition=definition, chunk_tokens=chunk_tokens),
        in_shardings=(params_placed, placed),
        out_shardings=sharding.replicated(mesh),
    )

    def measure(params: Params, heldout: HeldoutSet) -> dict[str, float]:
        total: Any = None
        for batch in _batches(heldout.folders, mesh, batch_rows, limit, change):
            found = step(program.whole(params), batch)
            total = metrics.merge(total, found) if total else found
        return metrics.values(total) if total else {}

    def evaluate(state: TrainState) -> dict[str, float]:
        figures = {}
        for heldout in sets:
            prefix = f"eval/{heldout.name}_" if heldout.name else "eval/"
            figures |= {prefix + name: value for name, value in measure(state.params, heldout).items()}
        if state.ema and sets:
            average = measure(state.ema, sets[0])
            figures |= {f"eval/ema_{name}": average[name] for name in ("loss", "bits_per_byte") if name in average}
        return figures

    return evaluate


def _batches(
    folders: Sequence[str], mesh: Mesh, count: int, limit: int, change: Change | None
) -> Iterator[dict[str, jax.Array]]:
    """The global held-out batches of all folders, with the bytes that each token stands for."""
    own = sharding.own_rows(mesh, count)
    for folder in folders:
        if not has_heldout(folder):
            continue
        token_bytes = tokenizers.load(f"{folder}/tokenizer").token_bytes()
        made = heldout_batches(RowSource(folder, "heldout"), count, own=own, limit=limit or None)
        for number, (batch, _) in enumerate(made):
            changed = change(batch, 0, [number * count + row for row in own]) if change else batch
            yield sharding.global_batch(mesh, changed | {"bytes": token_bytes[batch["ids"]]}, count)


def has_heldout(folder: str) -> bool:
    return "heldout" in manifest.read(folder, "rows").facts
