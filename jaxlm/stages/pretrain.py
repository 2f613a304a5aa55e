"""Pretraining: packed rows → a base model, or with objective.masked_words an encoder.

    python -m jaxlm pretrain --config=configs/pretrain_1b.py --workdir=runs/base

The step is `train_step` below; the loop around it (`jaxlm/train/loop.py`) iterates, saves and logs. Results lie in
WORKDIR: metrics.jsonl, checkpoints/, and at the end model/, which every later stage takes. The same command goes on
where a stopped run was.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.adapters.training import with_base
from jaxlm.base import manifest, sharding
from jaxlm.base.errors import ConfigError
from jaxlm.base.logging import logger
from jaxlm.base.metrics import Mean
from jaxlm.data.loader import Loader
from jaxlm.distill import teaching
from jaxlm.evaluate.samples import with_samples
from jaxlm.evaluate.training import HeldoutSet, evaluator, has_heldout
from jaxlm.hub.finish import stopped_early, summary_of, write_model
from jaxlm.hub.opened import hash_of, open_model
from jaxlm.model.attention import chosen
from jaxlm.model.transformer import define_model
from jaxlm.objectives import rows as objectives
from jaxlm.plan.announce import announce
from jaxlm.plan.depth import derive
from jaxlm.plan.fit import require_batch_fits, require_model_fits
from jaxlm.plan.flops import flops_per_token
from jaxlm.replay.blackbox import BlackBox
from jaxlm.routing import balance
from jaxlm.stages.config import PretrainConfig
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.train import losses
from jaxlm.train import optimizer as optimizers
from jaxlm.train.loop import Task, compiled_step, run_identity, train
from jaxlm.train.processes import from_first
from jaxlm.train.schedule import learning_rate
from jaxlm.train.state import Program, TrainState, abstract_rows, from_seed, make_program
from jaxlm.train.update import apply_gradients, gradients_in_pieces
from jaxlm.train.watchdog import Watchdog

Config = PretrainConfig


def validate(config: PretrainConfig, device_count: int) -> None:
    """Raises ConfigError for what no single field shows: data, batch and mesh together."""
    if not config.data:
        raise ConfigError("data", "is empty; give at least one folder of packed rows")
    require_batch_fits(config, device_count, config.loss_chunk_tokens)
    require_model_fits(config.mesh, device_count, config.model)


def inputs(config: PretrainConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    rows = manifest.hashes([source.path for source in config.data], "rows", "data")
    return rows | teaching.inputs(config.distill, hash_of)


def complete(config: PretrainConfig) -> PretrainConfig:
    """The config with nothing left to derive; reads the rows' manifests. Raises UserError for what does not fit."""
    if not config.data:
        raise ConfigError("data", "is empty; give at least one folder of packed rows")
    facts = manifest.read(config.data[0].path, "rows", "data.0.path").facts
    if config.model.vocab_size and config.model.vocab_size < facts["vocab_size"]:
        problem = f"{config.model.vocab_size} is below the tokenizer's {facts['vocab_size']} tokens; 0 takes them"
        raise ConfigError("model.vocab_size", problem)
    if config.row_length and config.row_length != facts["row_length"]:
        raise ConfigError("row_length", f"is {config.row_length}, but the rows have {facts['row_length']} tokens")
    if not any(has_heldout(source.path) for source in config.data):
        if config.plateau.evaluations:
            raise ConfigError("plateau.evaluations", "needs held-out rows, and no source in data has any")
        logger.warning("no source has held-out rows: nothing will be evaluated")
    dial = derive(
        config.depth,
        config.model,
        vocab_size=facts["vocab_size"],
        row_length=facts["row_length"],
        batch_rows=config.batch_rows,
        steps=config.steps,
        peak=config.schedule.peak,
    )
    return dataclasses.replace(
        config,
        model=dial.model,
        row_length=facts["row_length"],
        batch_rows=dial.batch_rows,
        steps=dial.steps,
        schedule=dataclasses.replace(config.schedule, peak=dial.peak),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Any],
    *,
    config: PretrainConfig,
    definition: Any,
    optimizer: Any,
    learnt: teaching.CrossEntropy,
) -> tuple[TrainState, dict[str, Mean]]:
    """One update on a global batch of rows `[B, S]`."""
    # The loss is a sum over the global batch's targets, divided by their number: pieces and devices only add.
    teacher, batch = learnt.separated(batch)
    targets = jnp.sum(losses.predictions_of(batch)[1])
    count = jnp.maximum(targets, 1).astype(jnp.float32)
    load = balance.loads(lambda rows: state.params, batch, config.accumulate, definition, config.routing)

    def objective(params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, losses.TokenSums]:
        sums = learnt.row_sums(params, rows, teacher, definition, config.loss_chunk_tokens)
        total = (learnt.total(sums) + config.z_loss * sums.squared_normalizer) / count
        return total + balance.penalty(sums.routing, load, batch, config.routing), sums

    (loss, sums), gradients = gradients_in_pieces(objective, state.params, batch, config.accumulate)
    # A batch without a target has a loss of 0 and a gradient of 0, and would still decay the weights: a bad step.
    good = jnp.isfinite(loss) & (targets > 0)
    rate = learning_rate(config.schedule, state.step, config.steps)
    rule = (optimizer, config.optimizer, definition)
    also = lambda params: balance.balanced(params, sums.routing, definition, config.routing.bias_rate)
    state, norms = apply_gradients(state, gradients, loss, good, rate, *rule, also)
    return state, learnt.metrics(sums) | balance.as_metrics(sums.routing) | norms


def build(config: PretrainConfig, mesh: Mesh) -> Program:
    """The compiled-once step with pinned shardings, for a complete config; nothing is allocated here."""
    definition = define_model(chosen(config.model, mesh.devices.flat[0].platform, config.row_length))
    optimizer = optimizers.make_optimizer(config.optimizer, definition)
    learnt = learnt_by(config, mesh)
    step = functools.partial(train_step, config=config, definition=definition, optimizer=optimizer, learnt=learnt)
    rows = objectives.abstract(config.objective, abstract_rows(mesh, config.batch_rows, config.row_length))
    batch = rows | learnt.abstract(config.batch_rows)
    given: dict[str, Any] = dict(rule=config.optimizer, start=from_seed(definition, config.seed), base=learnt.base)
    return make_program(step, definition, optimizer, batch, mesh, **given)


def learnt_by(config: PretrainConfig, mesh: Mesh) -> teaching.CrossEntropy:
    """What the rows are learnt by: their own tokens, or a teacher's too."""
    tokenizer = lambda: manifest.read(config.data[0].path, "rows", "data").facts["tokenizer_hash"]
    return teaching.objective_of(config, open_model, mesh, config.model.vocab_size, tokenizer)


def main(config: PretrainConfig) -> dict[str, Any]:
    """Trains, goes on where it was, and writes WORKDIR/model at the end."""
    began = time.monotonic()
    config = complete(config)
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    with Watchdog(config.loop.watchdog, f"{config.workdir}/log.txt") as watchdog:
        read_from = inputs(config)
        from_first(lambda: manifest.keep_inputs(config.workdir, read_from))
        tokenizer = tokenizers.load(f"{config.data[0].path}/tokenizer")
        loader = Loader(
            [(source.path, source.weight) for source in config.data],
            "train",
            global_batch=config.batch_rows,
            seed=config.seed,
            own=sharding.own_rows(mesh, config.batch_rows),
            exclude=[source.exclude for source in config.data],
            change=objectives.change_of(config.objective, tokenizer, config.seed),
        )
        announce(config, mesh)
        program = build(config, mesh)
        other_layout = dataclasses.replace(config.model, scan_layers=not config.model.scan_layers)
        # A piece of a step: what fits in training fits in evaluation.
        measure = evaluator(
            program,
            define_model(config.model),
            [HeldoutSet([source.path for source in config.data])],
            batch_rows=config.batch_rows // config.accumulate,
            limit=config.heldout_batches,
            chunk_tokens=config.loss_chunk_tokens,
            change=objectives.heldout_change_of(config.objective, tokenizer),
        )
        task = Task(
            program=program,
            compile=lambda: compiled_step(program),
            other_layout=build(dataclasses.replace(config, model=other_layout), mesh).abstract_state,
            model=config.model,
            steps=config.steps,
            weights=loader.weights,
            batches=with_base(learnt_by(config, mesh).batches(loader, mesh), program.base()),
            evaluate=with_samples(measure, config, config.model, tokenizer),
            tokens_per_step=config.batch_rows * config.row_length,
            flops_per_token=flops_per_token(config.model, config.row_length),
            identity=run_identity(config, read_from, tokenizer=loader.tokenizer_hash),
            plateau=config.plateau,
            black_box=BlackBox(config, program, loader.described),
            best_metric=objectives.best_metric(config),
        )
        outcome = train(task, config.loop, config.workdir, watchdog)
        summary = summary_of(outcome, task.best_metric, time.monotonic() - began)
        if stopped_early(outcome, config.loop.stop_at_step, config.steps):
            return summary
        watchdog.enter("save")
        facts = {"summary": summary, "row_length": config.row_length}
        given: Any = dict(tokenizer=f"{config.data[0].path}/tokenizer", inputs=read_from, facts=facts)
        write_model(config, outcome, outcome.state.ema or outcome.state.params, config.model, mesh, **given)
    return summary
