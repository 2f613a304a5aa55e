"""The tensors of each family under Hugging Face's names, and what each is here."""

from typing import NamedTuple


class Rule(NamedTuple):
    """One tensor of theirs, and what it is here: `{}` stands for the layer; a second one for the expert, of which ours
    are stacked.

    Several of ours lie in it one after the other along the axis of outputs, or, with `by_head`, so within each head,
    or `in_turn`, number by number.
    """

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False
    """Theirs is [out, in], as a torch Linear's; ours is [in, out]."""
    by_head: bool = False
    in_turn: bool = False
    again: bool = False
    """It has what an earlier rule's tensor has, and is another one only where embeddings are not tied."""


def linear(theirs: str, *ours: str, turned: bool = True, by_head: bool = False) -> tuple[Rule, Rule]:
    """A matrix and its bias, which a model may lack."""
    return (
        Rule(f"{theirs}.weight", ours, turned, by_head),
        Rule(f"{theirs}.bias", tuple(f"{name}_bias" for name in ours), False, by_head),
    )


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"{ours}.scale",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))


LAYER = "model.layers.{}"
ENDS = (
    Rule("model.embed_tokens.weight", ("embedding",)),
    *norm("model.norm", "final_norm"),
    Rule("lm_head.weight", ("head",), turned=True),
    Rule("score.weight", ("score",), turned=True),
)
DOWN = linear(f"{LAYER}.mlp.down_proj", "layers.{}.mlp.down")
OUTPUT = linear(f"{LAYER}.self_attn.o_proj", "layers.{}.attention.output")
MLP = (
    *linear(f"{LAYER}.mlp.gate_proj", "layers.{}.mlp.gate"),
    *linear(f"{LAYER}.mlp.up_proj", "layers.{}.mlp.up"),
    *DOWN,
)
PRODUCTS = (
    *linear(f"{LAYER}.self_attn.q_proj", "layers.{}.attention.query"),
    *linear(f"{LAYER}.self_attn.k_proj", "layers.{}.attention.key"),
    *linear(f"{LAYER}.self_attn.v_proj", "layers.{}.attention.value"),
    *OUTPUT,
    *MLP,
    *norm(f"{LAYER}.self_attn.q_norm", "layers.{}.attention.query_norm"),
    *norm(f"{LAYER}.self_attn.k_norm", "layers.{}.attention.key_norm"),
)
BEFORE = (
    *norm(f"{LAYER}.input_layernorm", "layers.{}.attention_norm"),
    *norm(f"{LAYER}.post_attention_layernorm", "layers.{}.mlp_norm"),
)
AFTER = (
    *norm(f"{LAYER}.post_attention_layernorm", "layers.{}.attention_post_norm"),
    *norm(f"{LAYER}.post_feedforward_layernorm", "layers.{}.mlp_post_norm"),
)
BOTH = (
    *norm(f"{LAYER}.input_layernorm", "layers.{}.attention_norm"),
    *norm(f"{LAYER}.pre_feedforward_layernorm", "layers.{}.mlp_norm"),
    *AFTER,
)
LLAMA = (*ENDS, *BEFORE, *PRODUCTS)
PHI3 = (
    *ENDS,
    *BEFORE,
    *linear(f"{LAYER}.self_attn.qkv_proj", *(f"layers.{{}}.attention.{name}" for name in ("query", "key", "value"))),
    *OUTPUT,
    *linear(f"{LAYER}.mlp.gate_up_proj", "layers.{}.mlp.gate", "layers.{}.mlp.up"),
    *DOWN,
)


def experts(layer: str, router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A router, and a tensor an expert."""
    pairs = ((gate, "gate"), (up, "up"), (down, "down"))
    each = (
        Rule(f"{layer}.experts.{{}}.{theirs}.weight", (f"layers.{{}}.experts.{ours}",), True) for theirs, ours in pairs
    )
    return (*linear(f"{layer}.{router}", "layers.{}.experts.router"), *each)


MIXTRAL = (*LLAMA, *experts(f"{LAYER}.block_sparse_moe", "gate", "w1", "w3", "w2"))
QWEN_MOE = (*LLAMA, *experts(f"{LAYER}.mlp", "gate", "gate_proj", "up_proj", "down_proj"))
GPT_OSS_PAIR = ("layers.{}.experts.gate", "layers.{}.experts.up")
GPT_OSS = (  # its experts' matrices are [in, out], as ours
    *LLAMA,
    *linear(f"{LAYER}.mlp.router", "layers.{}.experts.router"),
    Rule(f"{LAYER}.self_attn.sinks", ("layers.{}.attention.sinks",)),
    Rule(f"{LAYER}.mlp.experts.gate_up_proj", GPT_OSS_PAIR, in_turn=True),
    Rule(f"{LAYER}.mlp.experts.gate_up_proj_bias", tuple(f"{name}_bias" for name in GPT_OSS_PAIR), in_turn=True),
    Rule(f"{LAYER}.mlp.experts.down_proj", ("layers.{}.experts.down",)),
    Rule(f"{LAYER}.mlp.experts.down_proj_bias", ("layers.{}.experts.down_bias",)),
)
DEEPSEEK_ATTENTION = (
    *linear(f"{LAYER}.self_attn.q_proj", "layers.{}.attention.query"),
    *linear(f"{LAYER}.self_attn.q_a_proj", "layers.{}.attention.query_latent"),
    *norm(f"{LAYER}.self_attn.q_a_layernorm", "layers.{}.attention.query_norm"),
    *linear(f"{LAYER}.self_attn.kv_a_proj_with_mqa", "layers.{}.attention.latent", "layers.{}.attention.shared_key"),
    *linear(f"{LAYER}.self_attn.q_b_proj", "layers.{}.attention.query_up"),
    *norm(f"{LAYER}.self_attn.kv_a_layernorm", "layers.{}.attention.latent_norm"),
    *linear(f"{LAYER}.self_attn.kv_b_proj", "layers.{}.attention.key", "layers.{}.attention.value", by_head=True),
    *OUTPUT,
)
DEEPSEEK = (
    *ENDS,
    *BEFORE,
    *DEEPSEEK_ATTENTION,
    *MLP,
    *experts(f"{LAYER}.mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    *(
        Rule(f"{LAYER}.mlp.shared_experts.{name}_proj.weight", (f"layers.{{}}.experts.shared.{name}",), turned=True)
        for name in ("gate", "up", "down")
    ),
    Rule(f"{LAYER}.mlp.gate.e_score_correction_bias", ("layers.{}.experts.choice_bias",)),
)
GPT2_LAYER = "transformer.h.{}"
GPT2 = (  # its Conv1D holds [in, out], as ours
    Rule("transformer.wte.weight", ("embedding",)),
    Rule("transformer.wpe.weight", ("positions",)),
    *norm("transformer.ln_f", "final_norm"),
    Rule("lm_head.weight", ("head",), turned=True),
    Rule("score.weight", ("score",), turned=True),
    *norm(f"{GPT2_LAYER}.ln_1", "layers.{}.attention_norm"),
    *norm(f"{GPT2_LAYER}.ln_2", "layers.{}.mlp_norm"),
    *linear(
        f"{GPT2_LAYER}.attn.c_attn",
        *(f"layers.{{}}.attention.{name}" for name in ("query", "key", "value")),
        turned=False,
    ),
    *linear(f"{GPT2_LAYER}.attn.c_proj", "layers.{}.attention.output", turned=False),
    *linear(f"{GPT2_LAYER}.mlp.c_fc", "layers.{}.mlp.up", turned=False),
    *linear(f"{GPT2_LAYER}.mlp.c_proj", "layers.{}.mlp.down", turned=False),
)
NEOX_LAYER = "gpt_neox.layers.{}"
NEOX = (
    Rule("gpt_neox.embed_in.weight", ("embedding",)),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    Rule("embed_out.weight", ("head",), turned=True),
    Rule("score.weight", ("score",), turned=True),
    *norm(f"{NEOX_LAYER}.input_layernorm", "layers.{}.attention_norm"),
    *norm(f"{NEOX_LAYER}.post_attention_layernorm", "layers.{}.mlp_norm"),
    *linear(
        f"{NEOX_LAYER}.attention.query_key_value",
        *(f"layers.{{}}.attention.{name}" for name in ("query", "key", "value")),
        by_head=True,
    ),
    *linear(f"{NEOX_LAYER}.attention.dense", "layers.{}.attention.output"),
    *linear(f"{NEOX_LAYER}.mlp.dense_h_to_4h", "layers.{}.mlp.up"),
    *linear(f"{NEOX_LAYER}.mlp.dense_4h_to_h", "layers.{}.mlp.down"),
)
BERT_LAYER = "bert.encoder.layer.{}"
BERT = (
    Rule("bert.embeddings.word_embeddings.weight", ("embedding",)),
    Rule("bert.embeddings.position_embeddings.weight", ("positions",)),
    Rule("bert.embeddings.token_type_embeddings.weight", ("types",)),
    *norm("bert.embeddings.LayerNorm", "embedding_norm"),
    *linear(f"{BERT_LAYER}.attention.self.query", "layers.{}.attention.query"),
    *linear(f"{BERT_LAYER}.attention.self.key", "layers.{}.attention.key"),
    *linear(f"{BERT_LAYER}.attention.self.value", "layers.{}.attention.value"),
    *linear(f"{BERT_LAYER}.attention.output.dense", "layers.{}.attention.output"),
    *norm(f"{BERT_LAYER}.attention.output.LayerNorm", "layers.{}.attention_post_norm"),
    *linear(f"{BERT_LAYER}.intermediate.dense", "layers.{}.mlp.up"),
    *linear(f"{BERT_LAYER}.output.dense", "layers.{}.mlp.down"),
    *norm(f"{BERT_LAYER}.output.LayerNorm", "layers.{}.mlp_post_norm"),
    *linear("bert.pooler.dense", "pooler"),
    *linear("cls.predictions.transform.dense", "transform.dense"),
    *norm("cls.predictions.transform.LayerNorm", "transform.norm"),
    Rule("cls.predictions.decoder.weight", ("head",), turned=True),
    Rule("cls.predictions.bias", ("head_bias",)),
    Rule("cls.predictions.decoder.bias", ("head_bias",), again=True),  # the one that is added, where both are there
)
