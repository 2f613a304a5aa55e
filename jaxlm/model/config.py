"""The transformer's shape. Fields at 0 are derived (see `jaxlm/train/depth.py`, the dial)."""

import dataclasses
from typing import ClassVar, Literal

from jaxlm.base.config import check

Attention = Literal["global", "local"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm before each part, RoPE, grouped-query attention, gated MLP."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("remat", "attention", "scan_layers")

    vocab_size: int = 0
    """V: rows of the embedding; 0 takes the tokenizer's."""
    layers: int = 0
    """L: number of blocks; 0 derives it from the depth."""
    width: int = 0
    """D: size of the residual stream; 0 derives it from the depth."""
    heads: int = 0
    """H: query heads; 0 derives it from the width."""
    kv_heads: int = 0
    """K: key and value heads, each shared by H/K query heads; 0 means as many as query heads."""
    head_size: int = 0
    """N: size of a head; 0 means width / heads."""
    feed_forward: int = 0
    """F: width of the gated MLP; 0 means 8/3 of the width, rounded up to 128, as in Llama."""
    activation: Literal["silu", "gelu"] = "silu"
    """The gate's nonlinearity (gelu: its tanh form)."""
    tied_embeddings: bool = False
    """Use the embedding table as the output head too."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(width), as Gemma does."""
    qk_norm: bool = False
    """RMSNorm on each query and key head, before RoPE."""
    logit_soft_cap: float = 0.0
    """c in c*tanh(logits/c); 0: none."""
    attention_soft_cap: float = 0.0
    """The same for attention scores."""
    pattern: tuple[Attention, ...] = ("global",)
    """Kinds of attention, repeated over the layers from the first on."""
    window: int = 0
    """How many positions, itself included, a query sees in a local layer."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products; parameters, softmax, norms and losses are float32 always."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or every layer whole."""
    scan_layers: bool = True
    """One compiled layer run L times over stacked weights; off: L layers, slower to compile."""
    attention: Literal["auto", "plain", "splash"] = "auto"
    """Attention's code: splash is the TPU kernel; auto takes it on TPU."""
    criteria: tuple[str, ...] = ()
    """Names of scalar heads in place of the output head: a reward model; empty: a language model."""

    def __post_init__(self):
        for field in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "feed_forward", "window"):
            value = getattr(self, field)
            check(value >= 0, field, f"got {value}; a positive number, or 0 to derive it, is needed")
        if self.heads and self.kv_heads:
            check(self.heads % self.kv_heads == 0, "kv_heads", f"{self.kv_heads} does not divide heads {self.heads}")
        if self.width and self.heads and not self.head_size:
            check(self.width % self.heads == 0, "heads", f"{self.heads} does not divide width {self.width}")
        check(self.head_size % 2 == 0, "head_size", f"got {self.head_size}; RoPE turns pairs: an even size is needed")
        check(len(self.pattern) > 0, "pattern", "is empty; give at least one of global, local")
        if "local" in self.pattern:
            check(self.window > 0, "window", "must be set for the local layers of the pattern")
        check(self.rope_base > 1, "rope_base", f"got {self.rope_base}; a base above 1 is needed")
        check(self.norm_epsilon > 0, "norm_epsilon", f"got {self.norm_epsilon}; a positive number is needed")
        for field in ("logit_soft_cap", "attention_soft_cap"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 (none) or a positive cap is needed")
        distinct = len(set(self.criteria)) == len(self.criteria)
        check(distinct and all(self.criteria), "criteria", f"got {self.criteria}; names, each once, are needed")

    def complete(self) -> "ModelConfig":
        """Fills in what follows from other fields; raises ConfigError for what has to be given."""
        for field in ("vocab_size", "layers", "width", "heads"):
            check(getattr(self, field) > 0, field, "is 0; give it, or a depth to derive it from")
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_size=self.head_size or self.width // self.heads,
            feed_forward=self.feed_forward or -(-8 * self.width // (3 * 128)) * 128,
        )

    def kind(self, layer: int) -> Attention:
        return self.pattern[layer % len(self.pattern)]
