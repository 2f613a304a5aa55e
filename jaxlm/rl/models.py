"""The models of reinforcement learning: policy and value function learn; reference and reward model stay."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.base import manifest, precision, sharding
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data.loader import Loader
from jaxlm.data.mixture import History
from jaxlm.model.attention import chosen, fitting_length
from jaxlm.model.config import ModelConfig, adapted
from jaxlm.model.lora import trained
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params
from jaxlm.rl import prompts
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import RLConfig
from jaxlm.rl.learner import Models, updates_a_rollout, weighted
from jaxlm.rl.rolling import CompletionLog
from jaxlm.train.model_directory import ModelDirectory
from jaxlm.train.state import TrainState, abstract_rows, initial_state, state_shardings, with_shardings


@dataclasses.dataclass(frozen=True)
class Directories:
    policy: ModelDirectory
    """the policy as it begins, and the reference"""
    reward: ModelDirectory | None

    def checked(self, config: RLConfig) -> "Directories":
        """Itself. Raises UserError where a model is of the wrong kind, or the two do not read text alike."""
        if self.policy.config.criteria:
            raise UserError(f"model: {config.model} is a reward model; a language model is needed")
        tokens = config.max_prompt_tokens + config.max_tokens
        for field, directory in (("model", self.policy), ("reward_model", self.reward)):
            context = directory.manifest.facts.get("row_length", 0) if directory else 0
            if context and tokens > context:
                raise ConfigError(
                    "max_tokens",
                    f"{tokens} tokens with max_prompt_tokens, but {field} was trained on rows of {context}",
                )
        for source in config.ppo.pretraining if config.ppo else ():
            facts = manifest.read(source.path, "rows", "ppo.pretraining").facts
            if facts["tokenizer_hash"] != self.policy.tokenizer().hash:
                raise UserError(f"ppo.pretraining: {source.path} was packed with another tokenizer than the policy's")
            tokens = config.ppo.pretraining_rows * facts["row_length"] if config.ppo else 0
            if config.loss_chunk_tokens and tokens > config.loss_chunk_tokens and tokens % config.loss_chunk_tokens:
                raise ConfigError("loss_chunk_tokens", f"{config.loss_chunk_tokens} does not divide {tokens} of rows")
        if self.reward is not None:
            template = self.policy.chat_template()
            check_reward_model(
                self.reward,
                [criterion.name for criterion in config.criteria],
                tokenizer=self.policy.tokenizer().hash,
                template=template.hash if template else "",
                whose="the policy's",
            )
        return self


def check_reward_model(
    reward: ModelDirectory, criteria: Sequence[str], *, tokenizer: str, template: str, whose: str
) -> None:
    """Raises UserError where it is none, has not all the criteria, or reads text otherwise than by the tokenizer and
    the chat template of these hashes; `whose` they are."""
    known = reward.config.criteria
    if not known:
        raise UserError(f"reward_model: {reward.folder} is a language model; the stage reward makes one")
    for name in criteria:
        if name not in known:
            raise ConfigError("criteria", f"the reward model has no {name!r}; it has {', '.join(known)}")
    if reward.tokenizer().hash != tokenizer:
        raise UserError(f"reward_model: was trained with another tokenizer than {whose}")
    own = reward.chat_template()
    if (own.hash if own else "") != template:
        raise UserError(f"reward_model: was trained with another chat template than {whose}")


def row_length(config: RLConfig, shape: ModelConfig, mesh: Mesh) -> int:
    """S: what a prompt and its answer need, and what makes the rows fit the platform's attention."""
    return fitting_length(shape, mesh.devices.flat[0].platform, config.max_prompt_tokens + config.max_tokens)


def define_models(config: RLConfig, directories: Directories, mesh: Mesh) -> Models:
    length = row_length(config, directories.policy.config, mesh)
    fitting = lambda shape: chosen(shape, mesh.devices.flat[0].platform, length)
    policy = fitting(directories.policy.config)
    reward = fitting(directories.reward.config) if directories.reward else None
    tokens = directories.policy.tokenizer().vocab_size
    value = dataclasses.replace(reward or policy, criteria=("value",)) if config.ppo else None
    # What is not trained lies in the compute type, in which its products are taken anyway.
    under = lambda shape: adapted(shape, config.lora, adapters=False) if config.lora else shape
    frozen = lambda shape, base: define_model(under(shape) if base else shape, precision.dtype(shape.compute))

    def learning(shape: ModelConfig) -> Definition:
        if config.lora is None:
            return define_model(shape)
        return define_model(adapted(shape, config.lora), precision.dtype(shape.compute))

    return Models(
        policy=learning(policy),
        reference=frozen(policy, True),
        value=learning(value) if value else None,
        # Under adapters it is what the value function lies over.
        reward=frozen(reward, value is not None) if reward else None,
        criteria=reward.criteria if reward else (),
        vocabulary=tokens if tokens < policy.vocab_size else None,
    )


class Part:
    """A model that learns: its state's shapes and places, and the state with given first parameters."""

    def __init__(
        self,
        definition: Definition,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        ema: bool = False,
        spike_window: int = 0,
    ):
        definition = trained(definition)
        self._make = functools.partial(initial_state, optimizer=optimizer, ema=ema, spike_window=spike_window)
        abstract = jax.eval_shape(self._make, definition.abstract())
        self.placed: TrainState = state_shardings(abstract, definition, mesh)
        self.abstract: TrainState = with_shardings(abstract, self.placed)

    def initial(self, params: Params) -> TrainState:
        """`params` are used up."""
        return jax.jit(self._make, out_shardings=self.placed, donate_argnums=0)(params)


Begin = Callable[[Definition, str, Any], Params]
"""(definition, "reference" or "reward", shardings) → the first adapters over those frozen weights."""


def first_policy(config: RLConfig, directories: Directories, models: Models, placed: Any, begin: Begin) -> Params:
    """The policy's parameters as they begin: the model's, or adapters over it."""
    if config.lora is None:
        return directories.policy.load_params(models.policy, placed)
    return begin(models.policy, "reference", placed)


def first_value(config: RLConfig, directories: Directories, models: Models, placed: Any, begin: Begin) -> Params:
    """The value function as it begins: the reward model's score, or the policy with a head of zeros."""
    source = directories.reward or directories.policy
    definition = part = define_model(source.config)
    if config.lora is not None:
        part = definition.part(lambda w: w.name in ("score", "score_bias"))
    params = source.load_params(definition, part.shardings(placed["score"].mesh), part=part)

    def heads(params: Params) -> Params:
        if not source.config.criteria:
            return {"score": jnp.zeros((source.config.width, 1)), "score_bias": jnp.zeros(1)}
        whole = functools.partial(weighted, config, source.config.criteria)
        return {"score": whole(params["score"])[:, None], "score_bias": whole(params["score_bias"][None, :])}

    given = {name: params.pop(name) for name in ("score", "score_bias", "head") if name in params}
    made = params | jax.jit(heads, out_shardings={name: placed[name] for name in ("score", "score_bias")})(given)
    if config.lora is None or models.value is None:
        return made
    return begin(models.value, "reward", placed) | made


def load_frozen(directories: Directories, models: Models, like: dict[str, Any]) -> dict[str, Params]:
    """Reference and reward model, where and as `abstract_batch` says."""
    placed = jax.tree.map(lambda x: x.sharding, like)
    frozen = {"reference": directories.policy.load_params(models.reference, placed["reference"])}
    if directories.reward is not None and models.reward is not None:
        frozen["reward"] = directories.reward.load_params(models.reward, placed["reward"])
    return frozen


def abstract_batch(config: RLConfig, models: Models, mesh: Mesh, S: int) -> dict[str, Any]:
    """Shapes and places of all that an iteration takes beside the state; `S`: from `row_length`."""
    frozen = {"reference": with_shardings(models.reference.abstract(), models.reference.shardings(mesh))}
    if models.reward is not None:
        frozen["reward"] = with_shardings(models.reward.abstract(), models.reward.shardings(mesh))
    answers = config.prompts * config.samples
    batch: dict[str, Any] = {"frozen": frozen, "rollout": rollouts.abstract(mesh, answers, S, config.max_tokens)}
    if config.ppo is not None and config.ppo.pretraining:
        facts = manifest.read(config.ppo.pretraining[0].path, "rows", "ppo.pretraining").facts
        rows = config.ppo.pretraining_rows * updates_a_rollout(config)
        batch["pretraining"] = abstract_rows(mesh, rows, facts["row_length"])
    return batch


def pretraining_rows(config: RLConfig, mesh: Mesh, step: int, history: History) -> Iterator[Any] | None:
    """PPO-ptx: each rollout's pretraining rows, those of all its updates together."""
    if config.ppo is None or not config.ppo.pretraining:
        return None
    rows = config.ppo.pretraining_rows * updates_a_rollout(config)
    loader = Loader(
        [(source.path, source.weight) for source in config.ppo.pretraining],
        "train",
        global_batch=rows,
        seed=config.seed,
        own=sharding.own_rows(mesh, rows),
    )
    return (sharding.global_batch(mesh, batch, rows) for _, batch in loader.with_history(history).batches(step))


def batches(config: RLConfig, asked: list[prompts.Prompt], mesh: Mesh) -> Any:
    """The prompts of each step, and PPO-ptx's pretraining rows beside them."""
    order = prompts.Order(asked, config.prompts, config.seed, config.exclude)
    extra = config.grpo.extra_prompts if config.grpo else 0

    def from_step(step: int, history: Any) -> Iterator[dict[str, Any]]:
        CompletionLog(config.workdir, config.shown_completions).cut(step)
        mixed = pretraining_rows(config, mesh, step, history)
        for number, some in order.from_step(step):
            rows = {"pretraining": next(mixed)} if mixed else {}
            yield {"step": number, "prompts": some, "fresh": order.fresh(number, extra), "rows": rows}

    return from_step
