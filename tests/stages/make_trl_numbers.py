"""What TRL computes at step 0 on tiny weights: SFT, pair reward, and preferences. jaxlm is held to it by its test.
(Reinforcement learning: `make_trl_rl_numbers.py`, with the weights and helpers of this file.)

    python3 -m venv ../trl-env
    ../trl-env/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0    # torch: its CPU build is enough
    ../trl-env/bin/python tests/stages/make_trl_numbers.py   # 20 s; the last line is JSON: losses, norms
    JAXLM_TRL_PYTHON=../trl-env/bin/python python -m pytest -m slow tests/stages/test_against_trl.py

The test holds numbers that were printed here once; where that variable is set, it runs this file and holds the fresh
ones as well. Losses and gradient norms are those that TRL's own trainers log for one training step of rate 0, not
formulas written down again.

Weights, conversations and pairs are functions of names, below, so that no file has to be shared. Both sides read them
as token ids: tokenizers, chat templates and the stop token that TRL appends are no part of the comparison. These lines
need NumPy alone; TRL is imported where it is run, so that the test can read them in jaxlm's environment.
"""

import importlib.metadata
import json
import os
import tempfile
import zlib
from typing import NamedTuple

import numpy as np

# Qwen3 is jaxlm's transformer with qk_norm. Query heads share keys, heads are not width / heads wide, epsilon and base
# are far from their defaults: 1e-5 in place of 1e-6 would change loss and norm by less than the test's tolerance.
V, L, D, H, K, N, F = 64, 2, 32, 4, 2, 12, 48
EPSILON, ROPE_BASE = 1e-2, 5000.0
OLD_STEP = np.float32(0.1)
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
BETA, CENTRING = 0.1, 0.05
UNDESIRABLE, ODDS_WEIGHT, SIMPO_BETA, SIMPO_MARGIN = 1.25, 0.5, 2.0, 0.75


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 from [0, 1). NumPy keeps RandomState's bits over its versions, not default_rng's."""
    return np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)


def weight(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, by jaxlm's name for it (layers/0/attention/query), matrices as [in, out], of variance 1 / in.

    `model` makes another set of weights; norms scale by .75 to 1.25, so that they are not their initial ones. "old m"
    lies a tenth of the way from m to another set: what drew the answers before some updates, for ratios around 1.
    """
    if model.startswith("old "):
        newer = weight(model.removeprefix("old "), name, shape)
        return newer + OLD_STEP * (weight("elsewhere", name, shape) - newer)
    values = 2 * draw(f"{model}/{name}", shape) - 1
    if name.endswith("scale"):
        return (1 + values / 4).astype(np.float32)
    return (values * (3 / (1 if name == "embedding" else shape[0])) ** 0.5).astype(np.float32)


def tokens(name: str, count: int) -> list[int]:
    """Neither padding nor BOS nor EOS: TRL's reward is read at the last token that is not the padding's."""
    return (FIRST + draw(name, (count,)) * (V - FIRST)).astype(int).tolist()


class Chat(NamedTuple):
    ids: list[int]
    targets: list[int]
    """1 at what the assistant writes, its EOS included"""


def chat(number: int, turns: list[int]) -> Chat:
    """BOS, then turns of so many tokens, the user's and the assistant's in turn; the assistant's end with EOS."""
    ids, targets = [BOS], [0]
    for turn, count in enumerate(turns):
        assistant = turn % 2
        ids += tokens(f"chat {number}/{turn}", count) + [EOS] * assistant
        targets += [assistant] * (count + assistant)
    return Chat(ids, targets)


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float


def pair(number: int, prompt: int, chosen: int, rejected: int, margin: float) -> Pair:
    """A prompt and two answers of so many tokens, BOS and EOS not counted."""
    better, worse = (
        [*tokens(f"pair {number}/{name}", n), EOS] for name, n in (("better", chosen), ("worse", rejected))
    )
    return Pair([BOS, *tokens(f"pair {number}/prompt", prompt)], better, worse, margin)


# Of unequal lengths: a mean of means, over chats or over batches, would differ from the mean over targets.
CHATS = [chat(n, turns) for n, turns in enumerate([[4, 3], [2, 9], [5, 1, 3, 6], [7, 2], [1, 4, 2, 2, 3, 5]])]
PAIRS = [pair(0, 4, 6, 3, 0.5), pair(1, 7, 2, 9, 0.0), pair(2, 3, 5, 5, 1.25), pair(3, 5, 1, 4, -0.25)]
# TRL's ORPO takes the chosen answers' cross-entropy over the prompt too, and over all tokens of a batch alike; jaxlm
# over the answers, each by its mean. With nothing but BOS in front and one length these are the same.
EVEN_PAIRS = [pair(10 + n, 0, 5, rejected, 0.0) for n, rejected in enumerate([3, 7, 5, 2])]

OURS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "score": "score",
    "norm": "final_norm/scale",
    "input_layernorm": "attention_norm/scale",
    "post_attention_layernorm": "mlp_norm/scale",
    "q_proj": "attention/query",
    "k_proj": "attention/key",
    "v_proj": "attention/value",
    "o_proj": "attention/output",
    "q_norm": "attention/query_norm/scale",
    "k_norm": "attention/key_norm/scale",
    "gate_proj": "mlp/gate",
    "up_proj": "mlp/up",
    "down_proj": "mlp/down",
}


def our_name(theirs: str) -> str:
    """
    >>> our_name("model.layers.0.self_attn.q_proj.weight")
    'layers/0/attention/query'
    """
    parts = theirs.split(".")
    layer = "/".join(parts[1:3]) + "/" if "layers" in parts else ""
    return layer + OURS[parts[-2]]


def filled(kind, model: str):
    """A transformers model of class `kind` with the weights of `model`."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=N,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        num_labels=1,
        attn_implementation="eager",
        dtype="float32",
    )
    made = kind(config)
    with torch.no_grad():
        for theirs, parameter in made.named_parameters():
            name = our_name(theirs)
            # torch's linear layers hold [out, in]; the embedding is a table and lies alike on both sides.
            turned = parameter.ndim == 2 and name != "embedding"
            shape = tuple(parameter.shape)
            value = weight(model, name, shape[::-1] if turned else shape)
            parameter.copy_(torch.from_numpy(value.T.copy() if turned else value))
    return made


def tokenizer():
    """Words are written numbers: DPOTrainer takes text only."""
    import tokenizers
    import transformers

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {str(id): id for id in range(FIRST, V)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(ids: list[int]) -> str:
    return " ".join({BOS: "<s>", EOS: "</s>"}.get(id, str(id)) for id in ids)


def arguments(kind, folder: str, batch: int, **more):
    """One step in float32 at rate 0, on batches of `batch`, logged."""
    return kind(
        output_dir=folder,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=batch,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


LOGGED = {
    "loss": "loss",
    "gradient_norm": "grad_norm",
    "mean chosen": "logps/chosen",
    "mean rejected": "logps/rejected",
    "kl": "kl",
}


def stepped(trainer, names: dict[str, str] = LOGGED) -> dict[str, float]:
    """What the trainer logs, by our names for it; the gradient's norm is that before clipping."""
    trainer.train()
    logged = trainer.state.log_history[0]
    return {ours: logged[theirs] for ours, theirs in names.items() if theirs in logged}


def sft(folder: str, accumulate: int) -> dict[str, float]:
    import datasets
    import transformers
    import trl

    rows = [{"input_ids": one.ids, "assistant_masks": one.targets} for one in CHATS]
    batch = len(CHATS) // accumulate
    trainer = trl.SFTTrainer(
        filled(transformers.Qwen3ForCausalLM, "policy"),
        arguments(trl.SFTConfig, folder, batch, gradient_accumulation_steps=accumulate),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return stepped(trainer)


def reward(folder: str, margins: bool, centring: float | None) -> dict[str, float]:
    import datasets
    import transformers
    import trl

    rows = [{"chosen_ids": one.prompt + one.chosen, "rejected_ids": one.prompt + one.rejected} for one in PAIRS]
    if margins:
        rows = [row | {"margin": one.margin} for row, one in zip(rows, PAIRS, strict=True)]
    trainer = trl.RewardTrainer(
        filled(transformers.Qwen3ForSequenceClassification, "policy"),
        arguments(trl.RewardConfig, folder, len(PAIRS), center_rewards_coefficient=centring),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    return stepped(trainer)


def texts(pairs: list[Pair]) -> list[dict[str, str]]:
    return [
        {"prompt": text(one.prompt), "chosen": f" {text(one.chosen)}", "rejected": f" {text(one.rejected)}"}
        for one in pairs
    ]


def dpo(folder: str, loss: str = "sigmoid") -> dict[str, float | list[float]]:
    import datasets
    import transformers
    import trl

    trainer = trl.DPOTrainer(
        filled(transformers.Qwen3ForCausalLM, "policy"),
        ref_model=filled(transformers.Qwen3ForCausalLM, "reference"),
        args=arguments(trl.DPOConfig, folder, len(PAIRS), beta=BETA, loss_type=[loss]),
        train_dataset=datasets.Dataset.from_list(texts(PAIRS)),
        processing_class=tokenizer(),
    )
    for row, one in zip(trainer.train_dataset, PAIRS, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == [one.prompt, one.chosen, one.rejected]
    if loss != "sigmoid":
        return stepped(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = {}
    for model, module in (("policy", trainer.model), ("reference", trainer.ref_model)):
        chosen, rejected = trainer.compute_ref_log_probs(module, batch)
        found |= {f"{model} chosen": chosen.tolist(), f"{model} rejected": rejected.tolist()}
    return stepped(trainer) | found


def kto(folder: str, policy: str, reference: str) -> dict[str, float]:
    """All chosen answers, then all rejected ones: each prompt's mismatched answers are those of the pair before it.

    Of two sets of weights in both roles: the estimated KL is below 0 in one of them, which counts as 0.
    """
    import datasets
    import transformers
    import trl

    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for row in texts(PAIRS)
    ]
    more = dict(beta=BETA, undesirable_weight=UNDESIRABLE)
    trainer = trl.KTOTrainer(
        filled(transformers.Qwen3ForCausalLM, policy),
        ref_model=filled(transformers.Qwen3ForCausalLM, reference),
        args=arguments(trl.KTOConfig, folder, len(rows), **more),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    answers = [one.chosen for one in PAIRS] + [one.rejected for one in PAIRS]
    for number, row in enumerate(trainer.train_dataset):
        wanted = [PAIRS[number % len(PAIRS)].prompt, answers[number], answers[number - 1]]
        assert [row["prompt_ids"], row["completion_ids"], row["KL_completion_ids"]] == wanted
    return stepped(trainer)


def without_reference(trainer, config, folder: str, pairs: list[Pair], **more) -> dict[str, float]:
    import datasets
    import transformers

    made = trainer(
        filled(transformers.Qwen3ForCausalLM, "policy"),
        args=arguments(config, folder, len(pairs), **more),
        train_dataset=datasets.Dataset.from_list(texts(pairs)),
        processing_class=tokenizer(),
    )
    for row, one in zip(made.train_dataset, pairs, strict=True):
        assert row["chosen_input_ids"] == one.prompt + one.chosen
        assert row["rejected_input_ids"] == one.prompt + one.rejected
    return stepped(made)


def orpo(folder: str) -> dict[str, float]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return without_reference(ORPOTrainer, ORPOConfig, folder, EVEN_PAIRS, beta=ODDS_WEIGHT)


def simpo(folder: str) -> dict[str, float]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    more = dict(loss_type="simpo", cpo_alpha=0.0, beta=SIMPO_BETA, simpo_gamma=SIMPO_MARGIN)
    return without_reference(CPOTrainer, CPOConfig, folder, PAIRS, **more)


def quiet() -> None:
    """To be called before TRL is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is read from there
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO, SimPO, PPO and online DPO live there


def show(results: dict) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch", "numpy")}
    print(json.dumps({"versions": versions} | results))


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "sft": sft(folder, 1),
            "sft accumulated": sft(folder, len(CHATS)),
            "reward": reward(folder, False, None),
            "reward margin": reward(folder, True, None),
            "reward centring": reward(folder, False, CENTRING),
            "dpo": dpo(folder),
            "ipo": dpo(folder, "ipo"),
            "dpo normalised": dpo(folder, "sigmoid_norm"),
            "kto": kto(folder, "policy", "reference"),
            "kto turned": kto(folder, "reference", "policy"),
            "orpo": orpo(folder),
            "simpo": simpo(folder),
        }
    show(results)


if __name__ == "__main__":
    main()
