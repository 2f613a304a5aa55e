"""Preferences without a reward model: an assistant and rankings of answers → a policy (DPO, IPO, KTO, ORPO, SimPO).

    python -m jaxlm preference --config=configs/dpo.py --workdir=runs/policy

The loss compares every untied pair of a prompt's answers by the policy's own log-probabilities of them
(jaxlm/preference/losses.py has the formulas and papers). Each answer goes through the model once, packed beside others,
and a prompt counts as one however many answers it has: its pairs weigh 1 in all. What the reference says (the policy as
it began; DPO, IPO, KTO) is computed once, before the first step, and kept. Results:

    WORKDIR/reference/<hash>/       the reference's log-probabilities
    WORKDIR/model/                  with the chat template
    WORKDIR/metrics.jsonl           preference/… and, of held-out rankings, eval/…
    WORKDIR/report.json             held-out accuracy of the implicit reward by K, distance, annotator and kind of worse
                                    answer, its calibration, and its correlation with length
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from jaxlm.adapters.training import Tuned, program_of, separated, tune, whole, with_base
from jaxlm.base import files, manifest, metrics, sharding
from jaxlm.base.errors import ConfigError
from jaxlm.base.metrics import Mean
from jaxlm.hub.find import find_model, inputs_of
from jaxlm.hub.finish import stopped_early, summary_with, warn_of_adapter, write_tuned
from jaxlm.model.weights import Params
from jaxlm.plan.fit import require_batch_fits, require_model_fits
from jaxlm.plan.flops import flops_per_token
from jaxlm.preference import records
from jaxlm.preference.batches import PreferenceBatches, placed, preference_batches
from jaxlm.preference.config import PreferenceConfig
from jaxlm.preference.heldout import PreferenceHeldout
from jaxlm.preference.reference import reference_logprobs
from jaxlm.preference.scoring import (
    as_metrics,
    piece_sums,
    reference_point,
)
from jaxlm.replay.blackbox import BlackBox
from jaxlm.train import model_directory
from jaxlm.train.loop import Task, compiled_step, run_identity, train
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first
from jaxlm.train.schedule import learning_rate
from jaxlm.train.state import Program, TrainState, abstract_rows
from jaxlm.train.update import apply_gradients, gradients_in_pieces
from jaxlm.train.watchdog import Watchdog

Config = PreferenceConfig


def validate(config: PreferenceConfig, device_count: int) -> None:
    """Raises ConfigError for what no single field shows: batch and mesh together."""
    require_batch_fits(config, device_count, config.loss_chunk_tokens)


def inputs(config: PreferenceConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    return inputs_of(config.model, config.chat_template, config.sources)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], *, config: PreferenceConfig, definition: Any, optimizer: Any
) -> tuple[TrainState, dict[str, Mean]]:
    """One update on a global batch: rows `[B, S]` of packed answers, and R pairs that point into them."""
    # A prompt counts as one, whatever its number of answers.
    prompts = jnp.maximum(batch["prompts"], 1.0)
    base, pieces = separated({name: value for name, value in batch.items() if name != "prompts"}, config.accumulate)
    over_base = lambda params: whole(definition, base, params, config.seed, state.step, pieces)
    # KTO's: of the whole batch and before its gradients, so that all pieces are measured against the same point.
    kl = reference_point(config, over_base(state.params), pieces, definition, config.accumulate)

    def objective(params: Params, piece: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Mean]]:
        sums = piece_sums(config, over_base(params), piece, definition, kl)
        return sums.loss / prompts, as_metrics(sums, prompts / config.accumulate)

    (loss, measured), gradients = gradients_in_pieces(objective, state.params, pieces, config.accumulate)
    good = jnp.isfinite(loss) & (batch["prompts"] > 0)
    rate = learning_rate(config.schedule, state.step, config.steps)
    state, norms = apply_gradients(state, gradients, loss, good, rate, optimizer, config.optimizer, definition)
    if config.kto:
        measured["preference/kl"] = metrics.scalar(kl)
    return state, measured | norms


def open_model(config: PreferenceConfig, verify: bool = True) -> ModelDirectory:
    found = model_directory.read(find_model(config.model, "model"), verify=verify)
    if found.config.criteria:
        raise ConfigError("model", f"{config.model} is a reward model; a language model is needed")
    return found


def build(config: PreferenceConfig, mesh: Mesh) -> Program:
    """The compiled-once step with pinned shardings, for a complete config; the model's weights are read later."""
    model = open_model(config, verify=False)
    return _build(config, mesh, tune(config, mesh, model, model.config.scan_layers))


def _build(config: PreferenceConfig, mesh: Mesh, tuned: Tuned) -> Program:
    rows = abstract_rows(mesh, config.batch_rows, config.row_length)
    whole = sharding.replicated(mesh)
    kinds = {"better": jnp.int32, "worse": jnp.int32, "weight": jnp.float32}
    kinds |= {"better_tokens": jnp.int32, "worse_tokens": jnp.int32}
    if config.has_reference:
        kinds |= {"better_reference": jnp.float32, "worse_reference": jnp.float32}
    if config.kto:
        kinds |= {"better_other": jnp.float32, "worse_other": jnp.float32}
        rows |= {"other_ids": rows["ids"], "other_mask": rows["loss_mask"]}
    pairs = {name: jax.ShapeDtypeStruct((config.batch_pairs,), kind, sharding=whole) for name, kind in kinds.items()}
    batch = rows | pairs | {"prompts": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)}
    return program_of(config, train_step, tuned, batch)


def read_batches(
    config: PreferenceConfig,
    mesh: Mesh,
    model: ModelDirectory,
    encoder: records.Encoder,
    alive: Callable[[], None] = lambda: None,
    tuned: Tuned | None = None,
) -> tuple[PreferenceBatches, PreferenceBatches | None]:
    """(to train on, held out), with what the reference says of their answers."""
    read = records.read_records(config.workdir, config.sources, config.max_bad_share)
    together, measured = encoder.split(read, config.heldout_annotators, "criterion")
    batches = preference_batches(config, together, mesh, config.accumulate)
    heldout = preference_batches(config, measured, mesh, 0) if any(prompt.pairs for prompt in measured) else None
    records.describe(config.workdir, batches, heldout)
    if config.has_reference:
        tuned = tuned or tune(config, mesh, model, model.config.scan_layers)
        folder = config.reference_cache or f"{config.workdir}/reference"
        # Under adapters the reference is their base itself, the arrays that training takes.
        base = (lambda held=tuned.base: held()["base"]) if config.lora else None
        asked = model, tuned.reference, mesh, config.loss_chunk_tokens, alive, base
        ask = lambda some: reference_logprobs(folder, some, *asked)
        batches.reference = ask(preference_batches(config, together, mesh, 0))
        if heldout:
            heldout.reference = ask(heldout)
    return batches, heldout


def main(config: PreferenceConfig) -> dict[str, Any]:
    """Trains, goes on where it was, and writes WORKDIR/model and report.json at the end."""
    began = time.monotonic()
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    with Watchdog(config.loop.watchdog, f"{config.workdir}/log.txt") as watchdog:
        model = open_model(config)
        template = model.template_or(config.chat_template)
        config = dataclasses.replace(config, row_length=model.row_length_or(config.row_length))
        validate(config, jax.device_count())
        read_from = inputs(config)
        from_first(lambda: manifest.keep_inputs(config.workdir, read_from))
        require_model_fits(config.mesh, jax.device_count(), model.config)
        encoder = records.Encoder(template, (config.criterion,), config.annotators)
        tuned = tune(config, mesh, model, model.config.scan_layers)
        warn_of_adapter(tuned)
        batches, heldout = read_batches(config, mesh, model, encoder, lambda: watchdog.enter("eval"), tuned)
        config = dataclasses.replace(config, steps=config.steps or batches.first_step(config.epochs))
        program = _build(config, mesh, tuned)
        held = PreferenceHeldout(config, program, tuned.measured, heldout)
        batches_from = lambda step, _: (placed(program, b, config.batch_rows) for _, b in batches.batches(step))
        other = tune(config, mesh, model, not model.config.scan_layers)
        task = Task(
            program=program,
            compile=lambda: compiled_step(program),
            other_layout=_build(config, mesh, other).abstract_state,
            model=model.config,
            steps=config.steps,
            weights=(),
            batches=with_base(batches_from, program.base()),
            evaluate=held.evaluate,
            tokens_per_step=config.batch_rows * config.row_length,
            flops_per_token=flops_per_token(tuned.config, config.row_length),
            identity=run_identity(config, read_from, chat_template=template.hash),
            plateau=config.plateau,
            black_box=BlackBox(config, program, batches.described),
            best_metric="eval/loss",
            headline=lambda v: f"loss {v['preference/loss']:.4f}  accuracy {v['preference/accuracy']:.3f}",
        )
        outcome = train(task, config.loop, config.workdir, watchdog)
        accuracy = outcome.evaluation.get("eval/pair_accuracy")
        summary = summary_with(outcome, accuracy, "{:.1%} of held-out pairs", time.monotonic() - began)
        if stopped_early(outcome, config.loop.stop_at_step, config.steps):
            return summary
        watchdog.enter("save")
        with jax.set_mesh(mesh):
            report = held.report(outcome.state, encoder)
        from_first(lambda: files.write_json(epath.Path(config.workdir) / "report.json", report))
        facts = {"summary": summary, "row_length": config.row_length}
        made = outcome.state.ema or outcome.state.params
        write_tuned(config, outcome, made, tuned, mesh, inputs=read_from, facts=facts, chat_template=template)
    return summary
