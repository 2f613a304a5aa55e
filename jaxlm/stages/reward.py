"""A reward model: an assistant and rankings of answers → a model that scores answers as the rankings do.

    python -m jaxlm reward --config=configs/reward.py --workdir=runs/reward

The output head gives way to one scalar head a criterion, read at an answer's last token. All answers of a prompt go
through the model in one batch, each once, packed side by side; the loss compares every untied pair of them, a prompt
counting as one however many answers it has (arXiv:2203.02155). At the end the mean reward of reference answers is
brought to 0 by a bias. Results: WORKDIR/model (with tokenizer and chat template: rl refuses others), and in
WORKDIR/report.json the accuracy on held-out rankings by K, distance, criterion, annotator and kind of worse answer,
the calibration, and the correlation of reward with length.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from jaxlm.adapters import training
from jaxlm.adapters.training import Tuned, program_of, separated, whole, with_base
from jaxlm.base import files, manifest, sharding
from jaxlm.base.metrics import Mean
from jaxlm.feedback.records import RankingRecord
from jaxlm.hub.find import find_model, inputs_of
from jaxlm.hub.finish import stopped_early, summary_with, warn_of_adapter, write_tuned
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Params
from jaxlm.plan.fit import require_batch_fits, require_model_fits
from jaxlm.plan.flops import flops_per_token
from jaxlm.preference import records
from jaxlm.preference.heldout import RankingHeldout
from jaxlm.preference.ranked import PAIR_ARRAYS, ranking_batches
from jaxlm.preference.records import reference_answers
from jaxlm.preference.rewards import (
    ROWS,
    as_metrics,
    centred,
    first_params,
    piece_sums,
    placed_batch,
    require_centred,
    reward_shape,
)
from jaxlm.replay.blackbox import BlackBox
from jaxlm.reward import losses
from jaxlm.reward.config import RewardConfig
from jaxlm.tokenizer import chat
from jaxlm.train import model_directory
from jaxlm.train.loop import Task, compiled_step, run_identity, train
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first
from jaxlm.train.schedule import learning_rate
from jaxlm.train.state import Program, TrainState, abstract_rows
from jaxlm.train.update import apply_gradients, gradients_in_pieces
from jaxlm.train.watchdog import Watchdog

Config = RewardConfig


def validate(config: RewardConfig, device_count: int) -> None:
    """Raises ConfigError for what no single field shows: batch and mesh together."""
    require_batch_fits(config, device_count)


def inputs(config: RewardConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    return inputs_of(config.model, config.chat_template, config.sources)


def read_records(config: RewardConfig) -> dict[str, list[RankingRecord]]:
    """Split → records."""
    return records.read_records(config.workdir, config.sources, config.max_bad_share)


def encoder_of(config: RewardConfig, template: chat.ChatTemplate) -> records.Encoder:
    return records.Encoder(template, config.criteria, config.annotators, config.margin)


def train_step(
    state: TrainState, batch: dict[str, jax.Array], *, config: RewardConfig, definition: Any, optimizer: Any
) -> tuple[TrainState, dict[str, Mean]]:
    """One update on a global batch: rows `[B, S]` of packed answers, and R pairs that point into them."""
    # A prompt with signal counts as one, whatever its number of answers.
    prompts = jnp.maximum(batch["prompts"], 1.0)

    def objective(params: Params, piece: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Mean]]:
        if not config.centring:
            # Differences do not feel the bias: its gradient is rounding, which Adam would blow up to whole steps.
            params = params | {"score_bias": jax.lax.stop_gradient(params["score_bias"])}
        params = whole(definition, base, params, config.seed, state.step, piece)
        sums = piece_sums(params, piece, definition, config.centring)
        loss = losses.batch_loss(sums, prompts)
        return loss, as_metrics(sums, prompts / config.accumulate)

    base, pieces = separated({name: value for name, value in batch.items() if name != "prompts"}, config.accumulate)
    (loss, measured), gradients = gradients_in_pieces(objective, state.params, pieces, config.accumulate)
    good = jnp.isfinite(loss) & (batch["prompts"] > 0)
    rate = learning_rate(config.schedule, state.step, config.steps)
    state, norms = apply_gradients(state, gradients, loss, good, rate, optimizer, config.optimizer, definition)
    return state, measured | norms


def build(config: RewardConfig, mesh: Mesh) -> Program:
    """The compiled-once step with pinned shardings, for a complete config; the model's weights are read later."""
    model = model_directory.read(find_model(config.model, "model"), verify=False)
    return _build(config, mesh, tune(config, mesh, model, model.config.scan_layers))


def tune(config: RewardConfig, mesh: Mesh, model: ModelDirectory, scan_layers: bool) -> Tuned:
    first = functools.partial(first_params, config, model)
    return training.tune(config, mesh, model, scan_layers, reward_shape(config, model), first)


def _build(config: RewardConfig, mesh: Mesh, tuned: Tuned) -> Program:
    whole = sharding.replicated(mesh)
    pairs = {
        name: jax.ShapeDtypeStruct((config.batch_pairs,), kind, sharding=whole) for name, kind in PAIR_ARRAYS.items()
    }
    batch = {name: x for name, x in abstract_rows(mesh, config.batch_rows, config.row_length).items() if name in ROWS}
    batch |= pairs | {"prompts": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)}
    return program_of(config, train_step, tuned, batch)


def main(config: RewardConfig) -> dict[str, Any]:
    """Trains, goes on where it was, and writes WORKDIR/model and report.json at the end."""
    began = time.monotonic()
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    with Watchdog(config.loop.watchdog, f"{config.workdir}/log.txt") as watchdog:
        model = model_directory.read(find_model(config.model, "model"))
        template = model.template_or(config.chat_template)
        config = dataclasses.replace(config, row_length=model.row_length_or(config.row_length))
        read_from = inputs(config)
        from_first(lambda: manifest.keep_inputs(config.workdir, read_from))
        require_model_fits(config.mesh, jax.device_count(), model.config)
        read, encoder = read_records(config), encoder_of(config, template)
        together, measured = encoder.split(read, config.heldout_annotators)
        reference = reference_answers(config, read["train"], together)
        batches = ranking_batches(config, together, mesh, config.accumulate)
        heldout = ranking_batches(config, measured, mesh, 0) if any(prompt.pairs for prompt in measured) else None
        config = dataclasses.replace(config, steps=config.steps or batches.first_step(config.epochs))
        records.describe(config.workdir, batches, heldout)
        tuned, shape = tune(config, mesh, model, model.config.scan_layers), reward_shape(config, model)
        warn_of_adapter(tuned)
        program, definition = _build(config, mesh, tuned), define_model(shape)
        held = RankingHeldout(config, program, tuned.measured, heldout)
        batches_from = lambda step, _: (placed_batch(mesh, b, config.batch_rows) for _, b in batches.batches(step))
        other = tune(config, mesh, model, not model.config.scan_layers)
        task = Task(
            program=program,
            compile=lambda: compiled_step(program),
            other_layout=_build(config, mesh, other).abstract_state,
            model=shape,
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
            headline=lambda v: f"loss {v['reward/loss']:.4f}  accuracy {v['reward/accuracy']:.3f}",
        )
        outcome = train(task, config.loop, config.workdir, watchdog)
        accuracy = outcome.evaluation.get("eval/pair_accuracy")
        summary = summary_with(outcome, accuracy, "{:.1%} of held-out pairs", time.monotonic() - began)
        if stopped_early(outcome, config.loop.stop_at_step, config.steps):
            return summary
        watchdog.enter("save")
        with jax.set_mesh(mesh):
            report = held.report(outcome.state, encoder)
            made = outcome.state.ema or outcome.state.params
            params, before = centred(tuned.merged(made), config, definition, reference)
        from_first(lambda: files.write_json(epath.Path(config.workdir) / "report.json", report))
        facts = {"summary": summary, "row_length": config.row_length}
        facts |= {"mean_before_centring": before, "reference_answers": len(reference)}
        given: Any = dict(inputs=read_from, facts=facts, chat_template=template, finished=params)
        write_tuned(config, outcome, made, tuned, mesh, **given)
        require_centred(config, definition, reference, mesh)
    return summary
