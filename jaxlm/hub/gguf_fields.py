"""The header of a GGUF file ↔ the config.json of the family that it holds: llama.cpp's architectures, as tables.

Names are those of gguf 0.19 (constants.py); what llama.cpp takes for granted and no key says (Gemma's windows, which
layers of SmolLM3 turn nothing) stands in `Architecture.fixed` and `_own`. A key that is in no table is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.base.errors import UserError, nearest
from jaxlm.hub import families
from jaxlm.hub.fields import alike
from jaxlm.model.config import ModelConfig

SHAPE = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
CHOSEN = {"expert_used_count": "num_experts_per_tok"}
GPT2 = {
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}
# Said of each file, with no effect on what the model computes.
INERT = ("rope.scaling.finetuned",)
FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    name: str
    """general.architecture."""
    model_type: str
    """The family that its models are of."""
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: SHAPE)
    """Key of the header, without the architecture's name → key of config.json."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What llama.cpp takes for granted, as config.json would say it."""
    permuted: bool = False
    """Rows of queries and keys are in the order of pairs that RoPE turns together (llama.cpp's "normal" RoPE)."""
    norm_offset: bool = False
    """Norms are stored with the 1 that the model adds to them."""
    transposed: tuple[str, ...] = ()
    """Ends of Hugging Face's names of matrices that are stored the other way round."""
    biased: bool = False
    """llama.cpp reads biases of its products, where there are any."""


ARCHITECTURES = (
    Architecture(name="llama", model_type="llama", permuted=True, biased=True),
    Architecture(
        name="llama", model_type="mixtral", permuted=True, keys=SHAPE | CHOSEN | {"expert_count": "num_local_experts"}
    ),
    Architecture(name="qwen2", model_type="qwen2", biased=True),
    Architecture(name="qwen3", model_type="qwen3"),
    Architecture(
        name="qwen3moe",
        model_type="qwen3_moe",
        keys=SHAPE | CHOSEN | {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        fixed={"norm_topk_prob": True},
    ),
    Architecture(name="gemma", model_type="gemma", norm_offset=True),
    Architecture(name="gemma2", model_type="gemma2", keys=SHAPE | WINDOW | CAPS, norm_offset=True),
    Architecture(
        name="gemma3",
        model_type="gemma3_text",
        keys=SHAPE
        | WINDOW
        | {"attention.sliding_window_pattern": "sliding_window_pattern"}
        | {"rope.freq_base_swa": "rope_local_base_freq", "final_logit_softcapping": "final_logit_softcapping"},
        norm_offset=True,
    ),
    Architecture(name="olmo2", model_type="olmo2"),
    Architecture(name="phi3", model_type="phi3", keys=SHAPE | WINDOW),
    Architecture(name="smollm3", model_type="smollm3", permuted=True),
    Architecture(
        name="gpt2",
        model_type="gpt2",
        keys=GPT2,
        transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
        biased=True,
    ),
)
BY_FAMILY = {architecture.model_type: architecture for architecture in ARCHITECTURES}
# Layers of the Gemma models whose scale of queries is the width a head and not the size of one.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


class Header:
    """The metadata of a GGUF file, of which every key has to be taken by somebody."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = dict(values), where
        self.taken: set[str] = set()

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a key or the default. Raises UserError where it is of another type."""
        self.taken.add(key)
        value = self.values.get(key, default)
        wrong = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong or not isinstance(value, kind)):
            names = " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{self.where}: {key} is {str(value)[:80]!r}, which is no {names}")
        return value

    def need(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise UserError(f"{self.where}: {key} is missing")
        return self.take(key, kind)

    def expect(self, key: str, *values: Any) -> None:
        """Refuses values other than these; a missing key is fine."""
        self.taken.add(key)
        if key in self.values and self.values[key] not in values:
            raise UserError(f"{self.where}: {key} is {self.values[key]!r}; only {values[0]!r} is understood here")

    def refuse_the_rest(self) -> None:
        silent = ("general.", "quantize.")
        left = sorted(key for key in self.values if key not in self.taken and not key.startswith(silent))
        if left:
            raise UserError(f"{self.where}: {', '.join(left)} not understood, and perhaps part of what it computes")


def architecture_of(header: Header) -> Architecture:
    """What general.architecture names. Raises UserError for others, by name."""
    header.expect("general.type", "model")
    header.expect("split.count", 0, 1)
    header.taken |= {"split.no", "split.tensors.count"}
    name = header.need("general.architecture", str)
    known = [architecture.name for architecture in ARCHITECTURES]
    if name not in known:
        raise UserError(
            f"{header.where}: general.architecture {name!r} is not understood{nearest(name, known)}; "
            f"{', '.join(dict.fromkeys(known))} are"
        )
    if name == "llama":
        return BY_FAMILY["mixtral" if header.take("llama.expert_count", int) else "llama"]
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def config_values(header: Header, shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None) -> dict[str, Any]:
    """config.json of the model, from its header, the shapes of its tensors, and its RoPE factors if it has some.

    Raises UserError for keys of the architecture that are not understood, by name.
    """
    architecture, where = architecture_of(header), header.where
    name, values = architecture.name, {"model_type": architecture.model_type, **architecture.fixed}
    for key, theirs in architecture.keys.items():
        value = header.take(f"{name}.{key}", (int, float))
        if value is not None:
            values[theirs] = _decimal(value)
    if shapes.get("token_embd.weight", ())[1:] == ():
        raise UserError(f"{where}: token_embd.weight is missing, or no matrix")
    values["vocab_size"] = shapes["token_embd.weight"][0]
    header.expect(f"{name}.vocab_size", values["vocab_size"])
    header.expect(f"{name}.attention.causal", True)
    for key in INERT:
        header.take(f"{name}.{key}", object)
    values["tie_word_embeddings"] = "output.weight" not in shapes
    if architecture.biased and name == "llama":
        for key, tensor in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_down")):
            values |= {key: True} if f"blk.0.{tensor}.bias" in shapes else {}
    if name != "gpt2":
        values |= _heads(header, values, name)
        values |= _scaling(header, name, values, factors)
    return values | _own(architecture, values)


def _heads(header: Header, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """head_dim, and the part of it that RoPE turns."""
    for key in ("hidden_size", "num_attention_heads"):
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise UserError(f"{header.where}: {name} has {key} {values.get(key)!r}; 1 or more is needed")
    size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    header.expect(f"{name}.attention.value_length", size)
    if name != "phi3":
        header.expect(f"{name}.rope.dimension_count", size)
        return {"head_dim": size}
    turned = header.take("phi3.rope.dimension_count", int, size)
    return {"head_dim": size, "partial_rotary_factor": turned / max(size, 1)}


def _scaling(header: Header, name: str, values: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    kind = header.take(f"{name}.rope.scaling.type", str, "none")
    read = lambda key, default=None: header.take(f"{name}.rope.scaling.{key}", (int, float), default)
    if name == "phi3":  # LongRoPE is in two tensors, which nothing takes
        read("original_context_length")
        header.expect("phi3.rope.scaling.attn_factor", 1.0)
    if factors is not None:
        if kind != "none":
            raise UserError(f"{header.where}: has {FACTORS} and {name}.rope.scaling.type {kind!r}: only one is read")
        return {"rope_scaling": _of_factors(factors, values, header.where)}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise UserError(f"{header.where}: {name}.rope.scaling.type {kind!r} is not understood; linear and yarn are")
    made: dict[str, Any] = {"rope_type": kind, "factor": _decimal(header.need(f"{name}.rope.scaling.factor", object))}
    if kind == "yarn":
        made["original_max_position_embeddings"] = read("original_context_length")
        made |= {f"beta_{end}": _decimal(read(f"yarn_beta_{end}", at)) for end, at in (("fast", 32.0), ("slow", 1.0))}
        header.expect(f"{name}.rope.scaling.attn_factor", 1.0)
        header.expect(f"{name}.rope.scaling.yarn_attn_factor", 1.0)
        header.expect(f"{name}.rope.scaling.yarn_ext_factor", 1.0, -1.0)
    return {"rope_scaling": made}


def _own(architecture: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of an architecture without a key."""
    if architecture.name not in GEMMA_27B:
        return {"sliding_window": None} if values.get("sliding_window") == 0 else {}
    large = values.get("num_hidden_layers") == GEMMA_27B[architecture.name]
    size = values["hidden_size"] / values["num_attention_heads"] if large else values["head_dim"]
    return {"query_pre_attn_scalar": size}


def llama3_factors(base: float, size: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each of size / 2 frequencies is divided by, float32, as Llama 3.1 has it (rope_type llama3)."""
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    smooth = np.clip((old / waves - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _of_factors(factors: np.ndarray, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scaling that gives these factors: Llama 3's, with frequency factors of 1 and 4, as all its models have."""
    base, size = values.get("rope_theta", 10_000.0), values["head_dim"]
    factors = factors.astype(np.float64)
    most = float(factors.max(initial=1.0))
    if factors.shape == (size // 2,) and most > 1:
        waves = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
        smooth = (1 / factors - 1 / most) / (1 - 1 / most)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        # Where nothing lies between the two, all contexts in a range give the same factors.
        old = np.median((waves * (1 + 3 * smooth))[between]) if between.any() else 8192
        scaling = {"rope_type": "llama3", "factor": _decimal(most), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": round(float(old)) if np.isfinite(old) else 0}
        if np.allclose(llama3_factors(base, size, scaling), factors, rtol=1e-4, atol=0):
            return scaling
    raise UserError(f"{where}: {FACTORS} is not understood: no factors as Llama 3's for {size // 2} frequencies")


def _decimal(value: Any) -> Any:
    """A number of the header, its float32 as the shortest decimal that is stored so: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def header_values(config: ModelConfig, model_type: str, context: int) -> tuple[Architecture, dict[str, Any]]:
    """The header that says a config, without general.* and tokenizer.*; FACTORS among them where it has the tensor.

    Raises UserError where llama.cpp has no such models.
    """
    family, values = families.find(config, model_type)
    if family.model_type == "mistral" and not config.window:
        family, values = families.find(config, "llama")
    if family.model_type not in BY_FAMILY:
        raise UserError(f"family: llama.cpp has no models as {family.model_type}'s; {', '.join(BY_FAMILY)} are known")
    architecture = BY_FAMILY[family.model_type]
    if config.criteria or (config.biases and not architecture.biased):
        lacking = "reward heads" if config.criteria else f"biases in {architecture.name} models"
        raise UserError(f"family: llama.cpp has no {lacking}")
    values |= {"max_position_embeddings": context} if "n_positions" not in values else {}
    said: dict[str, Any] = {}
    for key, theirs in architecture.keys.items():
        # Not every version of llama.cpp reads these; without them it takes what Gemma 3 has.
        if values.get(theirs) is not None and key not in ("attention.sliding_window_pattern", "rope.freq_base_swa"):
            said[f"{architecture.name}.{key}"] = values[theirs]
    if architecture.name != "gpt2":
        said[f"{architecture.name}.attention.value_length"] = config.head_size
        said[f"{architecture.name}.rope.dimension_count"] = config.rope_size or config.head_size
        said |= _said_scaling(architecture, values.get("rope_scaling") or {}, config)
    return architecture, said


def _said_scaling(architecture: Architecture, scaling: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    name, kind = f"{architecture.name}.rope.scaling", scaling.get("rope_type", "default")
    if kind == "llama3" and architecture.name == "llama":
        return {FACTORS: llama3_factors(config.rope_base, config.head_size, scaling)}
    if kind == "linear":
        return {f"{name}.type": kind, f"{name}.factor": scaling["factor"]}
    if kind == "yarn":
        trained = {f"{name}.original_context_length": scaling["original_max_position_embeddings"]}
        betas = {f"{name}.yarn_beta_{end}": scaling[f"beta_{end}"] for end in ("fast", "slow")}
        return {f"{name}.type": kind, f"{name}.factor": scaling["factor"]} | trained | betas
    return {}


def require_readable(said: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Refuses a config that would come back as another from its header."""
    stored = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in said.items()}
    header = Header(stored, "the GGUF header")
    values = config_values(header, shapes, said.get(FACTORS))
    differing = alike(families.BY_TYPE[values["model_type"]].read(values, header.where), config)
    if differing:
        raise UserError(f"llama.cpp's {said['general.architecture']} models have another {', '.join(differing)}")
