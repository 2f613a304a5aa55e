"""The heads of a reward model beside its adapters in peft's directories: in and out.

With task_type SEQ_CLS, peft keeps the head of a sequence classifier whole: score.weight, [criteria, D]. Its classes add
no bias and an adapter has no names of labels, so ours stand in the metadata of the safetensors file, which peft does
not look at: a key of adapter_config.json that it does not know makes it warn that it is too old (0.21) or fail.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.base.errors import UserError
from jaxlm.hub.hugging_face import TYPES
from jaxlm.model.config import ModelConfig
from jaxlm.model.weights import Definition, Params
from jaxlm.train import model_directory

TASK, NAME = "SEQ_CLS", "base_model.model.score.weight"
# What peft keeps whole of a sequence classifier, whichever of them it has; ours have the second.
MODULES = ["classifier", "score"]


@dataclasses.dataclass(frozen=True)
class Head:
    """Scalar heads, one for each of the criteria."""

    criteria: tuple[str, ...]
    score: np.ndarray
    """float32 [D, C]"""
    bias: np.ndarray
    """float32 [C]"""

    def params(self) -> Params:
        return {"score": self.score, "score_bias": self.bias}

    def tensors(self) -> dict[str, np.ndarray]:
        """Beside those of the adapters."""
        return {NAME: np.ascontiguousarray(self.score.T)}

    def metadata(self) -> dict[str, str]:
        return {"criteria": json.dumps(self.criteria), "score_bias": json.dumps(self.bias.tolist())}


def is_head(values: Mapping[str, Any]) -> bool:
    """Whether "modules_to_save" of an adapter_config.json names no more than a sequence classifier's head."""
    saved = values.get("modules_to_save")
    return values.get("task_type") == TASK and isinstance(saved, list) and all(name in MODULES for name in saved)


def trained(definition: Definition, params: Params, criteria: tuple[str, ...]) -> Head | None:
    """The heads in a state's parameters, which the definition declares; all processes call it together."""
    heads = definition.part(lambda w: w.name in ("score", "score_bias"))
    held = dict(model_directory.host_tensors(heads, params))
    return Head(criteria, held["score"], held["score_bias"]) if held else None


def taken(
    given: dict[str, np.ndarray],
    metadata: Mapping[str, str],
    values: Mapping[str, Any],
    config: ModelConfig,
    where: str,
) -> Head | None:
    """The head among an adapter's tensors, which it then leaves; `config`: the base's.

    None where it is no reward model's, or the base's own heads go on. Labels without names are called as the import of
    such a model calls them. Raises UserError where a reward model has no head, or one of another form than the base's.
    """
    if values.get("task_type") != TASK or not config.causal:
        return None
    if NAME not in given:
        if config.criteria:
            return None
        raise UserError(f"{where}: has no {NAME}, and task_type is {TASK}: no head is there to give rewards")
    score = given.pop(NAME)
    if score.ndim != 2 or score.shape[1] != config.width or score.dtype not in TYPES.values():
        raise UserError(f"{where}: {NAME} is {score.dtype}{list(score.shape)}, but [labels, {config.width}] is needed")
    labels = len(score)
    unnamed = ("overall",) if labels == 1 else tuple(f"LABEL_{number}" for number in range(labels))
    try:
        criteria = tuple(map(str, json.loads(metadata.get("criteria", "[]")))) or config.criteria or unnamed
        bias = np.array(json.loads(metadata.get("score_bias", "[]")) or [0] * labels, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{where}: criteria or score_bias in its metadata is no list: {dict(metadata)}") from None
    if len(criteria) != labels or len({*criteria}) != labels or bias.shape != (labels,):
        raise UserError(f"{where}: has {labels} labels, but criteria {criteria} and a bias of {bias.tolist()}")
    if config.criteria not in ((), criteria):
        raise UserError(f"{where}: scores {criteria}, but its base is a reward model that scores {config.criteria}")
    return Head(criteria, np.ascontiguousarray(score.astype(np.float32).T), bias)
