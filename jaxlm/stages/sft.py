"""Instruction tuning: a pretrained model and chats → an assistant.

    python -m jaxlm sft --config=configs/sft.py --workdir=runs/assistant

The chats are packed into WORKDIR/rows first (conversations side by side, isolated from each other), then the step
below trains on the assistant's tokens and its stop tokens, nothing else. Pretraining rows can be mixed in. Results:

    WORKDIR/rows/{train,heldout}/, report.json      what became of every chat, with examples of each reason
    WORKDIR/model/                                  with the chat template
    WORKDIR/metrics.jsonl                           eval/… on held-out chats, eval/general_… on those of another kind
"""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from jaxlm.adapters.training import Tuned, program_of, separated, tune, whole, with_base
from jaxlm.base import manifest, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.logging import logger
from jaxlm.base.metrics import Mean
from jaxlm.data import chats
from jaxlm.data.loader import Loader
from jaxlm.distill import teaching
from jaxlm.evaluate.samples import with_samples
from jaxlm.evaluate.training import HeldoutSet, evaluator, has_heldout
from jaxlm.hub.find import find_model, inputs_of
from jaxlm.hub.finish import stopped_early, summary_of, warn_of_adapter, write_tuned
from jaxlm.hub.opened import hash_of, open_model
from jaxlm.plan.fit import require_batch_fits, require_model_fits
from jaxlm.plan.flops import flops_per_token
from jaxlm.replay.blackbox import BlackBox
from jaxlm.routing import balance
from jaxlm.stages.config import SFTConfig
from jaxlm.tokenizer import chat
from jaxlm.train import losses, model_directory
from jaxlm.train.loop import Task, compiled_step, run_identity, train
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.processes import from_first
from jaxlm.train.schedule import learning_rate
from jaxlm.train.state import Program, TrainState, abstract_rows
from jaxlm.train.update import apply_gradients, gradients_in_pieces
from jaxlm.train.watchdog import Watchdog

Config = SFTConfig


def validate(config: SFTConfig, device_count: int) -> None:
    """Raises ConfigError for what no single field shows: batch and mesh together."""
    require_batch_fits(config, device_count, config.loss_chunk_tokens)


def inputs(config: SFTConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    rows = manifest.hashes([source.path for source in config.pretraining], "rows", "pretraining")
    teacher = teaching.inputs(config.distill, hash_of)
    return inputs_of(config.model, config.chat_template, config.sources) | rows | teacher


def write_rows(config: SFTConfig, model: ModelDirectory, template: chat.ChatTemplate, row_length: int) -> None:
    """WORKDIR/rows and, where some chats are only there to see what is forgotten, WORKDIR/general."""
    parts = {"rows": [s for s in config.sources if not s.general], "general": [s for s in config.sources if s.general]}
    for folder, sources in parts.items():
        if sources:
            path = f"{config.workdir}/{folder}"
            chats.write_rows(path, sources, template, model.tokenizer(), config.chats, row_length)


def complete(config: SFTConfig, model: ModelDirectory) -> SFTConfig:
    """The config with nothing left to derive, once the rows are written. Raises UserError for what does not fit."""
    facts = manifest.read(f"{config.workdir}/rows", "rows").facts
    if config.plateau.evaluations and "heldout" not in facts:
        raise ConfigError("plateau.evaluations", "needs held-out chats, and no source has split='heldout'")
    total = 1 + sum(source.weight for source in config.pretraining)
    steps = math.ceil(config.epochs * facts["train"]["rows"] * total / config.batch_rows)
    logger.info(
        "%d chats in %d rows, padding %.1f%%, %d truncated; %s targets of %s tokens; %d steps",
        facts["train"]["documents"],
        facts["train"]["rows"],
        100 * facts["train"]["padding_share"],
        facts["train"]["truncated"],
        f"{facts['train']['target_tokens']:,}",
        f"{facts['train']['tokens']:,}",
        config.steps or steps,
    )
    return dataclasses.replace(config, row_length=facts["row_length"], steps=config.steps or steps)


def train_step(
    state: TrainState,
    batch: dict[str, Any],
    *,
    config: SFTConfig,
    definition: Any,
    optimizer: Any,
    learnt: teaching.CrossEntropy,
) -> tuple[TrainState, dict[str, Mean]]:
    """One update on a global batch of rows `[B, S]`."""
    # Every target of the global batch counts alike, in a long answer as in a short one.
    teacher, batch = learnt.separated(batch)
    targets = jnp.sum(losses.targets_of(batch["ids"], batch["loss_mask"])[1])
    count = jnp.maximum(targets, 1).astype(jnp.float32)
    base, batch = separated(batch, config.accumulate)
    over_base = lambda params, rows: whole(definition, base, params, config.seed, state.step, rows)
    own = functools.partial(over_base, state.params)
    load = balance.loads(own, batch, config.accumulate, definition, config.routing)

    def objective(params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, losses.TokenSums]:
        params = over_base(params, rows)
        sums = learnt.row_sums(params, rows, teacher, definition, config.loss_chunk_tokens)
        return learnt.total(sums) / count + balance.penalty(sums.routing, load, batch, config.routing), sums

    (loss, sums), gradients = gradients_in_pieces(objective, state.params, batch, config.accumulate)
    good = jnp.isfinite(loss) & (targets > 0)
    rate = learning_rate(config.schedule, state.step, config.steps)
    rule = (optimizer, config.optimizer, definition)
    bias_rate = 0.0 if base else config.routing.bias_rate  # under adapters, routers stay as they are
    also = lambda params: balance.balanced(params, sums.routing, definition, bias_rate)
    state, norms = apply_gradients(state, gradients, loss, good, rate, *rule, also)
    return state, learnt.metrics(sums) | balance.as_metrics(sums.routing) | norms


def build(config: SFTConfig, mesh: Mesh) -> Program:
    """The compiled-once step with pinned shardings, for a complete config; the model's weights are read later."""
    model = model_directory.read(find_model(config.model, "model"), verify=False)
    return _build(config, mesh, tune(config, mesh, model, model.config.scan_layers))


def _build(config: SFTConfig, mesh: Mesh, tuned: Tuned) -> Program:
    learnt = learnt_by(config, mesh, tuned.model)
    batch = abstract_rows(mesh, config.batch_rows, config.row_length) | learnt.abstract(config.batch_rows)
    return program_of(config, train_step, tuned, batch, learnt.base, learnt=learnt)


def learnt_by(config: SFTConfig, mesh: Mesh, model: ModelDirectory) -> teaching.CrossEntropy:
    """What the rows are learnt by: their own tokens, or a teacher's too."""
    return teaching.objective_of(config, open_model, mesh, model.config.vocab_size, lambda: model.tokenizer().hash)


def main(config: SFTConfig) -> dict[str, Any]:
    """Trains, goes on where it was, and writes WORKDIR/model at the end."""
    began = time.monotonic()
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    with Watchdog(config.loop.watchdog, f"{config.workdir}/log.txt") as watchdog:
        model = model_directory.read(find_model(config.model, "model"))
        template, row_length = model.template_or(config.chat_template), model.row_length_or(config.row_length)
        read_from = inputs(config)
        from_first(lambda: manifest.keep_inputs(config.workdir, read_from))
        from_first(lambda: write_rows(config, model, template, row_length))
        config = complete(config, model)
        validate(config, jax.device_count())
        require_model_fits(config.mesh, jax.device_count(), model.config)
        rows = f"{config.workdir}/rows"
        loader = Loader(
            [(rows, 1.0), *((source.path, source.weight) for source in config.pretraining)],
            "train",
            global_batch=config.batch_rows,
            seed=config.seed,
            own=sharding.own_rows(mesh, config.batch_rows),
            exclude=[config.exclude, *(source.exclude for source in config.pretraining)],
        )
        if loader.tokenizer_hash != model.tokenizer().hash:
            raise UserError("pretraining: was packed with another tokenizer than the model's; pack it again")
        tuned = tune(config, mesh, model, model.config.scan_layers)
        warn_of_adapter(tuned)
        program = _build(config, mesh, tuned)
        general = f"{config.workdir}/general"
        sets = [HeldoutSet([rows])] if has_heldout(rows) else []
        sets += [HeldoutSet([general], "general")] if epath.Path(general).exists() else []
        measure = evaluator(
            program,
            tuned.measured,
            sets,
            batch_rows=config.batch_rows // config.accumulate,
            limit=config.heldout_batches,
            chunk_tokens=config.loss_chunk_tokens,
        )
        other = tune(config, mesh, model, not model.config.scan_layers)
        task = Task(
            program=program,
            compile=lambda: compiled_step(program),
            other_layout=_build(config, mesh, other).abstract_state,
            model=model.config,
            steps=config.steps,
            weights=loader.weights,
            batches=with_base(learnt_by(config, mesh, model).batches(loader, mesh), program.base()),
            evaluate=with_samples(measure, config, tuned.config, model.tokenizer(), template, program.whole),
            tokens_per_step=config.batch_rows * config.row_length,
            flops_per_token=flops_per_token(tuned.config, config.row_length),
            identity=run_identity(config, read_from, chat_template=template.hash),
            plateau=config.plateau,
            black_box=BlackBox(config, program, loader.described),
            best_metric="eval/ema_bits_per_byte" if config.optimizer.ema else "eval/bits_per_byte",
        )
        outcome = train(task, config.loop, config.workdir, watchdog)
        summary = summary_of(outcome, task.best_metric, time.monotonic() - began)
        if stopped_early(outcome, config.loop.stop_at_step, config.steps):
            return summary
        watchdog.enter("save")
        facts = {"summary": summary, "row_length": config.row_length}
        made = outcome.state.ema or outcome.state.params
        write_tuned(config, outcome, made, tuned, mesh, inputs=read_from, facts=facts, chat_template=template)
    return summary
