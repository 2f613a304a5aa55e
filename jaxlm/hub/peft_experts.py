"""Adapters of experts as peft (of 0.21) keeps them: those of parameters, which `target_parameters` names.

transformers 5 has the experts' matrices of a layer in two parameters of one module, mlp.experts: gate_up_proj and
down_proj. An adapter of E experts is there A `[E r, in]`, expert by expert, and B `[out, r E]`, rank by rank; where
both parameters have adapters, those of gate_up_proj stand under experts.base_layer. peft takes no DoRA beside either.
Adapters of transformers 4, where each expert's matrices were modules, are read too.

Named in `target_modules`, gate_proj, up_proj and down_proj of a model with experts are taken for the experts' of old,
wherever they stand (`_convert_peft_config_moe`, 0.21). So those of dense layers and shared experts are named by their
parameters as well, under which an adapter is stored and computed as ever.
"""

from collections.abc import Collection, Mapping

import numpy as np

from jaxlm.base.errors import UserError
from jaxlm.hub.family import Family
from jaxlm.hub.hugging_face import Tensor, tensors_of
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import for_inference
from jaxlm.train import model_directory

MODULE = "mlp.experts"
OLD_NAMES = {"gate_proj", "up_proj", "down_proj"}
PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def parameters(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Their parameter, such as model.layers.0.mlp.experts.down_proj → ours in it, `[E, in, out]` each."""
    weights = [w for _, w in for_inference(config)[1] if w.matrix and "experts" in w.axes]
    shapes = dict(pair for declared in weights for pair in model_directory.tensor_shapes(declared))
    rules = {rule.ours[0]: rule for rule in family.rules}
    found = {}
    for layer in range(config.layers):
        for theirs, ours in PARAMETERS.items():
            rule = rules.get(f"layers.{{}}.experts.{ours[0]}")
            names = [f"layers.{layer}.experts.{name}" for name in ours]
            if rule is not None and names[0] in shapes:
                parts = tuple((name, shapes[name]) for name in names)
                # Experts of other families stand in checkpoints one by one, and transformers joins them.
                heads = parts[0][1][-1] if rule.in_turn else 1
                name = f"model.layers.{layer}.{MODULE}.{theirs}"
                found[name] = Tensor(name, (), rule, parts, heads)
    return found


def one_by_one(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """The modules that experts had one by one in transformers 4, where adapters of that time lie beside each, and other
    modules under names of that time."""
    found = {tensor.name.removesuffix(".weight"): tensor for tensor in tensors_of(family, config)}
    return {name: tensor for name, tensor in found.items() if tensor.expert >= 0 or name != renamed(name)}


def renamed(module: str) -> str:
    """A module's name in transformers 5: Mixtral's router is mlp.gate there, and in checkpoints as of old."""
    return module.replace(".block_sparse_moe.", ".mlp.")


def stacked(
    parts: Mapping[str, list[dict[str, np.ndarray]]], experts: int, where: str
) -> dict[str, dict[str, np.ndarray]]:
    """Adapters of all experts, of one after the other's."""
    for name, each in parts.items():
        if len(each) != experts:
            raise UserError(f"{where}: {name} has adapters in {len(each)} of {experts} experts; all are needed")
    return {name: {part: np.stack([one[part] for one in each]) for part in each[0]} for name, each in parts.items()}


def is_parameter(module: str) -> bool:
    return module.rpartition(".")[0].endswith(f".{MODULE}")


def as_parameter(module: str) -> str:
    """The name of a module's matrix as a parameter; experts' have no other."""
    return module if is_parameter(module) else f"{module}.weight"


def where(module: str, adapted: Collection[str]) -> str:
    """Under what name the adapters of a module stand, when those of `adapted` have some."""
    path, _, name = module.rpartition(".")
    if not is_parameter(module):
        return module
    return f"{path}.base_layer" if name == "gate_up_proj" and f"{path}.down_proj" in adapted else path


def targets(adapted: Collection[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """(`target_modules`, `target_parameters`) of adapters beside these of the known modules and parameters."""
    mixture = any(is_parameter(name) for name in known)
    named, parameters = set(), set()
    for name in adapted:
        last = name.rpartition(".")[2]
        if is_parameter(name) or (mixture and last in OLD_NAMES):
            parameters.add(as_parameter(name).partition(".layers.")[2].partition(".")[2])
        else:
            named.add(last)
    return sorted(named), sorted(parameters)


def turned(part: str, value: np.ndarray) -> np.ndarray:
    """Theirs of ours: A `[E r, in]` of `[E, in, r]`, B `[out, r E]` of `[E, r, out]`."""
    if part == "a":
        return value.swapaxes(-1, -2).reshape(-1, value.shape[-2])
    return value.transpose(2, 1, 0).reshape(value.shape[-1], -1)


def turned_back(part: str, value: np.ndarray, experts: int) -> np.ndarray:
    """The inverse of `turned`."""
    if part == "a":
        return value.reshape(experts, -1, value.shape[-1]).swapaxes(-1, -2)
    return value.reshape(len(value), -1, experts).transpose(2, 1, 0)
