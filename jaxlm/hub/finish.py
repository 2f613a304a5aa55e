"""The end of a training stage: the model on disk, and the manifest that says that the run is over."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath
from jax.sharding import Mesh

from jaxlm.base import files, manifest
from jaxlm.base.config import StageConfig, identity
from jaxlm.base.logging import logger
from jaxlm.hub import peft
from jaxlm.model.config import LoRAConfig, ModelConfig
from jaxlm.model.weights import Definition, Params
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.train import model_directory
from jaxlm.train.loop import Outcome
from jaxlm.train.processes import from_first


def write_model(
    config: StageConfig,
    outcome: Outcome,
    params: Any,
    model: ModelConfig,
    mesh: Mesh,
    *,
    tokenizer: epath.PathLike,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
    chat_template: ChatTemplate | None = None,
) -> None:
    """WORKDIR/model and WORKDIR/manifest.json; all processes call it together.

    `tokenizer` is the folder that has it. The manifests get the steps and held-out figures of the outcome beside
    `facts`, which have "summary" and "row_length".
    """
    told = {"steps": outcome.step, **facts, **outcome.evaluation}
    made_with: Any = dict(inputs=inputs, config=identity(config), facts=told)
    with jax.set_mesh(mesh):
        written = model_directory.write(
            f"{config.workdir}/model", params, model, tokenizer, chat_template=chat_template, **made_with
        )

    def finish() -> None:
        assert written is not None  # on process 0
        # Not the model's manifest, to which the gate adds its verdict.
        contents = [f"model/{name}" for name in written.files]
        manifest.write(config.workdir, "run", contents=contents, **made_with)

    from_first(finish)  # the others wait: a reward model is read back at once, by all


class Tuned(Protocol):
    """What a stage trained of a model: `adapters/training.Tuned`."""

    @property
    def lora(self) -> LoRAConfig | None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def model(self) -> model_directory.ModelDirectory: ...

    @property
    def trained(self) -> Definition: ...

    def merged(self, params: Params) -> Params: ...


def warn_of_adapter(tuned: Tuned) -> None:
    """Before a run: where its adapters will not be written beside its model, says so and why."""
    if tuned.lora is not None:
        peft.warn_unsaid(tuned.trained, tuned.model, tuned.lora)


def write_tuned(
    config: StageConfig,
    outcome: Outcome,
    params: Params,
    tuned: Tuned,
    mesh: Mesh,
    *,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
    chat_template: ChatTemplate | None,
    finished: Params | None = None,
) -> None:
    """The same of a model whose state has these `params`; and WORKDIR/adapter, where they are adapters.

    `finished`: the merged model, where the stage did more to it; then the heads beside the adapters are its own.
    """
    shape = dataclasses.replace(tuned.model.config, criteria=tuned.config.criteria)
    if tuned.lora is not None:  # before the merge, which may find no memory
        heads = {} if finished is None else {name: finished[name] for name in ("score", "score_bias")}
        beside = dataclasses.replace(tuned.model, config=shape)
        folder = f"{config.workdir}/adapter"
        said = peft.write(folder, params | heads, tuned.trained, beside, tuned.lora)
        if said and tuned.lora.base != "compute":
            told = "%s goes with the base as it is stored: over that it gives other numbers than model/, which has %s's"
            logger.info(told, folder, tuned.lora.base)
        if said and chat_template is not None:  # the base has another, or none
            source = chat_template.source.encode()
            from_first(lambda: files.write_bytes(f"{folder}/{chat.FILE_NAME}", source))
    given: Any = dict(tokenizer=tuned.model.folder, inputs=inputs, facts=facts, chat_template=chat_template)
    write_model(config, outcome, tuned.merged(params) if finished is None else finished, shape, mesh, **given)


def stopped_early(outcome: Outcome, stop_at_step: int, steps: int) -> bool:
    """Whether the run ended where it was told to, so that there is no model yet; says so."""
    if not 0 < stop_at_step < steps or outcome.step != stop_at_step:
        return False
    logger.info("stopped at step %d, as told; without loop.stop_at_step the run goes on", outcome.step)
    return True


def summary_of(outcome: Outcome, metric: str, seconds: float) -> dict[str, Any]:
    """The stage's line in `run`'s table."""
    unit = "bits a byte" if metric.endswith("bits_per_byte") else "nats a missing word"
    return summary_with(outcome, outcome.evaluation.get(metric), f"{{:.3f}} {unit} held out", seconds)


def summary_with(outcome: Outcome, found: float | None, told: str, seconds: float) -> dict[str, Any]:
    """The same with a figure `found`, as `told` formats it; where there is none, the step that was reached."""
    figure = f"step {outcome.step}" if found is None else told.format(found)
    return {"seconds": seconds, "tokens_per_second": outcome.tokens_per_second, "figure": figure}
