"""The end of a training stage: the model on disk, and the manifest that says that the run is over."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxlm.base import manifest
from jaxlm.base.config import StageConfig, identity
from jaxlm.base.logging import logger
from jaxlm.model.config import ModelConfig
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.train import model_directory
from jaxlm.train.loop import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What stands in the manifests of a trained model."""

    config: StageConfig
    inputs: Mapping[str, str]
    facts: Mapping[str, Any]
    """"summary" and "row_length" among them"""


def write_model(
    made: Made,
    params: Any,
    model: ModelConfig,
    tokenizer_folder: epath.PathLike,
    mesh: Mesh,
    chat_template: ChatTemplate | None = None,
) -> None:
    """WORKDIR/model and WORKDIR/manifest.json; all processes call it together."""
    made_with: Any = dict(inputs=made.inputs, config=identity(made.config), facts=made.facts)
    folder = f"{made.config.workdir}/model"
    with jax.set_mesh(mesh):
        model_directory.write(folder, params, model, tokenizer_folder, chat_template=chat_template, **made_with)
    if jax.process_index() == 0:
        manifest.write(made.config.workdir, "run", contents=["model"], **made_with)


def stopped_early(outcome: Outcome, stop_at_step: int, steps: int) -> bool:
    """Whether the run ended where it was told to, so that there is no model yet; says so."""
    if not 0 < stop_at_step < steps or outcome.step != stop_at_step:
        return False
    logger.info("stopped at step %d, as told; without loop.stop_at_step the run goes on", outcome.step)
    return True


def summary_of(outcome: Outcome, metric: str, seconds: float) -> dict[str, Any]:
    """The stage's line in `run`'s table."""
    bits = outcome.evaluation.get(metric)
    return {
        "seconds": seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "figure": f"{bits:.3f} bits a byte held out" if bits else f"step {outcome.step}",
    }
