"""Tiny adapters of Hugging Face's peft with the logits, or rewards, that it gives them: tests/hub/adapters.

    python tests/hub/make_adapter_fixtures.py [NAME]...        # in an environment with torch, transformers and peft
    python tests/hub/make_adapter_fixtures.py check BASE DIR   # loads an adapter as a user would

Their bases are those of tests/hub/fixtures. A fixture is what `save_pretrained` writes, and expected.safetensors: rows
of ids and their float32 logits. Every number of the adapters is random, B, DoRA's magnitudes and reward heads too.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

BASES = Path(__file__).parent / "fixtures"
FOLDER = Path(__file__).parent / "adapters"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["gate_proj", "o_proj"]}),
    "dora": ("llama", {"r": 2, "lora_alpha": 6, "use_dora": True, "target_modules": ALL}),
    "fused": ("phi3", {"r": 3, "lora_alpha": 5, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "conv": ("gpt2", {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "by-head": (
        "pythia",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["query_key_value", "dense_h_to_4h"],
            "rank_pattern": {"query_key_value": 4},
            "alpha_pattern": {"dense_h_to_4h": 5},
        },
    ),
    "latent": (
        "deepseek-v2",
        {"r": 2, "lora_alpha": 3, "target_modules": ["kv_a_proj_with_mqa", "kv_b_proj", "q_b_proj", "o_proj"]},
    ),
    "reward": ("llama", {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "reward-conv": (
        "gpt2",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["c_attn"]},
    ),
    "experts": (
        "mixtral",
        {"r": 2, "lora_alpha": 3, "target_modules": ["v_proj"], "rank_pattern": {"experts.gate_up_proj": 3}}
        | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "lora_dropout": 0.0},
    ),
    "experts-in-turn": (
        "gpt-oss",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_dropout": 0.0}
        | {"target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "experts-down": (
        "deepseek-v2",
        {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "lora_dropout": 0.0}
        | {"target_parameters": ["experts.down_proj"]},
    ),
    "parameters": (
        "deepseek-v2",
        {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], "lora_dropout": 0.0}
        | {"target_parameters": ["mlp.down_proj.weight", "shared_experts.up_proj.weight", "experts.gate_up_proj"]}
        # Of a parameter by its own name; "shared_experts.up_proj" would find nothing.
        | {"rank_pattern": {"experts.gate_up_proj": 4, "shared_experts.up_proj": 5, "mlp.down_proj.weight": 3}}
        | {"alpha_pattern": {"up_proj.weight": 7, "mlp.down_proj": 9}},
    ),
    "some-layers": (
        "llama",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    ),
    "some-layers-dora": (
        "llama",
        {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}
        | {"layers_to_transform": [1]},
    ),
    # Experts and routers too.
    "all-mixtral": ("mixtral", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "lora_dropout": 0.0}),
    "all-qwen3": ("qwen3-moe", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "lora_dropout": 0.0}),
    "all-deepseek": ("deepseek-v3", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "lora_dropout": 0.0}),
    "router": (
        "gpt-oss",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_dropout": 0.0}
        | {"target_parameters": ["router.weight"]},
    ),
}


def base_of(folder: Path | str, task: str, labels: int = 1) -> Any:
    wanted: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    if task == "SEQ_CLS":
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, **wanted)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **wanted)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[rows, S, V]; of a sequence classifier [rows, labels]. Row by row: it takes more only with a padding token."""
    with torch.no_grad():
        return torch.cat([model(row[None]).logits for row in ids])


def main(*names: str) -> None:
    for name in names or CASES:
        of, config = CASES[name]
        torch.manual_seed([*CASES].index(name))
        config = {"fan_in_fan_out": of == "gpt2", "task_type": "CAUSAL_LM", "lora_dropout": 0.1} | config
        base = base_of(BASES / of, config["task_type"])
        model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_magnitude" in key:
                    value.mul_(1 + 0.3 * torch.rand_like(value))
                elif "lora_" in key:
                    value.copy_(torch.randn_like(value) * 0.2)
                elif "modules_to_save" in key:
                    value.copy_(torch.randn_like(value) * 0.3)
        ids = torch.randint(3, 71, (2, 11))
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        config_file = FOLDER / name / "adapter_config.json"
        config_file.write_text(config_file.read_text().replace(str(BASES / of), of))
        expected = {"ids": ids.to(torch.int32), "logits": logits(model, ids)}
        safetensors.torch.save_file(expected, FOLDER / name / "expected.safetensors")
        with model.disable_adapter():
            print(name, float((expected["logits"] - logits(model, ids)).abs().max()))


def check(base: str, folder: str) -> None:
    """Writes FOLDER/logits.safetensors: of FOLDER/ids.safetensors by peft, to which no key may be unknown."""
    task = peft.PeftConfig.from_pretrained(folder).task_type
    head = safetensors.torch.load_file(f"{folder}/adapter_model.safetensors").get("base_model.model.score.weight")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        model = base_of(base, task, 1 if head is None else len(head))
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    ids = safetensors.torch.load_file(f"{folder}/ids.safetensors")["ids"].long()
    safetensors.torch.save_file({"logits": logits(model, ids)}, f"{folder}/logits.safetensors")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
