"""Reinforcement learning: an assistant and a reward model (or verifiers) → a policy that is rewarded more.

    python -m jaxlm rl --config=configs/ppo.py --workdir=runs/policy                       # or configs/grpo.py

Every iteration draws answers to some prompts, scores them, and learns from them: with PPO (`ppo_step`; a value function
that starts as the reward model, the KL to the reference in the reward), with GRPO and its kin (`grpo_step`; an answer's
baseline is its group, k3 to the reference in the loss), with REINFORCE++ (the same step; advantages over the whole
rollout, the KL in the reward) or with online DPO (`dpo_step`; a prompt's best answer against its worst). The reference
is the policy as it began. Checkpoints lie at the ends of iterations. Results: WORKDIR/metrics.jsonl (rl/…),
completions.jsonl (some answers of each rollout), reward_kl.png (reward and gold score against √KL) and model/.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.adapters.quantising import Quantising
from jaxlm.adapters.training import Tuned, first_adapters
from jaxlm.adapters.weights import require_targets
from jaxlm.base import manifest, sharding
from jaxlm.base.errors import ConfigError
from jaxlm.base.metrics import Mean
from jaxlm.hub.find import find_model
from jaxlm.hub.finish import stopped_early, summary_with, warn_of_adapter, write_tuned
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Params
from jaxlm.replay.blackbox import BlackBox
from jaxlm.rl import forward, objectives, prompts
from jaxlm.rl.config import RLConfig
from jaxlm.rl.evaluation import evaluator
from jaxlm.rl.figures import draw_frontier
from jaxlm.rl.learner import (
    Examples,
    Frozen,
    Models,
    answer_tokens,
    pair_metrics,
    policy_metrics,
    policy_of,
    updates_a_rollout,
    value_of,
)
from jaxlm.rl.models import (
    Directories,
    abstract_batch,
    batches,
    define_models,
    load_frozen,
    row_length,
)
from jaxlm.rl.programs import iteration_program, update_program
from jaxlm.rl.rewards import Judge
from jaxlm.rl.rolling import Iteration, Roller, sampler_of
from jaxlm.text import readers
from jaxlm.train import losses, model_directory
from jaxlm.train import optimizer as optimizers
from jaxlm.train.config import PlateauConfig
from jaxlm.train.loop import Task, run_identity, train
from jaxlm.train.processes import from_first
from jaxlm.train.schedule import learning_rate
from jaxlm.train.state import Program, TrainState
from jaxlm.train.update import apply_gradients
from jaxlm.train.watchdog import Watchdog

Config = RLConfig


def validate(config: RLConfig, device_count: int) -> None:
    """Raises ConfigError for what no single field shows: answers and mesh together."""
    pieces = sharding.batch_pieces(config.mesh.sizes(device_count))
    if config.minibatch_answers % pieces:
        raise ConfigError(
            "minibatch_answers", f"{config.minibatch_answers} do not divide among {pieces} parts of the mesh"
        )
    rows = config.ppo.pretraining_rows if config.ppo and config.ppo.pretraining else 0
    if rows % pieces:
        raise ConfigError("ppo.pretraining_rows", f"{rows} do not divide among {pieces} parts of the mesh")
    tokens = config.minibatch_answers * config.max_tokens
    if config.loss_chunk_tokens and tokens % config.loss_chunk_tokens:
        raise ConfigError("loss_chunk_tokens", f"{config.loss_chunk_tokens} does not divide a minibatch's {tokens}")


def inputs(config: RLConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    models = [find_model(path, field) for field in ("model", "reward_model") if (path := getattr(config, field))]
    read = {str(folder): manifest.read(folder).hash for folder in models}
    read |= manifest.hashes([s.path for s in (config.ppo.pretraining if config.ppo else ())], "rows", "ppo.pretraining")
    return read | {name: found for source in config.sources for name, found in readers.inputs(source).items()}


def ppo_step(
    policy: TrainState,
    value: TrainState,
    examples: Examples,
    rows: dict[str, jax.Array],
    frozen: Frozen | None = None,
    *,
    config: RLConfig,
    models: Models,
    policy_optimizer: Any,
    value_optimizer: Any,
) -> tuple[tuple[TrainState, TrainState], dict[str, Mean]]:
    """One update of policy and value function on a minibatch of answers; `rows`: of pretraining, for PPO-ptx."""
    ppo = config.ppo
    assert ppo is not None
    assert models.value is not None
    # All tokens of the minibatch count alike.
    units = jnp.maximum(jnp.sum(examples.mask.astype(jnp.float32)), 1.0)

    def policy_objective(params: Params) -> tuple[jax.Array, dict[str, Mean]]:
        tokens = answer_tokens(config, models, models.policy, policy_of(models, params, frozen), examples.rollout)
        sums = objectives.policy_loss(
            tokens.logprobs, examples.logprobs, examples.advantages, examples.mask, ppo.clip, ppo.clip
        )
        loss, measured = sums.loss / units, policy_metrics(sums, tokens, examples.mask, sums.loss, units)
        if rows:
            mixed = losses.row_sums(policy_of(models, params, frozen), rows, models.policy, config.loss_chunk_tokens)
            loss += ppo.pretraining_coefficient * mixed.loss / jnp.maximum(mixed.targets, 1.0)
            measured["rl/pretraining_loss"] = Mean(mixed.loss, mixed.targets)
        return loss, measured

    def value_objective(params: Params) -> tuple[jax.Array, dict[str, Mean]]:
        assert models.value is not None
        values = forward.answer_values(models.value, value_of(models, params, frozen), examples.rollout)
        sums = objectives.value_loss(values, examples.values, examples.returns, examples.mask, ppo.value_clip)
        return sums.loss / units, {
            "rl/value_loss": Mean(sums.loss, units),
            "rl/value_clip_fraction": Mean(sums.clipped, units),
        }

    (loss, measured), gradients = jax.value_and_grad(policy_objective, has_aux=True)(policy.params)
    (value_loss, value_measured), value_gradients = jax.value_and_grad(value_objective, has_aux=True)(value.params)
    # Both or neither: a policy without its value function's step would be judged by another's values.
    numbers = loss, value_loss, optimizers.global_norm(gradients), optimizers.global_norm(value_gradients)
    good = jnp.all(jnp.isfinite(jnp.stack(numbers))) & jnp.any(examples.mask)
    rate = learning_rate(config.schedule, policy.step, config.steps * updates_a_rollout(config))
    # The value function stands still where the policy does.
    skipped, value = policy.skipped, value._replace(halt=policy.halt)
    policy, norms = apply_gradients(
        policy, gradients, loss, good, rate, policy_optimizer, config.optimizer, models.policy
    )
    good &= policy.skipped == skipped
    rule = value_optimizer, ppo.value_optimizer, models.value
    value, of_value = apply_gradients(value, value_gradients, value_loss, good, rate * ppo.value_rate, *rule)
    value_measured["rl/value_gradient_norm"] = of_value["train/gradient_norm"]
    return (policy, value), measured | value_measured | norms


def grpo_step(
    policy: TrainState,
    value: tuple[()],
    examples: Examples,
    rows: dict[str, jax.Array],
    frozen: Frozen | None = None,
    *,
    config: RLConfig,
    models: Models,
    policy_optimizer: Any,
) -> tuple[tuple[TrainState, tuple[()]], dict[str, Mean]]:
    """One update of the policy on a minibatch of answers; there is no value function. Also REINFORCE++'s."""
    grpo = config.grpo or (config.reinforce and config.reinforce.loss)
    assert grpo is not None
    weights, units = objectives.normalizers(examples.mask, grpo.normalization, config.max_tokens)
    units = jnp.maximum(units, 1.0)

    def objective(params: Params) -> tuple[jax.Array, dict[str, Mean]]:
        tokens = answer_tokens(config, models, models.policy, policy_of(models, params, frozen), examples.rollout)
        sums = objectives.policy_loss(
            tokens.logprobs,
            examples.logprobs,
            examples.advantages,
            examples.mask,
            grpo.clip,
            grpo.clip_high or grpo.clip,
            weights=weights,
            sequence_ratio=grpo.ratio == "sequence",
        )
        drawn = examples.logprobs if grpo.kl_ratio else None
        drift = objectives.kl_loss(tokens.logprobs, examples.reference, examples.mask, weights=weights, drawn=drawn)
        total = sums.loss + grpo.kl_coefficient * drift
        return total / units, policy_metrics(sums, tokens, examples.mask, total, units)

    (loss, measured), gradients = jax.value_and_grad(objective, has_aux=True)(policy.params)
    good = jnp.isfinite(loss) & jnp.any(examples.mask)
    rate = learning_rate(config.schedule, policy.step, config.steps * updates_a_rollout(config))
    policy, norms = apply_gradients(
        policy, gradients, loss, good, rate, policy_optimizer, config.optimizer, models.policy
    )
    return (policy, value), measured | norms


def dpo_step(
    policy: TrainState,
    value: tuple[()],
    examples: Examples,
    rows: dict[str, jax.Array],
    frozen: Frozen | None = None,
    *,
    config: RLConfig,
    models: Models,
    policy_optimizer: Any,
) -> tuple[tuple[TrainState, tuple[()]], dict[str, Mean]]:
    """One update of the policy on a minibatch of pairs, the best and the worst answer to a prompt side by side."""
    assert config.dpo is not None
    beta, signs = config.dpo.beta, examples.advantages[:, 0]

    def objective(params: Params) -> tuple[jax.Array, dict[str, Mean]]:
        tokens = answer_tokens(config, models, models.policy, policy_of(models, params, frozen), examples.rollout)
        sums = objectives.pair_loss(tokens.logprobs, examples.reference, examples.mask, signs, beta)
        units = jnp.where(sums.pairs == 0, 1.0, sums.pairs)
        return sums.loss / units, pair_metrics(sums, tokens, examples)

    (loss, measured), gradients = jax.value_and_grad(objective, has_aux=True)(policy.params)
    good = jnp.isfinite(loss) & jnp.any(examples.mask)
    rate = learning_rate(config.schedule, policy.step, config.steps * updates_a_rollout(config))
    policy, norms = apply_gradients(
        policy, gradients, loss, good, rate, policy_optimizer, config.optimizer, models.policy
    )
    return (policy, value), measured | norms


def open_models(config: RLConfig, verify: bool = True) -> Directories:
    """The models' directories, which have to read text alike."""
    policy = model_directory.read(find_model(config.model, "model"), verify=verify)
    reward = None
    if config.reward_model:
        reward = model_directory.read(find_model(config.reward_model, "reward_model"), verify=verify)
    if config.lora is not None:
        require_targets(define_model(policy.config), config.lora)
        if config.ppo and reward:
            require_targets(define_model(reward.config), config.lora, " of reward_model, where PPO's value starts")
        policy, reward = Quantising.of(policy), reward and Quantising.of(reward)
    return Directories(policy, reward).checked(config)


def build(config: RLConfig, mesh: Mesh) -> Program:
    """The compiled program from a rollout to the next state; the models' weights are read later."""
    return build_from(config, mesh, open_models(config, verify=False))


def build_update(config: RLConfig, mesh: Mesh) -> Program:
    """One update of an iteration, for replay."""
    directories = open_models(config, verify=False)
    models = define_models(config, directories, mesh)
    return update_program(build_from(config, mesh, directories), config, models, step_of(config))


def build_from(
    config: RLConfig, mesh: Mesh, directories: Directories, frozen: Callable[[], Frozen] | None = None
) -> Program:
    """`frozen`: () → what `load_frozen` reads, where it is read already."""
    return iteration_program(config, mesh, directories, step_of(config), first_adapters, frozen)


def step_of(config: RLConfig) -> Callable[..., Any]:
    return ppo_step if config.ppo else dpo_step if config.dpo else grpo_step


def main(config: RLConfig) -> dict[str, Any]:
    """Reinforces, goes on where it was, and writes WORKDIR/model at the end."""
    began = time.monotonic()
    validate(config, jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    with Watchdog(config.loop.watchdog, f"{config.workdir}/log.txt") as watchdog:
        directories = open_models(config)
        read_from = inputs(config)
        from_first(lambda: manifest.keep_inputs(config.workdir, read_from))
        shape = directories.policy.config
        template = directories.policy.chat_template()
        sampler = sampler_of(config, directories.policy)
        asked, heldout = prompts.read_splits(config, template, sampler.encode)
        tuned = Tuned(config.lora, shape, directories.policy, mesh, config.seed)
        warn_of_adapter(tuned)
        models = define_models(config, directories, mesh)
        S = row_length(config, shape, mesh)
        frozen = load_frozen(directories, models, abstract_batch(config, models, mesh, S)["frozen"])
        program = build_from(config, mesh, directories, lambda: frozen)
        judge = lambda some: Judge(config.verifiers, some, "verifiers")
        gold = lambda some: Judge([config.gold], some, "gold") if config.gold else None
        policy_whole = lambda params: policy_of(models, params, frozen)
        update = update_program(program, config, models, step_of(config))
        box = BlackBox(config, update, lambda _, asked: asked, what="update"), update
        roller = Roller(config, sampler, judge(asked), gold(asked), S, policy_whole)
        heldout_roller = Roller(config, sampler, judge(heldout), gold(heldout), S, policy_whole)
        task = Task(
            program=program,
            compile=lambda: Iteration(config, program, roller, frozen, box),
            other_layout=None,
            model=shape,
            steps=config.steps,
            weights=tuple(source.weight for source in config.ppo.pretraining) if config.ppo else (),
            batches=batches(config, asked, mesh),
            evaluate=evaluator(config, models, heldout_roller, heldout, frozen, mesh),
            tokens_per_step=config.prompts * config.samples * config.max_tokens,
            # Drawing waits for memory, scoring and learning for products: one share of the peak says nothing of either.
            flops_per_token=math.nan,
            identity=run_identity(config, read_from),
            plateau=PlateauConfig(),
            best_metric="",
            waits=True,
            evaluate_first=True,
            headline=lambda v: f"reward {v['rl/reward']:.3f}  KL {v['rl/kl']:.3f}  ended {v['rl/eos_rate']:.0%}",
            enough=lambda state: bool(config.kl_budget) and float(state.kl) > config.kl_budget,
        )
        outcome = train(task, config.loop, config.workdir, watchdog)
        reward = outcome.evaluation.get("eval/reward")
        summary = summary_with(outcome, reward, "reward {:.3f} held out", time.monotonic() - began)
        if stopped_early(outcome, config.loop.stop_at_step, config.steps):
            return summary
        watchdog.enter("save")
        if jax.process_index() == 0:
            draw_frontier(config.workdir)
        facts = {"summary": summary, "row_length": directories.policy.context_tokens()}
        facts |= {"temperature": config.temperature}
        made = outcome.state.policy.ema or outcome.state.policy.params
        write_tuned(config, outcome, made, tuned, mesh, inputs=read_from, facts=facts, chat_template=template)
    return summary
