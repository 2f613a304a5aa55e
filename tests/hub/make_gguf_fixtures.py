"""Tiny GGUF files, converted as llama.cpp's own script does it, with the logits and tokens that others give them.

    python tests/hub/make_gguf_fixtures.py      # where torch, transformers, gguf, sentencepiece are
    python tests/hub/make_gguf_fixtures.py check FILE.gguf ...      # ids [2, S] on stdin: the logits of transformers

Each case of tests/hub/fixtures/gguf is NAME.gguf and NAME.safetensors: ids of rows, and the float32 logits of
`from_pretrained(gguf_file=)`. Tokens of "llama" are sentencepiece's own, those of the byte-level ones `tokenizers`'.
Gemma's heads have 256 numbers, Qwen 3's 128, its experts 768, and GPT-2 has 1024
positions: transformers reads no other from their files.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "fixtures/gguf"
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = SMALL | {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
MOE = {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 768, "norm_topk_prob": True}
MOE |= {"num_hidden_layers": 1}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MIXED = {"attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q4_1", "ffn_up": "BF16", "ffn_down": "Q5_0", "ffn_gate": "Q5_1"}
# name → (model_type, architecture, config, tokenizer, type of the matrices where the name of a tensor has no own)
CASES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "llama": ("llama", "llama", SMALL, "llama", "F16"),
    "llama-mixed": ("llama", "llama", SMALL | {"tie_word_embeddings": True, "rope_theta": 500.0}, "llama", "mixed"),
    "qwen2": ("qwen2", "qwen2", SMALL | {"num_key_value_heads": 1}, "qwen2", "F32"),
    "qwen3": (
        "qwen3",
        "qwen3",
        SMALL | {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "qwen2",
        "Q8_0",
    ),
    "qwen3moe": ("qwen3_moe", "qwen3moe", SMALL | MOE, "qwen2", "Q8_0"),
    "gemma2": ("gemma2", "gemma2", GEMMA | {"sliding_window": 5}, "llama", "Q8_0"),
    "gemma3": ("gemma3_text", "gemma3", GEMMA | {"sliding_window": 5, "num_hidden_layers": 7}, "llama", "Q4_0"),
    "phi3": ("phi3", "phi3", SMALL | {"pad_token_id": 0}, "llama", "F16"),
    "gpt2": ("gpt2", "gpt2", GPT2, "gpt-2", "F16"),
}
TEXTS = ["the cat sees the dog", "a bird hears a small red house", "the tree and the river", "dog finds cat"] * 8
PROBES = [
    "the cat sees a red dog",
    " two  spaces\n\nand 12345 digits",
    "naïve café 你好 🙂",
    "can't they'll",
    "</s> <s>",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def llama_vocabulary() -> tuple[dict[str, Any], dict[str, list[int]]]:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=made, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<|im_start|>"], control_symbols=["<|im_end|>"],
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_byte", 6), ("is_unused", 5))
    types = [next((t for kind, t in kinds if getattr(model, kind)(i)), 1) for i in range(len(model))]
    for name in ("<|im_start|>", "<|im_end|>"):
        types[model.piece_to_id(name)] = 3  # as llama.cpp's script has the added tokens that are special
    values = {"model": "llama", "pre": "default", "tokens": [model.id_to_piece(i) for i in range(len(model))]}
    values |= {"scores": [model.get_score(i) for i in range(len(model))], "token_type": types}
    values |= {"add_bos_token": True, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    values |= {"eot_token_id": model.piece_to_id("<|im_end|>"), "padding_token_id": 0}
    return values, {text: model.encode(text) for text in PROBES}


def byte_level_vocabulary(pre: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=SPECIAL
    )
    made.train_from_iterator(TEXTS, trainer)
    ids = made.get_vocab()
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    values = {"model": "gpt2", "pre": pre, "tokens": sorted(ids, key=lambda token: ids[token]), "merges": merges}
    values |= {"token_type": [3 if token in SPECIAL else 1 for token in values["tokens"]]}
    values |= {"eos_token_id": 2, "padding_token_id": 0, "add_bos_token": False, "bos_token_id": 0}
    made.encode_special_tokens = True
    return values, {text: made.encode(text).ids for text in PROBES}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    return (
        weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def converted(model: Any, arch: str, config: Any) -> dict[str, np.ndarray]:
    """llama.cpp's names and order of the numbers: convert_hf_to_gguf.py, class by class."""
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    made: dict[str, np.ndarray] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if arch == "llama" and "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if "experts.gate_up_proj" in name:  # transformers 5 holds them in one tensor
            block = name.split(".")[2]
            made[f"blk.{block}.ffn_gate_exps.weight"], made[f"blk.{block}.ffn_up_exps.weight"] = np.split(array, 2, 1)
            continue
        if "experts.down_proj" in name:
            name += ".weight"
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        made[found] = array
    return made


def write(
    name: str, arch: str, config: Any, tensors: dict[str, np.ndarray], tokens: dict[str, Any], dtype: str
) -> None:
    writer = gguf.GGUFWriter(FOLDER / f"{name}.gguf", arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        theta = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_rope_freq_base(theta["rope_theta"])
        writer.add_key_length(size)
        writer.add_value_length(size)
        if arch in ("llama", "phi3"):
            writer.add_rope_dimension_count(size)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in tokens.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ]
        add(f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(CHATML)
    for tensor, array in tensors.items():
        wanted = next((t for part, t in MIXED.items() if part in tensor), "F16") if dtype == "mixed" else dtype
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 or "gate_inp" in tensor else wanted]
        writer.add_tensor(tensor, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **EAGER).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def make(name: str) -> None:
    model_type, arch, values, vocabulary, dtype = CASES[name]
    torch.manual_seed(sum(name.encode()))
    tokens, expected = llama_vocabulary() if vocabulary == "llama" else byte_level_vocabulary(vocabulary)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=len(tokens["tokens"]), **values, **EAGER)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            size = 0.3 if weight.ndim == 1 else 0.6 * weight.shape[-1] ** -0.5
            random = torch.randn_like(weight) * size + (1.0 if path.endswith("norm.weight") else 0.0)
            weight.copy_(random.half())
    FOLDER.mkdir(exist_ok=True)
    write(name, arch, config, converted(model, arch, config), tokens, dtype)
    ids = torch.randint(3, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(0))
    logits = logits_of(FOLDER / f"{name}.gguf", ids)
    if dtype in ("F32", "F16"):
        with torch.no_grad():
            print(name, "as before its conversion to", float((model(input_ids=ids).logits - logits).abs().max()))
    safetensors.torch.save_file({"ids": ids.to(torch.int32), "logits": logits}, FOLDER / f"{name}.safetensors")
    (FOLDER / f"{name}.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        rows = torch.tensor(json.loads(sys.stdin.read()))
        print(json.dumps({path: logits_of(Path(path), rows).tolist() for path in sys.argv[2:]}))
    else:
        for case in sys.argv[1:] or CASES:
            make(case)
