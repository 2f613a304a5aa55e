"""The reference's log-probabilities: computed once before training, kept on disk, read by whoever asks the same.

    FOLDER/<hash>/logprobs.npy      float32 [answers], those of answers to other prompts behind them
                  manifest.json     with the file's sha256

The hash names the model's content, the token ids with what counts in them, and the rows they are computed in: another
row length or batch rounds differently. A file that is not what its manifest says is refused, never trained with.
"""

import functools
import hashlib
import io
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlm.base import files, manifest, sharding
from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger, progress
from jaxlm.model.weights import Definition, Params
from jaxlm.preference.batches import PreferenceBatches, Reference
from jaxlm.preference.rewards import placed_batch
from jaxlm.preference.scoring import answer_logprobs
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first

KIND = "reference"
NAME = "logprobs.npy"


def reference_logprobs(
    folder: str,
    batches: PreferenceBatches,
    model: ModelDirectory,
    definition: Definition,
    mesh: Mesh,
    chunk_tokens: int = 0,
    alive: Callable[[], None] = lambda: None,
    params: Callable[[], Params] | None = None,
) -> Reference:
    """Read from `folder`, or computed with the model's weights and kept there; all processes call it together.

    `batches`, in one piece: each answer is scored in rows like those trained on, by the forward pass that learns.
    `alive` is called before each of them, of which there can be hours. `params`: () → the weights, where somebody has
    them.
    """
    asked = identity(batches, model)
    if lie := sorted({str(w.dtype) for _, w in definition if w.dtype in (np.int8, np.uint8)}):
        asked["quantised"] = lie[0]
    kept = epath.Path(folder) / files.hash_json(asked)[:16]
    if from_first(lambda: (kept / "manifest.json").exists()):
        from_first(lambda: manifest.verify(kept, _known(kept, asked)))
        logger.info("the reference's log-probabilities are in %s", kept)
        return _split(np.load(io.BytesIO((kept / NAME).read_bytes())), batches)
    given = params() if params else model.load_params(definition, definition.shardings(mesh))
    values = _computed(batches, model, given, definition, mesh, chunk_tokens, alive)
    from_first(lambda: _keep(kept, values, asked))
    return _split(values, batches)


def identity(batches: PreferenceBatches, model: ModelDirectory) -> dict[str, str]:
    """What the numbers depend on, each as a hash or a number."""
    digest = hashlib.sha256()
    for number, prompt in enumerate(batches.prompts):
        placed = [(prompt.answers, prompt.targets), *batches.others[number : number + 1]]
        for ids, targets in placed:
            for answer in range(len(ids)):
                digest.update(np.array([len(ids[answer])], np.int32).tobytes())
                digest.update(np.asarray(ids[answer], np.int32).tobytes() + np.asarray(targets[answer]).tobytes())
    rows = f"{batches.shape.rows} of {batches.shape.row_length}"
    return {"model": model.manifest.hash, "answers": digest.hexdigest(), "rows": rows}


def _known(kept: epath.Path, asked: dict[str, str]) -> manifest.Manifest:
    known = manifest.read(kept, KIND)
    if known.config != asked:
        raise UserError(f"{kept}: is of {known.config}, not of {asked}; delete this folder")
    return known


def _keep(kept: epath.Path, values: np.ndarray, asked: dict[str, str]) -> None:
    content = io.BytesIO()
    np.save(content, values)
    files.write_bytes(kept / NAME, content.getvalue())
    manifest.write(kept, KIND, contents=[NAME], inputs={}, config=asked, facts={"answers": len(values)})


def _split(values: np.ndarray, batches: PreferenceBatches) -> Reference:
    return Reference(*np.split(values, [int(batches.first[-1])]))


def _computed(
    batches: PreferenceBatches,
    model: ModelDirectory,
    params: Params,
    definition: Definition,
    mesh: Mesh,
    chunk_tokens: int,
    alive: Callable[[], None],
) -> np.ndarray:
    """float32: the answers' log-probabilities, then those of the answers to other prompts; NaN for those in no pair."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def score(params: Params, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logprobs = answer_logprobs(params, rows, definition, chunk_tokens)
        return logprobs[rows["better"]], logprobs[rows["worse"]]

    answers = int(batches.first[-1])
    values = np.full(answers * (2 if batches.others else 1), np.nan, np.float32)
    kinds = {0: ("ids", "loss_mask")} | ({answers: ("other_ids", "other_mask")} if batches.others else {})
    with jax.set_mesh(mesh), progress("reference", len(batches.prompts)) as bar:
        for batch in batches.heldout():
            alive()
            real = batch["weight"] > 0
            for first, (ids, mask) in kinds.items():
                rows = {"ids": batch[ids], "loss_mask": batch[mask]}
                rows |= {name: batch[name] for name in ("segment_ids", "positions", "better", "worse")}
                placed = placed_batch(mesh, rows, batches.shape.rows)
                found = jax.device_get(score(params, placed))
                for side, logprobs in zip(("better", "worse"), found, strict=True):
                    if not np.isfinite(logprobs[real]).all():
                        raise UserError(f"model: {model.folder} gives an answer a log-probability that is not finite")
                    values[first + batch[f"{side}_answer"][real]] = logprobs[real]
            bar.advance(int(batch["prompts"]))
    return values
