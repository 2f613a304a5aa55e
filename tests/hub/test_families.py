"""Each family's fixtures (make_family_fixtures.py): logits as transformers gave them; configs both ways."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import (
    FIXTURES,
    TOLERANCE,
    compare_cached_logits,
    compare_gradients,
    compare_logits,
    compare_rewards,
    padded_right,
    read,
)

from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.hub import families, hugging_face
from jaxlm.hub.fields import alike, repeating
from jaxlm.model import layout
from jaxlm.model.config import ExpertsConfig, LatentConfig, ModelConfig
from jaxlm.model.transformer import define_model, empty_cache, for_inference
from jaxlm.model.weights import apply

ALL = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))
ENCODERS = ["bert", "bert-untied"]
LOGITS = [name for name in ALL if not name.startswith(("reward", "bare"))]
CAUSAL = [name for name in LOGITS if name not in ENCODERS]
REWARDS = [name for name in ALL if name.startswith("reward")]


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_transformers(name):
    compare_logits(FIXTURES / name)


# Each family once, with every kind of layer; the others take the same way and are slow tests.
FAST = [name for name in CAUSAL if "-" not in name or name in ("gemma3-scaled", "gpt-oss")]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL if name not in FAST]


@pytest.mark.parametrize("name", FAST + SLOW)
def test_cached_logits_are_those_of_transformers(name):
    compare_cached_logits(FIXTURES / name)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_those_of_transformers(name):
    compare_rewards(FIXTURES / name)


def test_a_bare_encoder_is_that_of_transformers():
    """Hidden states, and BERT's pooler over them."""
    _, config, definition, params, expected = read(FIXTURES / "bare-bert")
    assert (config.head, config.causal, config.token_types) == ("pooler", False, 1)
    run = lambda *x: apply(definition, params, lambda m: (hidden := m(*x)[0], m.pooled(hidden)))
    hidden, pooled = jax.jit(run)(*padded_right(expected))
    for row, length in enumerate(expected["lengths"]):
        np.testing.assert_allclose(hidden[row, :length], expected["hidden"][row, :length], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(pooled, expected["pooled"], atol=TOLERANCE, rtol=0)


def test_an_encoder_keeps_packed_documents_apart():
    """Two texts in one row are as each alone: nobody sees the other, and each sees all of its own."""
    _, _, definition, params, expected = read(FIXTURES / "bert")
    first, second = (row[:length] for row, length in zip(expected["ids"], expected["lengths"], strict=True))
    pad = np.zeros(5, np.int32)
    ids = np.concatenate([second, first, pad])
    segments = np.concatenate([np.full(len(second), 1), np.full(len(first), 2), pad]).astype(np.int32)
    positions = np.concatenate([np.arange(len(second)), np.arange(len(first)), pad]).astype(np.int32)
    rows = [x[None] for x in (ids, segments, positions)]
    logits = jax.jit(lambda *x: apply(definition, params, lambda m: m.logits(m(*x)[0])))(*rows)[0]
    np.testing.assert_allclose(logits[: len(second)], expected["right"][1, : len(second)], atol=TOLERANCE, rtol=0)
    inside = logits[len(second) : len(second) + len(first)]
    np.testing.assert_allclose(inside, expected["right"][0, : len(first)], atol=TOLERANCE, rtol=0)


def test_an_encoder_has_no_cache():
    _, config, definition, params, expected = read(FIXTURES / "bert")
    cache = empty_cache(config, *expected["ids"].shape)
    with pytest.raises(ValueError, match="an encoder has no cache"):
        jax.jit(lambda *x: apply(definition, params, lambda m: m(*x, cache)))(*padded_right(expected))


GRADIENTS = sorted(path.parent.name for path in FIXTURES.glob("*/gradients.safetensors"))


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in GRADIENTS]
)
def test_gradients_are_those_of_torch(name, tmp_path):
    compare_gradients(FIXTURES / name, tmp_path)


PARTS = (("attention", "query"),)


@pytest.mark.parametrize("name", ["gemma3", "pythia", "phi3", "qwen3-moe-dense", "bert-untied"])
def test_stacked_and_sharded_parameters_are_the_same(name):
    directory, _, definition, params, _ = read(FIXTURES / name)
    scanned = directory.config
    stacked = directory.load_params(define_model(scanned))
    jax.tree.map(np.testing.assert_array_equal, layout.unroll(stacked, scanned), params)
    mesh = make_mesh(MeshConfig(fsdp=2))
    sharded = directory.load_params(definition, definition.shardings(mesh))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    with directory.opened(define_model(scanned)) as lazy:
        layer = str(scanned.groups()[0])
        for part, weight in (("attention", "query"), ("experts", "up")) if scanned.experts.count else PARTS:
            first = lazy["stack"]["0"][part][weight][0]
            np.testing.assert_array_equal(np.asarray(first), params["layers"][layer][part][weight])


@pytest.mark.parametrize("name", ALL)
def test_configs_are_written_as_they_were_read(name):
    """Nothing that decides what is computed is lost or added: keys come back as they were, but for other words."""
    values = json.loads((FIXTURES / name / "config.json").read_text())
    family = families.family_of(values, "config.json")
    config = family.read(values, "config.json")
    written = family.write(config)
    assert alike(family.read(written, "again"), config) == []
    reworded = {"activation_function", "hidden_act", "n_inner", "max_window_layers", "sliding_window"}
    labels = {"id2label", "label2id", "tie_word_embeddings"} if config.criteria else set()
    for key in (values.keys() & written.keys()) - reworded - labels:
        assert written[key] == values[key] or values[key] is None, key


def test_families_of_our_own_models():
    """A model of ours goes out as the first family that has such models; one that none has is refused with reasons."""
    base = {"vocab_size": 64, "layers": 2, "width": 16, "heads": 2}
    latent: dict[str, Any] = {"latent": LatentConfig(kv_rank=8), "rope_size": 4, "rope_interleaved": True}
    v3: dict[str, Any] = {"count": 4, "shared": 1, "scores": "sigmoid", "choice_bias": True}
    for config, family in (
        (ModelConfig(**base), "llama"),
        (ModelConfig(**base, qk_norm=True, kv_heads=1), "qwen3"),
        (ModelConfig(**base, pattern=("local",), window=4), "mistral"),
        (ModelConfig(**base, pattern=("local", "global"), window=4, biases=("qkv",)), "qwen2"),
        (ModelConfig(**base, criteria=("overall",)), "llama"),
        (ModelConfig(**base, experts=ExpertsConfig(count=3)), "mixtral"),
        (ModelConfig(**base, experts=ExpertsConfig(count=3, every=2), qk_norm=True), "qwen3_moe"),
        (ModelConfig(**base, **latent, experts=ExpertsConfig(count=4, shared=1, normalize=False)), "deepseek_v2"),
        (ModelConfig(**base, **latent, experts=ExpertsConfig(**v3)), "deepseek_v3"),
    ):
        assert families.find(config.complete())[0].model_type == family
    with pytest.raises(UserError, match="llama models have another .*logit_soft_cap"):
        families.find(ModelConfig(**base, logit_soft_cap=5.0).complete())
    with pytest.raises(UserError, match="qwen2 models have another biases"):
        families.find(ModelConfig(**base).complete(), "qwen2")


def config_json(model_type, name, layers, sizes, vocab, **others):
    """config.json as it is published, but for what every one of them has: `sizes` are width, MLP, heads, kv heads."""
    values = dict(
        zip(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), sizes, strict=False)
    )
    values |= {"num_hidden_layers": layers, "vocab_size": vocab, "torch_dtype": "bfloat16", "use_cache": True}
    values |= {"transformers_version": "4.44.0", "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": [2, 3]}
    return values | {"model_type": model_type, "architectures": [name], "max_position_embeddings": 8192} | others


LLAMA31 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
LLAMA31 |= {"original_max_position_embeddings": 8192}
GEMMA3 = {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_theta": 1000000}
DEEPSEEK = {"attention_bias": False, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
DEEPSEEK |= {"v_head_dim": 128, "moe_layer_freq": 1, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
DEEPSEEK_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK_YARN |= {"original_max_position_embeddings": 4096}
# Published models: config.json, and how many parameters they are known to have.
PUBLISHED = {
    "Llama 2 7B": (
        config_json("llama", "LlamaForCausalLM", 32, (4096, 11008, 32, 32), 32000, pretraining_tp=1, rope_scaling=None),
        6_738_415_616,
    ),
    "Llama 3.2 1B": (
        config_json(
            *("llama", "LlamaForCausalLM", 16, (2048, 8192, 32, 8), 128256),
            head_dim=64,
            mlp_bias=False,
            rope_scaling=LLAMA31,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "SmolLM2 135M": (
        config_json(
            *("llama", "LlamaForCausalLM", 30, (576, 1536, 9, 3), 49152),
            is_llama_config=True,
            rope_interleaved=False,
            tie_word_embeddings=True,
            **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        ),
        134_515_008,
    ),
    "SmolLM3 3B": (
        config_json(
            *("smollm3", "SmolLM3ForCausalLM", 36, (2048, 11008, 16, 4), 128256),
            max_window_layers=28,
            no_rope_layers=[1, 1, 1, 0] * 9,
            layer_types=["full_attention"] * 36,
            use_sliding_window=False,
            sliding_window=None,
            rope_theta=5e6,
            pretraining_tp=2,
        ),
        3_075_098_624,
    ),
    "Mistral 7B": (
        config_json("mistral", "MistralForCausalLM", 32, (4096, 14336, 32, 8), 32000, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen 2.5 0.5B": (
        config_json(
            *("qwen2", "Qwen2ForCausalLM", 24, (896, 4864, 14, 2), 151936),
            max_window_layers=24,
            sliding_window=32768,
            use_sliding_window=False,
            use_mrope=False,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "Qwen 3 0.6B": (
        config_json(
            *("qwen3", "Qwen3ForCausalLM", 28, (1024, 3072, 16, 8), 151936),
            attention_bias=False,
            head_dim=128,
            max_window_layers=28,
            sliding_window=None,
            use_sliding_window=False,
            rope_theta=1000000,
            tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "Gemma 2B": (
        config_json(
            *("gemma", "GemmaForCausalLM", 18, (2048, 16384, 8, 1), 256000),
            head_dim=256,
            hidden_act="gelu",
            hidden_activation="gelu_pytorch_tanh",
        ),
        2_506_172_416,
    ),
    "Gemma 2 2B": (
        config_json(
            *("gemma2", "Gemma2ForCausalLM", 26, (2304, 9216, 8, 4), 256000),
            head_dim=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            cache_implementation="hybrid",
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        2_614_341_888,
    ),
    "Gemma 3 1B": (
        config_json(
            *("gemma3_text", "Gemma3ForCausalLM", 26, (1152, 6912, 4, 1), 262144),
            **{"head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": None} | GEMMA3,
        ),
        999_885_952,
    ),
    "OLMo 2 7B": (
        config_json("olmo2", "Olmo2ForCausalLM", 32, (4096, 11008, 32, 32), 100352, rope_theta=500000),
        7_298_617_344,
    ),
    "Phi 3 mini 4k": (
        config_json(
            *("phi3", "Phi3ForCausalLM", 32, (3072, 8192, 32, 32), 32064),
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            attention_bias=False,
            original_max_position_embeddings=4096,
            rope_scaling=None,
            sliding_window=2047,
        ),
        3_821_079_552,
    ),
    "Phi 3.5 mini": (
        config_json(
            *("phi3", "Phi3ForCausalLM", 32, (3072, 8192, 32, 32), 32064),
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
            attention_bias=False,
            original_max_position_embeddings=4096,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.08, *[64.5] * 47]},
            sliding_window=262144,
        ),
        3_821_079_552,
    ),
    "Pythia 70M": (
        config_json(
            *("gpt_neox", "GPTNeoXForCausalLM", 6, (512, 2048, 8), 50304),
            rotary_pct=0.25,
            rotary_emb_base=10000,
            layer_norm_eps=1e-5,
            use_parallel_residual=True,
        ),
        70_426_624,
    ),
    "Mixtral 8x7B": (
        config_json(
            *("mixtral", "MixtralForCausalLM", 32, (4096, 14336, 32, 8), 32000),
            num_experts_per_tok=2,
            num_local_experts=8,
            output_router_logits=False,
            router_aux_loss_coef=0.02,
            sliding_window=None,
            rope_theta=1e6,
        ),
        46_702_792_704,
    ),
    "Qwen 3 30B A3B": (
        config_json(
            *("qwen3_moe", "Qwen3MoeForCausalLM", 48, (2048, 6144, 32, 4), 151936),
            attention_bias=False,
            decoder_sparse_step=1,
            head_dim=128,
            max_window_layers=48,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            sliding_window=None,
            use_sliding_window=False,
            rope_theta=1000000.0,
        ),
        30_532_122_624,
    ),
    "GPT-OSS 20B": (
        config_json(
            *("gpt_oss", "GptOssForCausalLM", 24, (2880, 2880, 64, 8), 201088),
            attention_bias=True,
            experts_per_token=4,
            head_dim=64,
            initial_context_length=4096,
            layer_types=["sliding_attention", "full_attention"] * 12,
            num_experts_per_tok=4,
            num_local_experts=32,
            sliding_window=128,
            swiglu_limit=7.0,
            rope_theta=150000,
            rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
            | {"original_max_position_embeddings": 4096},
        ),
        20_914_757_184,
    ),
    "BERT base, uncased": (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "num_attention_heads": 12}
        | {"num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}
        | {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute"}
        | {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "pad_token_id": 0, "use_cache": True},
        109_514_298,
    ),
    "BERT base, Chinese, bare": (
        {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 768, "num_attention_heads": 12}
        | {"num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 21128, "max_position_embeddings": 512}
        | {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "directionality": "bidi"}
        | {"pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_type": "first_token_transform"},
        102_267_648,
    ),
    "DeepSeek V2 Lite": (
        config_json(
            *("deepseek_v2", "DeepseekV2ForCausalLM", 27, (2048, 10944, 16, 16), 102400),
            **DEEPSEEK | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0},
            first_k_dense_replace=1,
            q_lora_rank=None,
            num_experts_per_tok=6,
            n_shared_experts=2,
            n_routed_experts=64,
            moe_intermediate_size=1408,
            norm_topk_prob=False,
            scoring_func="softmax",
            rope_scaling=DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        15_706_484_224,
    ),
    "DeepSeek V2": (
        config_json(
            *("deepseek_v2", "DeepseekV2ForCausalLM", 60, (5120, 12288, 128, 128), 102400),
            **DEEPSEEK | {"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
            routed_scaling_factor=16.0,
            first_k_dense_replace=1,
            q_lora_rank=1536,
            n_shared_experts=2,
            n_routed_experts=160,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            norm_topk_prob=False,
            scoring_func="softmax",
            rope_scaling=DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        235_741_434_880,
    ),
    "DeepSeek V3": (  # 671,026,404,352 and the 58 x 256 of what moves the choice of experts
        config_json(
            *("deepseek_v3", "DeepseekV3ForCausalLM", 61, (7168, 18432, 128, 128), 129280),
            **DEEPSEEK | {"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "routed_scaling_factor": 2.5},
            first_k_dense_replace=3,
            q_lora_rank=1536,
            n_shared_experts=1,
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            num_nextn_predict_layers=1,
            rope_scaling=DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        671_026_419_200,
    ),
    "GPT-2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 1024, "n_embd": 768, "n_head": 12}
        | {"n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "activation_function": "gelu_new"}
        | {"summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}}},
        124_439_808,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_known_size(name):
    values, parameters = PUBLISHED[name]
    family = families.family_of(values, name)
    config = family.read(values, name)
    assert define_model(config).parameter_count() == parameters
    assert families.find(config, family.model_type)[0] is family  # what is written is read as the same
    small = dataclasses.replace(config, layers=2)
    held = {name for tensor in hugging_face.tensors_of(family, small) for name, _ in tensor.parts}
    assert len(held) == len(for_inference(small)[1].weights)


def test_the_shortest_pattern():
    assert repeating(["local", "global", "local"]) == ("local", "global")
    assert repeating(["local", "local", "global"]) == ("local", "local", "global")
    assert repeating(["global"] * 5) == ("global",)


REFUSED = {
    "another kind": ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not understood"),
    "one letter off": ("llama", {"model_type": "lama"}, "did you mean 'llama'"),
    "no kind": ("llama", {"model_type": None}, "has no model_type"),
    "another task": ("llama", {"architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering is not"),
    "a key that may change the mathematics": ("llama", {"attention_sinks": 4}, "attention_sinks not understood"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config not understood"),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "RoPE type 'dynamic' is not"),
    "yarn without its positions": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "yarn: original_max_position_embeddings is missing",
    ),
    "Phi-3's yarn, which is LongRoPE": (
        "phi3",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "RoPE type yarn: short_factor is None; a list of numbers",
    ),
    "Phi-3 with another scaling": (
        "phi3",
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "RoPE type 'linear' is not understood in a phi3 model",
    ),
    "LongRoPE of too few factors": (
        "phi3-longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
        "longrope needs 4 short_factors and long_factors",
    ),
    "LongRoPE of two minds": (
        "phi3-longrope",
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 21}},
        "original_max_position_embeddings is 20, but 21 in the scaling",
    ),
    "LongRoPE elsewhere": ("llama", {"rope_scaling": {"type": "longrope"}}, "RoPE type 'longrope' is not understood"),
    "MXFP4": ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4 are not read; load the model"),
    "dense layers in the middle": ("qwen3-moe-dense", {"mlp_only_layers": [1]}, "only the first layers are understood"),
    "experts without a number": ("mixtral", {"num_local_experts": None}, "num_experts is missing"),
    "more choices than experts": ("mixtral", {"num_experts_per_tok": 9}, "9 of 4 experts cannot be chosen"),
    "another choice of experts": ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not"),
    "V2's normalized weights": ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
    "V3 without its choice": ("deepseek-v3", {"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc'"),
    "experts in every other layer": ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1"),
    "groups too small": ("deepseek-v3", {"topk_group": 1}, "1 of 4 groups of 8 experts, by 2 each, hold no 3"),
    "latents of no size": ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank is None; 1 or more is needed"),
    "fewer keys than queries": ("deepseek-v3", {"num_key_value_heads": 2}, "latent: goes with as many kv_heads as"),
    "pieces of float8": (
        "deepseek-v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "weights in fp8 are not read; load the model",
    ),
    "another clamp": ("gpt-oss", {"swiglu_limit": 9.0}, "swiglu_limit is 9.0; only 7.0"),
    "a scaling without its factor": ("llama", {"rope_scaling": {"type": "linear"}}, "linear: factor is missing"),
    "a scaling with more": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "mscale is not"),
    "interleaved RoPE": ("llama", {"rope_interleaved": True}, "rope_interleaved is True; only False"),
    "another activation": ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not understood; silu"),
    "a size as text": ("llama", {"hidden_size": "16"}, "hidden_size is '16', which is no int"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; 1 or more"),
    "heads that do not divide": (
        "llama",
        {"num_key_value_heads": 3},
        "gives a model whose kv_heads: 3 does not divide",
    ),
    "a billion layers": ("llama", {"num_hidden_layers": 10**9}, "a model of 1000000000 layers, of 10000 at most"),
    "a width past all memory": (
        "llama",
        {"hidden_size": 2**40},
        r"lm_head.weight: is F32\[71, 16\], but \[71, 1099511",
    ),
    "chunked attention": ("smollm3", {"layer_types": ["chunked_attention"] * 5}, "'chunked_attention' is not"),
    "a layer too few": ("gemma3", {"layer_types": ["full_attention"]}, "a name for each of 4 layers"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "a window of no size": ("gemma2", {"sliding_window": None}, "sliding_window is None; a number"),
    "local scaling": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "a scaling of sliding_attention",
    ),
    "scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is"),
    "a decoder made of BERT": ("bert", {"is_decoder": True}, "is_decoder is True; only False"),
    "BERT's relative positions": ("bert", {"position_embedding_type": "relative_key"}, "only 'absolute' is understood"),
    "BERT's other heads": (
        "bert",
        {"architectures": ["BertForSequenceClassification"]},
        "BertForSequenceClassification is not understood; BertForMaskedLM and BertModel are",
    ),
    "no token types": ("bert", {"type_vocab_size": 0}, "type_vocab_size is 0; 1 or more"),
    "two answers a question": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "an odd share": ("phi3-partial", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_size: got 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    name, changes, said = REFUSED[case]
    for path in (FIXTURES / name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said) as refused:
        directory = hugging_face.read(tmp_path)
        directory.load_params(for_inference(directory.config)[1])
    assert refused.value.exit_code == 2
    assert str(tmp_path) in str(refused.value)


def test_layers_for_further_tokens_are_left_out(tmp_path):
    """DeepSeek-V3's checkpoints hold some past the last layer, which their config.json counts; others are refused."""
    for path in (FIXTURES / "deepseek-v3").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    stored["model.layers.3.eh_proj.weight"] = np.zeros((16, 32), np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    expected = read(FIXTURES / "deepseek-v3")[3]
    for layers, fine in ((1, True), (0, False)):
        values = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": layers}
        (tmp_path / "config.json").write_text(json.dumps(values))
        directory = hugging_face.read(tmp_path, compute="float32")
        load = lambda directory=directory: directory.load_params(for_inference(directory.config)[1])
        if fine:
            jax.tree.map(np.testing.assert_array_equal, load(), expected)
        else:
            with pytest.raises(UserError, match=r"unknown: model.layers.3.eh_proj.weight"):
                load()
