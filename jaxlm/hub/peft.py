"""Adapters as Hugging Face's peft keeps them: adapter_config.json and adapter_model.safetensors, in and out.

A tensor of theirs is A or B of a torch Linear, turned ([r, in] and [out, r]), or DoRA's magnitudes, under the name that
the base's family gives the matrix. Where several of ours lie in one of theirs (Phi-3's qkv_proj, GPT-2's c_attn, NeoX's
query_key_value), these share its A, and each has its own rows of B. The other way round, n matrices of rank r become
one of rank n r, their A's one after the other and B zero but for each one's block: the same product; ranks that differ
from module to module stand in rank_pattern. Beside a reward model's adapters lie its heads (`peft_head`). Whatever else
changes the product is refused by name.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.logging import logger
from jaxlm.hub import families, peft_experts, peft_head
from jaxlm.hub.family import Family
from jaxlm.hub.hugging_face import TYPES, Tensor, outputs, split, tensors_of
from jaxlm.model.config import LoRAConfig, ModelConfig
from jaxlm.model.lora import is_adapter
from jaxlm.model.transformer import for_inference
from jaxlm.model.weights import Definition, Params
from jaxlm.train import model_directory
from jaxlm.train.processes import from_first

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# What changes nothing of a finished adapter's products; `target_modules` are read off the tensors.
INERT = (
    *("base_model_name_or_path", "inference_mode", "revision", "task_type", "auto_mapping", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "runtime_config", "qalora_group_size"),
    *("layers_to_transform", "layers_pattern", "ephemeral_gpu_offload", "megatron_core", "init_lora_weights"),
    *("corda_config", "eva_config", "loftq_config"),
)
# These start from a changed base, which an adapter saved as it is does not have beside it.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was read; nothing of its base."""

    lora: LoRAConfig
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    """Our name of a matrix, such as layers.0.attention.query → float32 "a" [in, r], "b" [r, out], "magnitude" [out]; of
    experts with the axis E in front."""
    head: peft_head.Head | None = None
    """A reward model's, in place of the base's head or heads."""

    def shape(self, base: ModelConfig) -> ModelConfig:
        """What its base becomes, adapters aside: with a head, a reward model."""
        return base if self.head is None else dataclasses.replace(base, criteria=self.head.criteria)

    def beside(self, base: Params, definition: Definition) -> Params:
        """The parameters that `definition` declares: a base's with unrolled layers, and these adapters, zeros in layers
        that have none. A router takes none: they are merged into it."""
        held: Any = base | (self.head.params() if self.head else {})
        leaves: list[Any] = []
        for path, declared in definition:
            own, _, part = path[-1].partition("_lora_")
            name = ".".join((*path[:-1], own))
            kernel = functools.reduce(operator.getitem, (*path[:-1], own), held)
            if own == "router":
                leaves.append(jnp.asarray(self.merged(name, kernel), kernel.dtype))
            elif not part:
                leaves.append(kernel)
            elif name in self.tensors:
                leaves.append(self.tensors[name][part])
            elif part == "magnitude":
                leaves.append(np.linalg.norm(np.asarray(kernel, np.float32), axis=-2))
            else:
                leaves.append(np.zeros(declared.shape, np.float32))
        return definition.filled(leaves)

    def merged(self, name: str, kernel: Any) -> Any:
        """The matrix of that name with its change in it, made when numpy asks for it; itself where it has none."""
        return Merged(kernel, self.tensors[name], self.lora.scale) if name in self.tensors else kernel


@dataclasses.dataclass(frozen=True)
class Merged:
    kernel: Any
    parts: Mapping[str, np.ndarray]
    scale: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.asarray(self.kernel) + np.float32(self.scale) * (self.parts["a"] @ self.parts["b"])
        if "magnitude" in self.parts:
            whole *= (self.parts["magnitude"] / np.linalg.norm(whole, axis=-2))[..., None, :]
        return whole


def family_of(base: model_directory.ModelDirectory) -> Family:
    """The family a model was imported as, else the first that has such models. Raises UserError where none has."""
    origin = base.manifest.facts.get("hugging_face") or {}
    return families.find(base.config, origin.get("model_type", ""))[0]


def modules(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Their module (or parameter, of experts) → its matrix, those of the layers that adapters can lie beside."""
    weights = [w for _, w in for_inference(config)[1] if w.matrix and w.layers and "experts" not in w.axes]
    ours = {name for w in weights for name, _ in model_directory.tensor_shapes(w)}
    tensors = [tensor for tensor in tensors_of(family, config) if tensor.parts[0][0] in ours]
    found = {peft_experts.renamed(tensor.name.removesuffix(".weight")): tensor for tensor in tensors}
    return found | peft_experts.parameters(family, config)


def read(folder: epath.PathLike, family: Family, config: ModelConfig) -> Adapter:
    """An adapter of a base of this family and config. Raises UserError for whatever is not understood, by name."""
    folder = epath.Path(folder)
    where = folder / CONFIG
    if not where.exists():
        raise UserError(f"adapter: {folder} holds no {CONFIG}; a directory that peft's save_pretrained wrote is needed")
    values = files.read_json(where)
    lora = _config(values, str(where))
    try:
        with safetensors.safe_open(folder / TENSORS, framework="np") as stored:
            given = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            metadata = stored.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{TENSORS}: is not a sound safetensors file: {error}") from None
    tensors: dict[str, dict[str, np.ndarray]] = {}
    ranks: dict[str, LoRAConfig] = {}
    known = modules(family, config)
    adapted = _parameters(values, known, str(where))
    one_by_one: dict[str, list[dict[str, np.ndarray]]] = {}
    for module, tensor in (known | peft_experts.one_by_one(family, config)).items():
        if peft_experts.is_parameter(module) and module not in adapted:
            continue
        named = peft_experts.as_parameter(module) if module in adapted else module
        own = dataclasses.replace(lora, **_own(values, named, str(where)))
        parts = _taken(given, peft_experts.where(module, adapted), tensor, own, f"{folder}/{TENSORS}")
        if not parts:
            continue
        cut = {part: split(tensor, value) for part, value in parts.items() if part != "a"}
        for number, (name, _) in enumerate(tensor.parts):
            if ranks.setdefault(name, own) != own:
                raise UserError(
                    f"{where}: {name} has adapters of several ranks or scales; one for all experts is needed"
                )
            tensors[name] = {"a": parts["a"]} | {part: pieces[number] for part, pieces in cut.items()}
            if tensor.expert >= 0:
                one_by_one.setdefault(name, []).append(tensors[name])
    tensors |= peft_experts.stacked(one_by_one, config.experts.count, str(folder))
    head = peft_head.taken(given, metadata, values, config, f"{folder}/{TENSORS}")
    if given:
        raise UserError(
            f"{folder}/{TENSORS}: is not understood for a {family.model_type} base: {', '.join([*given][:8])}"
        )
    if not tensors:
        raise UserError(f"{folder}/{TENSORS}: holds no adapter")
    kinds = sorted({_kind(name) for name in tensors})
    found = _of_one_rank(dataclasses.replace(lora, targets=tuple(kinds)), tensors, ranks)
    return dataclasses.replace(found, head=head)


def _taken(
    given: dict[str, np.ndarray], module: str, tensor: Tensor, lora: LoRAConfig, where: str
) -> dict[str, np.ndarray]:
    """The adapter that stands under a module's name, taken out of what is given; {} where there is none."""
    shape = (*tensor.parts[0][1][:-1], sum(shape[-1] for _, shape in tensor.parts))
    parts = {}
    for part, theirs in PARTS.items():
        name = f"{module}.{theirs}"
        value = given.pop(PREFIX + name, None)
        if value is None and part == "magnitude":
            value = given.pop(f"{PREFIX}{name}.weight", None)
        if value is not None:
            parts[part] = _checked(name, value, part, shape, lora.rank, where)
    if parts and set(parts) != ({"a", "b", "magnitude"} if lora.dora else {"a", "b"}):
        raise UserError(f"{where}: {module} has only {', '.join(PARTS[part] for part in parts)}")
    return parts


def _kind(name: str) -> str:
    """The name of a matrix in all layers: layers/attention/query of layers.3.attention.query."""
    return "/".join(("layers", *name.split(".")[2:]))


def _of_one_rank(lora: LoRAConfig, tensors: dict[str, dict[str, np.ndarray]], ranks: dict[str, LoRAConfig]) -> Adapter:
    """The same adapters with the rank of the largest, zeros in the others, and one scale, the rest of it in B."""
    largest = max(ranks.values(), key=lambda own: own.rank)
    for name, own in ranks.items():
        if own != largest:
            parts, room = tensors[name], largest.rank - own.rank
            each = [(0, 0)] * (parts["a"].ndim - 2)
            parts["a"] = np.pad(parts["a"], (*each, (0, 0), (0, room)))
            parts["b"] = np.pad(parts["b"] * np.float32(own.scale / largest.scale), (*each, (0, room), (0, 0)))
    return Adapter(dataclasses.replace(lora, rank=largest.rank, alpha=largest.alpha), tensors)


def _parameters(values: dict[str, Any], known: dict[str, Tensor], where: str) -> set[str]:
    """Those of the known modules and parameters that are named as parameters."""
    targets = values.get("target_parameters") or []
    targets = targets if isinstance(targets, list) else [targets]
    named = {peft_experts.as_parameter(module): module for module in known}
    found = set()
    for target in targets:
        meant = {module for name, module in named.items() if f".{name}".endswith(f".{target}")}
        if not meant:
            raise UserError(f"{where}: target_parameters={target!r} is not understood; matrices of the layers are")
        if not all(known[module].rule.turned or peft_experts.is_parameter(module) for module in meant):
            raise UserError(f"{where}: target_parameters={target!r} lies [in, out], which peft takes for [out, in]")
        found |= meant
    return found


def _own(values: dict[str, Any], module: str, where: str) -> dict[str, Any]:
    """The own rank and alpha of a module, or of a parameter by its name, of patterns that are names or their ends."""
    found = {}
    for field, key in (("rank", "rank_pattern"), ("alpha", "alpha_pattern")):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{where}: {key} is no object")
        for given, value in pattern.items():
            name = given.removeprefix(r".*\.")  # as peft writes it where it converted names of transformers 4
            if not re.fullmatch(r"\^?[\w.]+", name) or not isinstance(value, int | float) or value <= 0:
                raise UserError(f"{where}: {key}={{{given!r}: {value!r}}} is not understood; a name and a number are")
            if module == name.lstrip("^") or (name[0] != "^" and module.endswith(f".{name}")):
                found.setdefault(field, int(value) if field == "rank" else float(value))
    return found


def _checked(name: str, value: np.ndarray, part: str, shape: tuple[int, ...], rank: int, where: str) -> np.ndarray:
    """Ours of one of theirs, float32."""
    *experts, rows, columns = shape
    ranks = math.prod(experts) * rank
    expected = {"a": (ranks, rows), "b": (columns, ranks), "magnitude": (columns,)}[part]
    if value.shape != expected or value.dtype not in TYPES.values():
        raise UserError(f"{where}: {name} is {value.dtype}{list(value.shape)}, but {list(expected)} is needed")
    wide = value.astype(np.float32)
    return np.ascontiguousarray(peft_experts.turned_back(part, wide, *experts) if experts else wide.T)


def _config(values: Any, where: str) -> LoRAConfig:
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{where}: peft_type is {kind!r}; 'LORA' is understood")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise UserError(f"{where}: init_lora_weights is {start!r}, which changes the base; save it converted to a LoRA")
    known = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
    known = (*known, "target_parameters", *INERT)
    known = (*known, "modules_to_save") if peft_head.is_head(values) else known
    other = {
        key: value for key, value in values.items() if key not in known and value and (key, value) != ("bias", "none")
    }
    if other:
        shown = ", ".join(f"{key}={value!r}" for key, value in other.items())
        raise UserError(f"{where}: {shown} is not understood")
    try:
        return LoRAConfig(
            rank=values.get("r", 8),
            alpha=float(values.get("lora_alpha", 8)),
            dora=bool(values.get("use_dora", False)),
            rank_stabilised=bool(values.get("use_rslora", False)),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def warn_unsaid(trained: Definition, base: model_directory.ModelDirectory, lora: LoRAConfig) -> None:
    """Before a run: says that `write` will write nothing, where peft has no form for what is `trained`."""
    try:
        _said(modules(family_of(base), base.config), trained.part(is_adapter), lora)
    except UserError as error:
        logger.warning("no adapter/ will be written, model/ will have all of it: %s", error)


def write(
    folder: epath.PathLike, params: Params, trained: Definition, base: model_directory.ModelDirectory, lora: LoRAConfig
) -> bool:
    """WORKDIR/adapter of a state's parameters, which `trained` declares; all processes call it together. `base`: the
    model that they lie beside, its config with the criteria of the heads among them.

    False, and a line in the log with the reason, where no family of peft's bases can say it.
    """
    try:
        known = modules(family_of(base), base.config)
        said = _said(known, trained.part(is_adapter), lora)
    except UserError as error:
        logger.info("%s is not written, model/ has all of it: %s", folder, error)
        return False
    made = _theirs(said, params, trained.part(is_adapter))
    ranks = {module: parts["a"].shape[-1] for module, parts in made.items()}
    head = peft_head.trained(trained, params, base.config.criteria)
    last = {module.rpartition(".")[2]: rank for module, rank in ranks.items()}
    if all(last[module.rpartition(".")[2]] == rank for module, rank in ranks.items()):
        ranks = last
    ranks = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    turned = {tensor.rule.turned for tensor in known.values()}
    target_modules, target_parameters = peft_experts.targets(made, known)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else peft_head.TASK,
        "modules_to_save": None if head is None else peft_head.MODULES,
        "base_model_name_or_path": str(base.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": ranks,
        # Under which the scale is that of the others.
        "alpha_pattern": {
            name: lora.scale * (rank**0.5 if lora.rank_stabilised else rank) for name, rank in ranks.items()
        },
        "lora_dropout": 0.0 if target_parameters else lora.dropout,  # there, peft refuses any
        "use_dora": lora.dora,
        "use_rslora": lora.rank_stabilised,
        "target_modules": target_modules,
        "target_parameters": target_parameters or None,
        "bias": "none",
        "fan_in_fan_out": turned == {False},
        "inference_mode": True,
    }
    out = lambda part, value: peft_experts.turned(part, value) if value.ndim == 3 else value.T
    theirs = {
        f"{PREFIX}{peft_experts.where(module, made)}.{PARTS[part]}": np.ascontiguousarray(out(part, value))
        for module, parts in made.items()
        for part, value in parts.items()
    }
    folder, metadata = epath.Path(folder), {"format": "pt"}
    if head is not None:
        theirs, metadata = theirs | head.tensors(), metadata | head.metadata()
    from_first(lambda: files.write_bytes(folder / TENSORS, safetensors.numpy.save(theirs, metadata)))
    from_first(lambda: files.write_json(folder / CONFIG, values))
    return True


def _said(known: dict[str, Tensor], adapters: Definition, lora: LoRAConfig) -> dict[str, Tensor]:
    """Those of their modules that have adapters. Raises UserError for what they cannot say."""
    ours = {name.partition("_lora_")[0] for _, w in adapters for name, _ in model_directory.tensor_shapes(w)}
    said = {name for tensor in known.values() for name, _ in tensor.parts}
    if unsaid := sorted({_kind(name) for name in ours - said}):
        raise UserError(f"peft has no form for adapters of {', '.join(unsaid)}")
    found = {module: tensor for module, tensor in known.items() if any(name in ours for name, _ in tensor.parts)}
    _, parameters = peft_experts.targets(found, known)
    if lora.dora and parameters:
        raise UserError(f"peft has no DoRA beside {', '.join(parameters)}")
    for tensor in found.values():
        if lora.dora and not all(name in ours for name, _ in tensor.parts):
            raise UserError(f"peft has no DoRA beside a part of {tensor.name} alone; target all of its parts")
    return found


def _theirs(said: dict[str, Tensor], params: Params, adapters: Definition) -> dict[str, dict[str, np.ndarray]]:
    """Their module → its adapter, still turned as ours."""
    ours: dict[str, dict[str, np.ndarray]] = {}
    for name, value in model_directory.host_tensors(adapters, params):
        whose, _, part = name.partition("_lora_")
        ours.setdefault(whose, {})[part] = np.asarray(value)
    held = lambda tensor: [ours.get(name, {}) for name, _ in tensor.parts]
    return {module: _joined(tensor, held(tensor)) for module, tensor in said.items()}


def _joined(tensor: Tensor, held: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One adapter of theirs, of those of the parts that have one."""
    own = [parts["a"] for parts in held if parts]
    rank = own[0].shape[-1]
    blocks, first = [], 0
    for parts, (_, shape) in zip(held, tensor.parts, strict=True):
        block = np.zeros((*shape[:-2], rank * len(own), shape[-1]), np.float32)
        if parts:
            block[..., first : first + rank, :] = parts["b"]
            first += rank
        blocks.append(block)
    made = {"a": np.concatenate(own, axis=-1), "b": outputs(tensor, blocks)}
    if "magnitude" in held[0]:
        made["magnitude"] = outputs(tensor, [parts["magnitude"] for parts in held])
    return made
