"""Adapters as Hugging Face's peft keeps them: adapter_config.json and adapter_model.safetensors, in and out.

A tensor of theirs is A or B of a torch Linear, turned ([r, in] and [out, r]), or DoRA's magnitudes, under the name that
the base's family gives the matrix. Matrices that lie together in one of theirs (Phi-3's qkv, GPT-2's c_attn, NeoX's
query_key_value) have no adapters of their own there and are refused by name, as is all else that changes the product.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.logging import logger
from jaxlm.hub import families
from jaxlm.hub.family import Family
from jaxlm.hub.hugging_face import TYPES
from jaxlm.model.config import LoRAConfig, ModelConfig
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
    *(
        "lora_dropout",
        "target_modules",
        "fan_in_fan_out",
        "runtime_config",
        "ephemeral_gpu_offload",
        "qalora_group_size",
    ),
    *("corda_config", "eva_config", "loftq_config", "megatron_core", "init_lora_weights", "exclude_modules"),
)
# These start from a changed base, which an adapter saved as it is does not have beside it.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was read; nothing of its base."""

    lora: LoRAConfig
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    """Our name of a matrix, such as layers.0.attention.query → float32 "a" [in, r], "b" [r, out], "magnitude" [out]."""

    def params(self) -> Params:
        """As a model with unrolled layers has them."""
        tree: Params = {}
        for name, parts in self.tensors.items():
            *path, last = name.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node |= {f"{last}_lora_{part}": value for part, value in parts.items()}
        return tree

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
            whole *= (self.parts["magnitude"] / np.linalg.norm(whole, axis=0))[None, :]
        return whole


def family_of(base: model_directory.ModelDirectory) -> Family:
    """The family a model was imported as, else the first that has such models. Raises UserError where none has."""
    origin = base.manifest.facts.get("hugging_face") or {}
    return families.find(base.config, origin.get("model_type", ""))[0]


def modules(family: Family, config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Our name of a matrix of the layers → (their module, whether it lies there turned); "" where it shares one."""
    shapes = {name for _, w in for_inference(config)[1] for name, _ in model_directory.tensor_shapes(w) if w.matrix}
    found: dict[str, tuple[str, bool]] = {}
    for rule in family.rules:
        for layer in range(config.layers):
            names = [name.format(layer) for name in rule.ours]
            module = rule.theirs.format(layer).removesuffix(".weight") if len(names) == 1 else ""
            found |= {name: (module, rule.turned) for name in names if name in shapes}
    return found


def read(folder: epath.PathLike, family: Family, config: ModelConfig) -> Adapter:
    """An adapter of a base of this family and config. Raises UserError for whatever is not understood, by name."""
    folder = epath.Path(folder)
    where = folder / CONFIG
    if not where.exists():
        raise UserError(f"adapter: {folder} holds no {CONFIG}; a directory that peft's save_pretrained wrote is needed")
    lora = _config(files.read_json(where), str(where))
    try:
        with safetensors.safe_open(folder / TENSORS, framework="np") as stored:
            given = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder}/{TENSORS}: is not a sound safetensors file: {error}") from None
    names = dict(pair for _, w in for_inference(config)[1] for pair in model_directory.tensor_shapes(w))
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for ours, (module, _) in modules(family, config).items():
        parts = {}
        for part, theirs in PARTS.items():
            value = given.pop(f"{PREFIX}{module}.{theirs}", None) if module else None
            if value is None and part == "magnitude" and module:
                value = given.pop(f"{PREFIX}{module}.{theirs}.weight", None)
            if value is not None:
                parts[part] = _checked(f"{module}.{theirs}", value, part, names[ours], lora.rank, str(folder))
        if parts and set(parts) != ({"a", "b", "magnitude"} if lora.dora else {"a", "b"}):
            raise UserError(f"{folder}/{TENSORS}: {module} has only {', '.join(PARTS[part] for part in parts)}")
        if parts:
            tensors[ours] = parts
    if given:
        raise UserError(
            f"{folder}/{TENSORS}: is not understood for a {family.model_type} base: {', '.join([*given][:8])}"
        )
    kinds = {"/".join(("layers", *name.split(".")[2:])) for name in tensors}
    for kind in sorted(kinds):
        held = [name for name in tensors if name.split(".")[2:] == kind.split("/")[1:]]
        if len(held) != config.layers:
            raise UserError(f"{folder}: {kind} has adapters in {len(held)} of {config.layers} layers; all are needed")
    if not kinds:
        raise UserError(f"{folder}/{TENSORS}: holds no adapter")
    return Adapter(dataclasses.replace(lora, targets=tuple(sorted(kinds))), tensors)


def _checked(name: str, value: np.ndarray, part: str, shape: tuple[int, ...], rank: int, where: str) -> np.ndarray:
    """Ours of one of theirs, float32."""
    expected = {"a": (rank, shape[0]), "b": (shape[1], rank), "magnitude": (shape[1],)}[part]
    if value.shape != expected or value.dtype not in TYPES.values():
        raise UserError(
            f"{where}/{TENSORS}: {name} is {value.dtype}{list(value.shape)}, but {list(expected)} is needed"
        )
    return np.ascontiguousarray(value.astype(np.float32).T)


def _config(values: Any, where: str) -> LoRAConfig:
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise UserError(f"{where}: peft_type is {kind!r}; 'LORA' is understood")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise UserError(f"{where}: init_lora_weights is {start!r}, which changes the base; save it converted to a LoRA")
    known = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", *INERT)
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


def write(
    folder: epath.PathLike, params: Params, trained: Definition, base: model_directory.ModelDirectory, lora: LoRAConfig
) -> bool:
    """WORKDIR/adapter of a state's parameters, which `trained` declares; all processes call it together.

    False, and a line in the log with the reason, where no family of peft's bases can say it.
    """
    try:
        family = family_of(base)
        theirs = _theirs(family, params, trained, base.config)
    except UserError as error:
        logger.info("%s is not written, model/ has all of it: %s", folder, error)
        return False
    turned = {turned for name, (_, turned) in modules(family, base.config).items()}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_dora": lora.dora,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in theirs}),
        "bias": "none",
        "fan_in_fan_out": turned == {False},
        "inference_mode": True,
    }
    folder = epath.Path(folder)
    from_first(lambda: files.write_bytes(folder / TENSORS, safetensors.numpy.save(theirs, {"format": "pt"})))
    from_first(lambda: files.write_json(folder / CONFIG, values))
    return True


def _theirs(family: Family, params: Params, trained: Definition, config: ModelConfig) -> dict[str, np.ndarray]:
    """Their name → tensor. Raises UserError for what they cannot say."""
    if any(declared.name.startswith("score") for _, declared in trained):
        raise UserError("a reward model's heads and their bias are no part of an adapter")
    known, made = modules(family, config), {}
    for name, value in model_directory.host_tensors(trained, params):
        ours, _, part = name.partition("_lora_")
        module = known[ours][0]
        if not module:
            raise UserError(f"in {family.model_type} models {ours} shares a matrix with others")
        made[f"{PREFIX}{module}.{PARTS[part]}"] = np.ascontiguousarray(value.T)
    return made
