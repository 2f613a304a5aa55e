"""Families of models as Hugging Face's transformers names them: each a table of weights, and one of fields.

What a class computes and what its fields default to is read off transformers 5.23, models/*/configuration_*.py and
modeling_*.py. A key of config.json that is neither in its family's table nor among those of `INERT`, which change
nothing of what the model computes, is refused. `find` says which family can say a config of ours.

LongRoPE (Phi-3's long models): a text of up to the trained positions is turned by the short factors, a longer one by
the long factors from its first token on. transformers decides so by the longest row of a batch; here each text decides
for itself, each document of a packed row too, so that company changes nothing: both agree on texts that are run alone.
Like transformers' `generate`, the sampler reads a text anew when it passes the trained positions; a cache that is
written past them without that gives NaN. Scored as a whole, such a text's first tokens have other probabilities than
they had when they were drawn.
"""

from typing import Any

from jaxlm.base.errors import UserError, nearest
from jaxlm.hub.deepseek import deepseek_rope, latent, v2_experts, v3_experts
from jaxlm.hub.family import Family
from jaxlm.hub.fields import (
    activation,
    alternating,
    biases,
    gemma3_layers,
    gemma_query,
    qwen_layers,
    renamed,
    smollm3_layers,
    soft_caps,
    windowed,
)
from jaxlm.hub.mixtures import every_layer, qwen_moe
from jaxlm.hub.rope import gemma3_rope, gpt_oss_rope, neox_rope, phi3_rope, rope
from jaxlm.hub.rules import (
    AFTER,
    BERT,
    BOTH,
    DEEPSEEK,
    ENDS,
    GPT2,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    NEOX,
    PHI3,
    PRODUCTS,
    QWEN_MOE,
)
from jaxlm.model.config import ModelConfig

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "feed_forward",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_embeddings",
}
SHAPE, SHAPE_BUT_HEADS = renamed(**NAMES, head_dim="head_size"), renamed(**NAMES)
SILU, GELU = activation("hidden_act"), activation("hidden_activation")
ATTENTION_BIAS = biases(attention_bias=("qkv", "output"))
GEMMA: dict[str, Any] = {"scale_embeddings": True, "norm_offset": True}
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_ONLY = {"use_bidirectional_attention": False}
LAYER_NORM: dict[str, Any] = {"norm": "layer", "gated_mlp": False}
ROPE_ONLY = {"partial_rotary_factor": 1.0}
GPT_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS_YARN |= {"original_max_position_embeddings": 4096}

FAMILIES = (
    Family(
        model_type="llama",
        name="Llama",
        rules=LLAMA,
        parts=(SHAPE, SILU, biases(attention_bias=("qkv", "output"), mlp_bias=("mlp",)), rope()),
        only={"rope_interleaved": False} | ROPE_ONLY,
    ),
    Family(
        model_type="mistral",
        name="Mistral",
        rules=LLAMA,
        parts=(SHAPE, SILU, rope(), windowed),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="qwen2",
        name="Qwen2",
        rules=LLAMA,
        parts=(SHAPE, SILU, rope(), qwen_layers),
        fixed={"biases": ("qkv",)},
        only={"use_mrope": False} | ROPE_ONLY,
    ),
    Family(
        model_type="qwen3",
        name="Qwen3",
        rules=LLAMA,
        parts=(SHAPE, SILU, ATTENTION_BIAS, rope(), qwen_layers),
        defaults={"head_dim": 128},
        fixed={"qk_norm": True},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="smollm3",
        name="SmolLM3",
        rules=LLAMA,
        parts=(SHAPE, SILU, biases(attention_bias=("qkv", "output"), mlp_bias=("mlp",)), rope(), smollm3_layers),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="gemma",
        name="Gemma",
        rules=LLAMA,
        parts=(SHAPE, ATTENTION_BIAS, rope(), activation("hidden_act", {"gelu": "gelu"})),
        defaults=GEMMA_DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        fixed=GEMMA,
        only={"hidden_activation": "gelu_pytorch_tanh"} | GEMMA_ONLY | ROPE_ONLY,
    ),
    Family(
        model_type="gemma2",
        name="Gemma2",
        rules=(*ENDS, *BOTH, *PRODUCTS),
        parts=(SHAPE, GELU, ATTENTION_BIAS, rope(), alternating, gemma_query, soft_caps(attention=True)),
        defaults=GEMMA_DEFAULTS
        | {"num_key_value_heads": 4, "sliding_window": 4096, "final_logit_softcapping": 30.0}
        | {"attn_logit_softcapping": 50.0},
        fixed=GEMMA | {"norm_place": "both"},
        only={"hidden_act": "gelu_pytorch_tanh"} | GEMMA_ONLY | ROPE_ONLY,
    ),
    Family(
        model_type="gemma3_text",
        name="Gemma3",
        rules=(*ENDS, *BOTH, *PRODUCTS),
        # Its class has attn_logit_softcapping too, which its attention does not read.
        parts=(SHAPE, GELU, ATTENTION_BIAS, gemma3_layers, gemma3_rope, gemma_query, soft_caps(attention=False)),
        defaults=GEMMA_DEFAULTS | {"num_key_value_heads": 4, "sliding_window": 4096, "rope_theta": 1_000_000.0},
        fixed=GEMMA | {"norm_place": "both", "qk_norm": True},
        only={"attn_logit_softcapping": None} | GEMMA_ONLY | ROPE_ONLY,
        reward="Gemma3TextForSequenceClassification",
    ),
    Family(
        model_type="olmo2",
        name="Olmo2",
        rules=(*ENDS, *AFTER, *PRODUCTS),
        parts=(SHAPE, SILU, ATTENTION_BIAS, rope()),
        defaults={"rms_norm_eps": 1e-5},
        fixed={"norm_place": "after", "qk_norm": True, "qk_norm_over": "all"},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="phi3",
        name="Phi3",
        rules=PHI3,
        parts=(SHAPE, SILU, phi3_rope, windowed),
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        only={"attention_bias": False},
    ),
    Family(
        model_type="mixtral",
        name="Mixtral",
        rules=MIXTRAL,
        parts=(SHAPE, SILU, rope(), windowed, every_layer),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="qwen3_moe",
        name="Qwen3Moe",
        rules=QWEN_MOE,
        parts=(SHAPE, SILU, ATTENTION_BIAS, rope(), qwen_moe),
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        fixed={"qk_norm": True},
        only=ROPE_ONLY,
    ),
    Family(
        model_type="gpt_oss",
        name="GptOss",
        rules=GPT_OSS,
        parts=(
            SHAPE,
            biases(("mlp", "router"), attention_bias=("qkv", "output")),
            gpt_oss_rope,
            alternating,
            every_layer,
        ),
        defaults={"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0}
        | {"attention_bias": True, "sliding_window": 128, "rope_parameters": GPT_OSS_YARN},
        fixed={"activation": "clamped", "attention_sinks": True},
        only={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0} | ROPE_ONLY,
    ),
    Family(
        model_type="deepseek_v2",
        name="DeepseekV2",
        rules=DEEPSEEK,
        parts=(SHAPE_BUT_HEADS, SILU, ATTENTION_BIAS, latent, deepseek_rope, v2_experts),
        defaults={"n_group": None, "topk_group": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}
        | {"first_k_dense_replace": 0},
        fixed={"rope_interleaved": True},
        only={"mlp_bias": False} | ROPE_ONLY,
    ),
    Family(
        model_type="deepseek_v3",
        name="DeepseekV3",
        rules=DEEPSEEK,
        parts=(
            SHAPE_BUT_HEADS,
            SILU,
            ATTENTION_BIAS,
            latent,
            deepseek_rope,
            renamed(rope_interleave="rope_interleaved"),
            v3_experts,
        ),
        defaults={"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
        | {"norm_topk_prob": True, "rope_interleave": True},
        only=ROPE_ONLY,
        extra_layers="num_nextn_predict_layers",
    ),
    Family(
        model_type="gpt2",
        name="GPT2",
        rules=GPT2,
        parts=(
            renamed(
                vocab_size="vocab_size",
                n_embd="width",
                n_layer="layers",
                n_head="heads",
                n_inner="feed_forward",
                n_positions="learned_positions",
                layer_norm_epsilon="norm_epsilon",
                tie_word_embeddings="tied_embeddings",
            ),
            activation("activation_function"),
        ),
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
        },
        fixed=LAYER_NORM | {"biases": ("qkv", "output", "mlp")},
        only={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
        prefix="transformer.",
        causal="GPT2LMHeadModel",
        buffers=("attn.bias", "attn.masked_bias"),
    ),
    Family(
        model_type="gpt_neox",
        name="GPTNeoX",
        rules=NEOX,
        parts=(
            renamed(
                vocab_size="vocab_size",
                hidden_size="width",
                num_hidden_layers="layers",
                num_attention_heads="heads",
                intermediate_size="feed_forward",
                layer_norm_eps="norm_epsilon",
                tie_word_embeddings="tied_embeddings",
                use_parallel_residual="parallel_mlp",
            ),
            activation("hidden_act"),
            biases(("mlp",), attention_bias=("qkv", "output")),
            neox_rope,
        ),
        defaults={"layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True, "hidden_act": "gelu"},
        fixed=LAYER_NORM,
        prefix="gpt_neox.",
        buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
    Family(
        model_type="bert",
        name="Bert",
        rules=BERT,
        parts=(
            renamed(
                vocab_size="vocab_size",
                hidden_size="width",
                num_hidden_layers="layers",
                num_attention_heads="heads",
                intermediate_size="feed_forward",
                max_position_embeddings="learned_positions",
                type_vocab_size="token_types",
                layer_norm_eps="norm_epsilon",
                tie_word_embeddings="tied_embeddings",
            ),
            activation("hidden_act"),
        ),
        defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True, "hidden_act": "gelu"},
        fixed=LAYER_NORM | {"causal": False, "norm_place": "sum", "biases": ("qkv", "output", "mlp")},
        only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
        | {"directionality": "bidi"},
        prefix="bert.",
        heads={"BertForMaskedLM": "transform", "BertModel": "pooler"},
        # A checkpoint of BERT's pretraining has the head of its other task too, and the pooler that this one reads.
        buffers=(
            "embeddings.position_ids",
            *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
            *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
        ),
    ),
)
BY_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(values: Any, where: str) -> Family:
    """The family of a config.json. Raises UserError for others, by name."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{where}: has no model_type; is it the config.json of a Hugging Face model?")
    if kind not in BY_TYPE:
        raise UserError(f"{where}: model_type {kind!r} is not understood{nearest(kind, BY_TYPE)}")
    return BY_TYPE[kind]


def find(config: ModelConfig, model_type: str = "") -> tuple[Family, dict[str, Any]]:
    """The first family (or the one asked for) that has models of this config, and its config.json."""
    problems = []
    for family in [BY_TYPE[model_type]] if model_type else FAMILIES:
        try:
            return family, family.write(config)
        except UserError as error:
            problems.append(str(error))
    raise UserError("no family of Hugging Face's is as this model:\n  " + "\n  ".join(problems))
