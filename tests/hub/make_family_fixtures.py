"""Tiny checkpoints of each family with the logits that transformers gives them: tests/hub/fixtures.

    python tests/hub/make_family_fixtures.py            # in an environment with torch and transformers, without jaxlm
    python tests/hub/make_family_fixtures.py into DIR SEED    # the same cases of other random numbers, elsewhere
    python tests/hub/make_family_fixtures.py check DIR ...    # loads each as a user would; prints what it found

A fixture is what `save_pretrained` writes, and expected.safetensors: rows of ids of two lengths, and the float32 logits
of their tokens when padded on the right, and when padded on the left (of a bare encoder: hidden states, and what its
pooler makes of them). Some have gradients.safetensors too: of the mean cross-entropy of the rows' next tokens, under
the names of the weights. Rows are longer than the windows and than the positions that scaled RoPE was made for. All
weights are random, norms and biases too.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).parent / "fixtures"
LENGTHS = (26, 17)
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # torch's grouped product wants even sizes
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
SMALL: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ODD = {"head_dim": 10, "num_key_value_heads": 1, "num_hidden_layers": 2}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 10}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 0.5}
# As DeepSeek has them: heads of 6 + 4 numbers for queries and keys, of 8 for values.
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10}
DEEPSEEK_YARN = YARN | {"rope_theta": 500.0, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.7}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.5, 3.0, 7.0]}
HALF = {"short_factor": [1.0, 1.2], "long_factor": [1.1, 5.0]}
GROUPS = {"n_group": 4, "topk_group": 2}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
GPT2: dict[str, Any] = {"vocab_size": 71, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

BERT: dict[str, Any] = {"vocab_size": 71, "hidden_size": 15, "num_attention_heads": 3, "num_hidden_layers": 3}
BERT |= {"intermediate_size": 22, "max_position_embeddings": 40, "pad_token_id": 0}

# name → (model_type, config, type of the stored weights)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", SMALL, "float32"),
    "llama-3": (
        "llama",
        SMALL | ODD | {"rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
        "bfloat16",
    ),
    "llama-biases": (
        "llama",
        SMALL | {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "float16",
    ),
    "smollm3": ("smollm3", SMALL | {"num_hidden_layers": 5, "tie_word_embeddings": True}, "float32"),
    "smollm3-windows": (
        "smollm3",
        SMALL
        | {"num_key_value_heads": 1, "no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 5}
        | {"tie_word_embeddings": False},
        "bfloat16",
    ),
    "smollm3-biases": (
        "smollm3",
        SMALL | ODD | {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
        "float32",
    ),
    "mistral-tied": ("mistral", SMALL | ODD | {"sliding_window": 4, "tie_word_embeddings": True}, "float32"),
    "mistral": ("mistral", SMALL | {"sliding_window": 5}, "bfloat16"),
    "mistral-whole": ("mistral", SMALL | ODD | {"sliding_window": None, "rope_theta": 1e6}, "float32"),
    "qwen2": ("qwen2", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}, "float32"),
    "qwen2-windows": (
        "qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "rope_theta": 1e6},
        "bfloat16",
    ),
    "qwen2-odd": ("qwen2", SMALL | ODD | {"tie_word_embeddings": False}, "float32"),
    "qwen3": ("qwen3", SMALL | ODD, "bfloat16"),
    "qwen3-biases": ("qwen3", SMALL | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}, "float32"),
    "gemma": ("gemma", SMALL | ODD, "float32"),
    "gemma-biases": (
        "gemma",
        SMALL | {"head_dim": 4, "attention_bias": True, "tie_word_embeddings": False},
        "bfloat16",
    ),
    "gemma2": ("gemma2", SMALL | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 6}, "bfloat16"),
    "gemma2-caps": (
        "gemma2",
        SMALL | ODD | {"sliding_window": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        "float32",
    ),
    "gemma2-biases": (
        "gemma2",
        SMALL | ODD | {"sliding_window": 5, "attention_bias": True, "tie_word_embeddings": False},
        "float32",
    ),
    "gemma3-biases": (
        "gemma3_text",
        SMALL | ODD | {"sliding_window": 5, "attention_bias": True, "tie_word_embeddings": False},
        "float32",
    ),
    "gemma3": (
        "gemma3_text",
        SMALL | {"head_dim": 6, "sliding_window_pattern": 3, "num_hidden_layers": 4, "sliding_window": 5},
        "bfloat16",
    ),
    "gemma3-scaled": (
        "gemma3_text",
        SMALL
        | ODD
        | {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 20}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 2000.0, "rope_local_base_freq": 50.0},
        "float32",
    ),
    "olmo2": ("olmo2", SMALL, "float32"),
    "olmo2-biases": (
        "olmo2",
        SMALL | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
        "bfloat16",
    ),
    "olmo2-odd": ("olmo2", SMALL | ODD, "float32"),
    "phi3": ("phi3", SMALL | {"sliding_window": 5}, "bfloat16"),
    "phi3-partial": (
        "phi3",
        SMALL | {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "float32",
    ),
    # Rows of 26 tokens take the long factors, rows of 17 the short ones; transformers runs each row by itself here, as
    # it takes one of them for a whole batch.
    "phi3-longrope": (
        "phi3",
        SMALL
        | {"hidden_size": 32, "num_key_value_heads": 1, "original_max_position_embeddings": 20}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0} | FACTORS},
        "float32",
    ),
    "phi3-longrope-partial": (
        "phi3",
        SMALL
        | {"hidden_size": 32, "original_max_position_embeddings": 8, "sliding_window": 7, "num_hidden_layers": 2}
        | {"rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5, "attention_factor": 1.3} | HALF}
        | {"tie_word_embeddings": True},
        "bfloat16",
    ),
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}, "bfloat16"),
    "mixtral-windows": (
        "mixtral",
        SMALL | ODD | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5, "intermediate_size": 7},
        "float32",
    ),
    "mixtral-tied": (
        "mixtral",
        SMALL | ODD | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        "float32",
    ),
    "qwen3-moe": ("qwen3_moe", SMALL | ODD | QWEN_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2}, "bfloat16"),
    "qwen3-moe-dense": (
        "qwen3_moe",
        SMALL
        | QWEN_MOE
        | {"head_dim": 8, "mlp_only_layers": [0], "attention_bias": True, "tie_word_embeddings": True}
        | {"use_sliding_window": True, "sliding_window": 6},
        "float32",
    ),
    "gpt-oss": (
        "gpt_oss",
        SMALL
        | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": YARN | {"rope_theta": 500.0, "truncate": False, "factor": 8.0}},
        "float32",
    ),
    "gpt-oss-odd": (
        "gpt_oss",
        SMALL
        | ODD
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 7, "sliding_window": 3}
        | {"attention_bias": False, "layer_types": ["full_attention", "sliding_attention"]}
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        "bfloat16",
    ),
    "llama-yarn": ("llama", SMALL | ODD | {"rope_parameters": YARN | {"rope_theta": 500.0, "factor": 8.0}}, "float32"),
    "deepseek-v2": (
        "deepseek_v2",
        SMALL
        | LATENT
        | GROUPS
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "q_lora_rank": 14}
        | {"first_k_dense_replace": 1, "n_shared_experts": 2, "rope_parameters": DEEPSEEK_YARN},
        "float32",
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        SMALL
        | LATENT
        | {"q_lora_rank": None, "num_hidden_layers": 2, "v_head_dim": 4, "attention_bias": True, "n_shared_experts": 1}
        | {"rope_parameters": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, "rms_norm_eps": 1e-5}
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "bfloat16",
    ),
    "deepseek-v3": (
        "deepseek_v3",
        SMALL
        | LATENT
        | GROUPS
        | {"q_lora_rank": 14, "first_k_dense_replace": 1, "n_shared_experts": 1, "rms_norm_eps": 1e-5}
        | {"rope_parameters": DEEPSEEK_YARN, "num_nextn_predict_layers": 0},
        "bfloat16",
    ),
    "deepseek-v3-plain": (
        "deepseek_v3",
        SMALL
        | LATENT
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}
        | {"attention_bias": True, "norm_topk_prob": False, "rope_interleave": False, "num_hidden_layers": 2}
        | {"v_head_dim": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 6, "tie_word_embeddings": True},
        "float32",
    ),
    "gpt2": ("gpt2", GPT2, "float32"),
    "gpt2-untied": ("gpt2", GPT2 | {"n_inner": 20, "tie_word_embeddings": False}, "bfloat16"),
    "pythia": ("gpt_neox", NEOX | {"hidden_size": 32, "rotary_pct": 0.25, "num_hidden_layers": 2}, "float16"),
    "neox-serial": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
        "float32",
    ),
    "bert": ("bert", BERT, "float32"),
    "bert-untied": (
        "bert",
        BERT
        | {"hidden_size": 28, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 75, "type_vocab_size": 3}
        | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
        "bfloat16",
    ),
    "bare-bert": ("bert", BERT | {"hidden_size": 12, "num_attention_heads": 4, "type_vocab_size": 1}, "float32"),
    "neox-tied": ("gpt_neox", NEOX | {"rotary_pct": 0.5, "tie_word_embeddings": True}, "float32"),
    "reward-llama": ("llama", SMALL | {"num_labels": 1}, "float32"),
    "reward-qwen3": ("qwen3", SMALL | ODD | {"num_labels": 1}, "bfloat16"),
    "reward-mixtral": (
        "mixtral",
        SMALL | {"num_labels": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
        "float32",
    ),
    "reward-gpt2": ("gpt2", GPT2 | {"num_labels": 1}, "float32"),
}
SHARDED = ("qwen2-windows",)
# All of them in float32: a stored weight is the one that the gradient was taken at.
GRADIENTS = ("llama", "gemma2-caps", "qwen3-moe-dense", "deepseek-v2")


def make(name: str, into: Path = FOLDER, seed: int = 0) -> None:
    model_type, values, dtype = CASES[name]
    torch.manual_seed(sum(name.encode()) + seed)
    config = transformers.AutoConfig.for_model(model_type, **values, **EAGER)
    reward, bare = "num_labels" in values, name.startswith("bare")
    model = kind_of(model_type, reward, bare).from_config(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            size = 0.3 if weight.ndim == 1 else 0.6 * weight.shape[-1] ** -0.5
            random = torch.randn_like(weight) * size + (1.0 if path.endswith("norm.weight") else 0.0)
            weight.copy_(random.to(getattr(torch, dtype)))
        if model_type == "bert" and not bare:  # one of the two takes no part in what an untied model computes
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_((torch.randn_like(buffer) * 0.3).to(getattr(torch, dtype)))
    ids = torch.randint(
        3, values["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(seed)
    )
    expected = {"ids": ids.to(torch.int32), "lengths": torch.tensor(LENGTHS, dtype=torch.int32)}
    rows = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    if bare:
        expected |= run_bare(model, rows)
    elif reward:
        expected["rewards"] = run(model, rows, left=False, reward=True)
    else:
        for side in ("right", "left"):
            expected[side] = run(model, rows, left=side == "left")
        assert torch.allclose(expected["right"], expected["left"], atol=2e-5)
    folder = into / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="12KB" if name in SHARDED else "5GB")
    safetensors.torch.save_file(expected, folder / "expected.safetensors")
    if name in GRADIENTS:
        save_gradients(model, rows, folder)


def save_gradients(model: Any, rows: list[torch.Tensor], folder: Path) -> None:
    """In place of the weights, so that they are saved under the weights' names: this is the end of the model."""
    logits = [model(input_ids=row[None]).logits[0] for row in rows]
    told, next_ids = torch.cat([part[:-1] for part in logits]), torch.cat([row[1:] for row in rows])
    torch.nn.functional.cross_entropy(told, next_ids).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        shutil.copy(Path(temporary) / "model.safetensors", folder / "gradients.safetensors")


def kind_of(model_type: str, reward: bool, bare: bool) -> Any:
    if bare:
        return transformers.AutoModel
    if reward:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForMaskedLM if model_type == "bert" else transformers.AutoModelForCausalLM


def run_bare(model: Any, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 hidden states [rows, S, D], zeros behind each row's, and pooled ones [rows, D]."""
    mask = torch.tensor([[place < len(row) for place in range(max(map(len, rows)))] for row in rows]).long()
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    hidden = out.last_hidden_state * mask[:, :, None]
    return {"hidden": hidden, "pooled": out.pooler_output, "mean": hidden.sum(1) / mask.sum(1, keepdim=True)}


def run(model: Any, rows: list[torch.Tensor], left: bool, reward: bool = False) -> torch.Tensor:
    """float32 logits [rows, S, V] of the rows' tokens, each row's beginning at 0 and zeros behind them."""
    S = max(map(len, rows))
    if "longrope" in str(model.config) and len(rows) > 1:
        alone = [run(model, [row], left)[0] for row in rows]
        return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, S - len(part))) for part in alone])
    ids, mask = torch.zeros(len(rows), S, dtype=torch.int64), torch.zeros(len(rows), S, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(S - len(row), S) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    if reward:
        return logits
    out = torch.zeros(len(rows), S, logits.shape[-1])
    for number, row in enumerate(rows):
        out[number, : len(row)] = logits[number, mask[number].bool()]
    return out


TEXTS = ["the cat sees the dog", "a bird hears a small red house", "the tree and the river", "dog finds cat"] * 8
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizers() -> None:
    """Two tokenizers with what transformers makes of texts and chats: GPT-2's way, and Llama 2's."""
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    space = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    space.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    space.decoder = decoders.Sequence(parts)
    for name, made, special in (("byte-level", byte_level, SPECIAL), ("spaces", space, [*SPECIAL, "<unk>"])):
        trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=special, show_progress=False)
        made.train_from_iterator(TEXTS, trainer)
        if name == "spaces":
            made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHATML
        )
        folder = FOLDER / f"tokenizer-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        fast.save_pretrained(folder)
        chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
        expected = {
            "texts": {text: fast(text)["input_ids"] for text in ("the cat sees a red dog", "river", "")},
            "chat": chat,
            "rendered": fast.apply_chat_template(chat, tokenize=False),
            "prompt": fast.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True),
        }
        (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
    words = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    )
    bert = transformers.BertTokenizer(vocab=words.get_vocab())
    folder = FOLDER / "tokenizer-wordpiece"
    shutil.rmtree(folder, ignore_errors=True)
    bert.save_pretrained(folder)
    texts = ("the cat sees a red dog", "The RIVER, été!", "")
    expected = {
        "texts": {text: bert(text)["input_ids"] for text in texts},
        "decoded": {text: bert.decode(bert(text)["input_ids"], skip_special_tokens=True) for text in texts},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def check(folder: str, rows: list[list[int]]) -> dict[str, Any]:
    """What a user finds who loads a directory: logits of the rows of ids, tokens, and what was said meanwhile."""
    values = json.loads((Path(folder) / "config.json").read_text())
    reward = values["architectures"][0].endswith("ForSequenceClassification")
    encoder, bare = values["model_type"] == "bert", values["architectures"] == ["BertModel"]
    kind = kind_of(values["model_type"], reward, bare)
    wanted: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True} | EAGER
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = kind.from_pretrained(folder, **wanted)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the cat sees a dog"
    chat = [{"role": "user", "content": text}]
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row])) for row in rows]
        logits = [(out.last_hidden_state if bare else out.logits)[0].double().tolist() for out in found]
    return {
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "warnings": [str(w.message) for w in caught],
        "ids": tokenizer(text)["input_ids"],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else "",
        "logits": logits,
        "mask": tokenizer.mask_token,
        "eos": None if reward or encoder else model.generation_config.eos_token_id,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        given = json.loads(sys.stdin.read())
        print(json.dumps({folder: check(folder, given) for folder in sys.argv[2:]}))
    elif sys.argv[1:2] == ["into"]:
        for case in CASES:
            make(case, Path(sys.argv[2]), int(sys.argv[3]))
    else:
        for case in sys.argv[1:] or CASES:
            make(case)
        make_tokenizers()
