"""The transformer's shape. Fields at 0 are derived (see `jaxlm/plan/depth.py`, the dial)."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import check

Attention = Literal["global", "local", "global_nope", "local_nope"]
"""Whom a layer's queries see; `nope`: without rotary positions (arXiv:2305.19466)."""
Activation = Literal["silu", "gelu", "gelu_exact", "clamped"]
Bias = Literal["qkv", "output", "mlp", "router"]
Base = Literal["compute", "int8", "nf4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for texts longer than those of pretraining."""

    kind: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """linear: all are divided by factor (arXiv:2306.15595); llama3: only the low ones are, with a smooth transition;
    yarn (arXiv:2309.00071): the same with a transition linear in the frequency's index, and attention is sharpened;
    longrope (arXiv:2402.13753): each by a factor of its own, from one of two sets by the text's length."""
    factor: float = 1.0
    """By how much frequencies are divided; longrope: the longest text's length over the trained positions."""
    low_frequency: float = 1.0
    """llama3, yarn: frequencies of at most so many turns over the trained positions are divided by the whole factor."""
    high_frequency: float = 4.0
    """llama3, yarn: frequencies of at least so many turns stay as they are (yarn's usual value is 32)."""
    trained_positions: int = 8192
    """llama3, yarn, longrope: positions of a text in pretraining."""
    attention_factor: float = 0.0
    """yarn, longrope: turned queries and keys are multiplied by this; 0: by 0.1 ln(factor) + 1, and in longrope by
    sqrt(1 + ln(factor) / ln(trained_positions))."""
    truncate: bool = True
    """yarn only: the transition begins and ends at whole indices."""
    mscale_all_dim: float = 0.0
    """yarn only: all of attention's scores are multiplied by (0.1 ln(factor) times this + 1)², as DeepSeek's are."""
    short_factors: tuple[float, ...] = ()
    """longrope only: what each frequency is divided by in texts of up to trained_positions tokens."""
    long_factors: tuple[float, ...] = ()
    """longrope only: the same for longer texts, from their first token on."""

    def __post_init__(self):
        check(self.factor > 0, "factor", f"got {self.factor}; a positive number is needed")
        sharp = self.attention_factor
        check(sharp >= 0, "attention_factor", f"got {sharp}; a positive number, or 0 to derive it, is needed")
        check(self.trained_positions > 0, "trained_positions", f"got {self.trained_positions}; 1 or more is needed")
        ordered = 0 < self.low_frequency < self.high_frequency
        check(ordered, "low_frequency", f"got {self.low_frequency}; above 0, below high_frequency is needed")
        fine = self.mscale_all_dim == 0 or (self.kind == "yarn" and self.mscale_all_dim > 0)
        check(fine, "mscale_all_dim", f"got {self.mscale_all_dim}; a positive number for yarn, else 0, is needed")
        for field in ("short_factors", "long_factors"):
            factors = getattr(self, field)
            fine = bool(factors) == (self.kind == "longrope") and all(factor > 0 for factor in factors)
            check(fine, field, f"got {factors}; positive numbers are needed for longrope, and none otherwise")

    @property
    def sharp(self) -> float:
        """What turned queries and keys are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        log = math.log(max(self.factor, 1.0))
        derived = 0.1 * log + 1 if self.kind == "yarn" else (1 + log / math.log(max(self.trained_positions, 2))) ** 0.5
        return self.attention_factor or derived


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Mixture of experts: MLPs of which a router chooses a few for each token."""

    count: int = 0
    """E: experts of a layer; 0: every layer has one MLP for all tokens."""
    chosen: int = 2
    """k: how many of them a token goes through."""
    feed_forward: int = 0
    """Width of an expert; 0: as the model's feed_forward, which the dense layers have."""
    shared: int = 0
    """Experts that all tokens go through besides: one MLP of so many times an expert's width (arXiv:2401.06066)."""
    first_dense: int = 0
    """So many first layers have one MLP instead."""
    every: int = 1
    """Of the other layers, only those whose number, counted from 1 over all layers, is a multiple of this have
    experts."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of a token's logits for the experts."""
    normalize: bool = True
    """The chosen experts' scores are divided by their sum: a softmax over the chosen ones alone."""
    scale: float = 1.0
    """Then they are multiplied by this."""
    choice_bias: bool = False
    """A number for each expert is added to its score for choosing, not for weighing; training moves it so that all are
    chosen alike (arXiv:2408.15664, DeepSeek-V3)."""
    groups: int = 1
    """The experts form so many groups of equal size, in their order, for instance one for each device."""
    chosen_groups: int = 1
    """A token's experts are chosen from its so many best groups (arXiv:2405.04434, section 2.2.2)."""
    group_best: int = 1
    """A group's score is the sum of its so many best experts' scores: 1 in DeepSeek-V2, 2 in DeepSeek-V3."""
    capacity: float = 0.0
    """An expert takes at most so many times its even share of a row's tokens, the first ones, and the rest is dropped:
    products of equal sizes (arXiv:2101.03961). 0: none is dropped. Sampling never drops."""

    def __post_init__(self):
        for field in ("count", "feed_forward", "shared", "first_dense", "capacity"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        for field in ("chosen", "every"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        few = self.chosen <= self.count or not self.count
        check(few, "chosen", f"{self.chosen} of {self.count} experts cannot be chosen")
        check(self.scale > 0, "scale", f"got {self.scale}; a positive number is needed")
        groups, best = self.groups, self.chosen_groups
        fit = (
            1 <= best <= groups and self.count % groups == 0 and self.chosen * groups <= best * max(self.count, groups)
        )
        fit = fit and 1 <= self.group_best <= max(self.count // groups, 1)
        said = f"{best} of {groups} groups of {self.count} experts, by {self.group_best} each, hold no {self.chosen}"
        check(fit or not self.count, "groups", f"{said}: equal groups, of which the best hold enough, are needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention: the keys and values of all heads come from one small vector a token, the latent,
    and from one key with its position that the heads share; these two alone are cached (arXiv:2405.04434, section 2.1).

    A head's query and key have rope_size numbers that are turned, of the shared key, and head_size - rope_size others.
    """

    kv_rank: int = 0
    """R: numbers of a latent; 0: heads have keys and values of their own."""
    query_rank: int = 0
    """Size of the queries' latent; 0: they come from the residual stream itself."""
    value_size: int = 0
    """Size of a head's value; 0: head_size - rope_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer, by default a decoder: RMSNorm before each part, RoPE, grouped-query attention, gated MLP."""

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
    """F: width of the MLP; 0 means 8/3 of the width, rounded up to 128, as in Llama."""
    activation: Activation = "silu"
    """The MLP's nonlinearity (gelu: its tanh form; clamped: GPT-OSS's, of gate and product)."""
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)); off: down(act(up(x))), as in GPT-2."""
    causal: bool = True
    """A token sees those before it and itself; off: all of its text, in both directions (an encoder, as BERT is)."""
    biases: tuple[Bias, ...] = ()
    """Which products have a bias: those of queries, keys and values (of latents, where these come from latents);
    attention's output; the MLP's; the router's."""
    latent: LatentConfig = LatentConfig()
    """Multi-head latent attention in place of grouped queries."""
    experts: ExpertsConfig = ExpertsConfig()
    """Mixture of experts in place of the MLP."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_offset: bool = False
    """RMSNorm multiplies by 1 + scale, as Gemma's does."""
    norm_place: Literal["before", "after", "both", "sum"] = "before"
    """Whether attention and MLP have a norm on their input, on their output (OLMo 2), or on both (Gemma 2); sum: on
    their output plus what they were added to, which begins with a norm and needs none at the end (BERT)."""
    parallel_mlp: bool = False
    """The MLP reads what attention reads, and both are added at once, as in GPT-NeoX."""
    head: Literal["plain", "transform", "pooler"] = "plain"
    """What makes logits: a matrix; transform: one with a dense layer, the activation and a norm before it and a bias
    after it (BERT's masked-token head). pooler: nothing does, but a dense layer and tanh, over a text's first token."""
    tied_embeddings: bool = False
    """Use the embedding table as the output head too."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(width), as Gemma does."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, before RoPE."""
    qk_norm_over: Literal["head", "all"] = "head"
    """What that norm is taken over: each head by itself, or all heads together (OLMo 2)."""
    query_scalar: float = 0.0
    """Attention's scores are divided by its square root; 0 means by that of the head size."""
    logit_soft_cap: float = 0.0
    """c in c*tanh(logits/c); 0: none."""
    attention_soft_cap: float = 0.0
    """The same for attention scores."""
    attention_sinks: bool = False
    """Each head has a learned score that takes part in the softmax and has no value (arXiv:2508.10925)."""
    pattern: tuple[Attention, ...] = ("global",)
    """Kinds of attention, repeated over the layers from the first on."""
    window: int = 0
    """How many positions, itself included, a query sees in a local layer."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_base_local: float = 0.0
    """The same for local layers, whose frequencies are not scaled then; 0: as the others."""
    rope_size: int = 0
    """How many of a head's first numbers RoPE turns; 0: all."""
    rope_interleaved: bool = False
    """RoPE turns neighbours, numbers 2i and 2i + 1 of a head, and not i and i + half of them."""
    rope_scaling: RopeScaling = RopeScaling()
    """Frequencies for texts longer than those of pretraining."""
    learned_positions: int = 0
    """Rows of a learned table of positions, which takes RoPE's place (GPT-2); 0: RoPE."""
    token_types: int = 0
    """Rows of a table of segment types, of which every token here has type 0 (BERT); 0: no table."""
    norm_epsilon: float = 1e-6
    """Added to the mean square, or the variance, in norms."""
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products; parameters, softmax, norms and losses are float32 always."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again, to save memory: nothing, all but matrix products, or every layer whole."""
    scan_layers: bool = True
    """One compiled layer run L times over stacked weights; off: L layers, slower to compile."""
    attention: Literal["auto", "plain", "splash"] = "auto"
    """Implementation of attention: splash is the TPU kernel; auto takes it on a TPU, but for attention_sinks."""
    criteria: tuple[str, ...] = ()
    """Names of scalar heads in place of the output head: a reward model; empty: a language model."""

    def __post_init__(self):
        for field in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "feed_forward", "window"):
            value = getattr(self, field)
            check(value >= 0, field, f"got {value}; a positive number, or 0 to derive it, is needed")
        if self.heads and self.kv_heads:
            check(self.heads % self.kv_heads == 0, "kv_heads", f"{self.kv_heads} does not divide heads {self.heads}")
        if self.width and self.heads and not self.head_size:
            check(self.width % self.heads == 0, "heads", f"{self.heads} does not divide {self.width}; set head_size")
        even = self.head_size % 2 == 0 or self.learned_positions > 0
        check(even, "head_size", f"got {self.head_size}; RoPE turns pairs: an even size is needed")
        turned = self.rope_size % 2 == 0 and 0 <= self.rope_size <= (self.head_size or self.rope_size)
        check(turned, "rope_size", f"got {self.rope_size}; an even number up to the head size is needed")
        check(min(dataclasses.astuple(self.latent)) >= 0, "latent", f"got {self.latent}; 0 or more is needed")
        if self.latent.kv_rank:
            part = 0 < self.rope_size < (self.head_size or self.rope_size + 1)
            check(
                part, "rope_size", f"got {self.rope_size}; of latent attention's heads a part is turned: not 0, not all"
            )
            alone = self.kv_heads in (0, self.heads) and not (self.qk_norm or self.attention_sinks)
            said = "goes with as many kv_heads as heads, without qk_norm, attention_sinks and learned_positions"
            check(alone and not self.learned_positions, "latent", said)
        for field in ("rope_base_local", "query_scalar", "learned_positions", "token_types"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; a positive number, or 0, is needed")
        plain = not self.attention_sinks or self.attention != "splash"
        check(plain, "attention", "the splash kernel has no sinks here; take plain, or auto")
        gated = self.gated_mlp and self.head != "transform"
        check(gated or self.activation != "clamped", "activation", "clamped is of gated MLPs only")
        one_sum = self.parallel_mlp and self.norm_place == "sum"
        check(not one_sum, "parallel_mlp", "adds both at once, norm_place=sum one after the other; turn one off")
        check(self.head == "plain" or not self.criteria, "head", f"is {self.head}, but criteria take its place")
        check(self.causal or not self.criteria, "causal", "is off, but criteria are read at a text's last token")
        check(self.gated_mlp or not self.experts.count, "gated_mlp", "is off, but experts are gated MLPs")
        check(not (self.norm_offset and self.norm == "layer"), "norm_offset", "is of RMSNorm only; set norm=rms")
        check(len(self.pattern) > 0, "pattern", "is empty; give at least one of global, local")
        if any(kind.startswith("local") for kind in self.pattern):
            check(self.causal, "pattern", "local layers look back only; an encoder (causal=False) takes global ones")
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
        c, rope = self.latent, self.rope_scaling
        pairs = (self.rope_size or self.head_size or self.width // self.heads) // 2
        fit = rope.kind != "longrope" or len(rope.short_factors) == len(rope.long_factors) == pairs
        check(fit, "rope_scaling", f"longrope needs {pairs} short_factors and long_factors, one for each pair")
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_size=(size := self.head_size or self.width // self.heads),
            feed_forward=(wide := self.feed_forward or -(-8 * self.width // (3 * 128)) * 128),
            latent=dataclasses.replace(c, value_size=c.value_size or size - self.rope_size) if c.kv_rank else c,
            experts=dataclasses.replace(e, feed_forward=e.feed_forward or wide) if (e := self.experts).count else e,
        )

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied by."""
        rope = self.rope_scaling
        sharp = 0.1 * rope.mscale_all_dim * math.log(max(rope.factor, 1.0)) + 1
        return sharp**2 * (self.query_scalar or self.head_size) ** -0.5

    def kind(self, layer: int) -> Attention:
        return self.pattern[layer % len(self.pattern)]

    def has_experts(self, layer: int) -> bool:
        e = self.experts
        return e.count > 0 and layer >= e.first_dense and (layer + 1) % e.every == 0

    def groups(self) -> tuple[int, int, int]:
        """(first, period, end): layers first, ..., end - 1 repeat each `period`; others stand alone when stacked."""
        first = min(self.experts.first_dense, self.layers) if self.experts.count else 0
        period = math.lcm(len(self.pattern), self.experts.every if self.experts.count else 1)
        return first, period, first + (self.layers - first) // period * period


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters are trained beside frozen matrices, W + scale A B (arXiv:2106.09685)."""

    rank: int = 16
    """r: columns of A, rows of B."""
    alpha: float = 32.0
    """scale = alpha / rank."""
    rank_stabilised: bool = False
    """scale = alpha / sqrt(rank) (arXiv:2312.03732)."""
    targets: tuple[str, ...] = ("layers/*",)
    """Matrices of attention, MLP and experts with adapters, by whole or last name, with wildcards: layers/attention/*,
    query, layers/experts/shared/*. Each expert has its own; routers stay frozen."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training; 0 beside experts."""
    dora: bool = False
    """Learns the length of each column by itself, beside its direction (DoRA, arXiv:2402.09353)."""
    base: Base = "compute"
    """How the frozen matrices of attention, MLP and experts are stored: in the compute type (16 bits in bfloat16);
    int8; nf4, 4.5 bits (QLoRA, arXiv:2305.14314). They are made whole layer by layer as they are used. Embedding, head
    and routers stay in the compute type."""

    def __post_init__(self):
        check(self.rank >= 1, "rank", f"got {self.rank}; 1 or more is needed")
        check(self.alpha > 0, "alpha", f"got {self.alpha}; a positive number is needed")
        check(0 <= self.dropout < 1, "dropout", f"got {self.dropout}; a share in [0, 1) is needed")
        check(len(self.targets) > 0, "targets", "is empty; name matrices, such as layers/attention/*")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedConfig(ModelConfig):
    """A transformer with adapters, or what is frozen under them; no model directory has one."""

    lora: LoRAConfig = LoRAConfig()
    adapters: bool = True


def adapted(config: ModelConfig, lora: LoRAConfig, adapters: bool = True) -> AdaptedConfig:
    """The same transformer with adapters; without, what is frozen under them."""
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    return AdaptedConfig(lora=lora, adapters=adapters, **kept)
