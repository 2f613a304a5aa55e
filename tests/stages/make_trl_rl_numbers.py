"""What TRL's reinforcement learning computes at step 0 on tiny weights: GRPO and its kin, RLOO, PPO and online DPO.

    ../trl-env/bin/python tests/stages/make_trl_rl_numbers.py | tail -n 1 > tests/stages/fixtures/trl_rl.json  # 35 s
    JAXLM_TRL_PYTHON=../trl-env/bin/python python -m pytest -m slow tests/stages/test_rl_against_trl.py

Weights, helpers and environment are those of `make_trl_numbers.py`; it needs `requests` besides, which TRL does not
declare.
Each case is one training step of rate 0 by TRL's own trainer, from rewards to advantages to the gradient: only the
drawing of answers is replaced, by given ones. They are drawn, as TRL sees it, by "old policy", and learned from by
"policy", so that ratios are not 1 and some are clipped.
"""

import contextlib
import os
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from make_trl_numbers import BOS, EOS, LOGGED, PAD, D, arguments, filled, quiet, show, stepped, text, tokenizer, tokens

# Most tokens of an answer, answers to a prompt.
T, K = 8, 4
KL, CLIP, CLIP_HIGH = 0.04, 0.1, 0.3
# A whole answer's ratio strays far less than a token's.
GSPO_CLIP, GSPO_CLIP_HIGH = 0.02, 0.04
TEMPERATURE = 0.7
PPO_KL, GAMMA, LAMBDA, VALUE_CLIP = 0.05, 0.98, 0.9, 0.05
BETA = 0.1
OVERLONG = 5


class Asked(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]
    rewards: list[float]


def asked(name: str, prompt: int, lengths: list[int], rewards: list[float]) -> Asked:
    """A prompt of so many tokens after BOS, and answers of so many: ended by EOS, or cut off where they have T."""
    answers = [tokens(f"{name}/{n}", length) for n, length in enumerate(lengths)]
    answers = [ids if len(ids) == T else [*ids[:-1], EOS] for ids in answers]
    return Asked([BOS, *tokens(f"{name}/prompt", prompt)], answers, rewards)


# The last prompt's answers teach nothing but their KL.
GROUPS = [
    asked("group 0", 3, [5, 2, 8, 3], [0.5, -0.25, 1.0, 0.125]),
    asked("group 1", 6, [1, 7, 4, 8], [1.0, 0.0, 0.0, 1.0]),
    asked("group 2", 4, [6, 3, 2, 5], [0.5, 0.5, 0.5, 0.5]),
]
# TRL's RLOO has one ratio an answer, the product over its tokens; jaxlm one a token. Of one token these are the same.
SHORT_GROUPS = [one._replace(answers=[ids[:1] for ids in one.answers]) for one in GROUPS]
# One answer a prompt, for PPO, whose score is the reward model's. EVEN ones fill the width of TRL's arrays.
RAGGED = [asked(f"single {n}", 2 + n % 3, [length], []) for n, length in enumerate([4, 8, 2, 6, 8, 1, 5, 3])]
EVEN = [asked(f"even {n}", 2 + n % 3, [T], []) for n in range(8)]
# Untied: TRL takes the first of equal ones as the better one, jaxlm leaves such a pair out.
PAIRED = [asked(f"paired {n}", 2 + n, [3 + n, 7 - n], [0.25 * n, 0.5]) for n in range(4) if n != 2]

# GRPO's own KL. TRL's default weighs each token's by its ratio: our kl_ratio.
PLAIN = dict(beta=KL, use_bias_correction_kl=False)
# As TRL's arguments. "old": the answers were drawn by older weights; else by those that learn.
GRPO: dict[str, dict[str, Any]] = {
    "grpo on-policy": dict(loss_type="grpo", **PLAIN),
    "grpo": dict(loss_type="grpo", **PLAIN, old=True),
    "grpo weighted kl": dict(loss_type="grpo", beta=KL, old=True),
    "dapo": dict(loss_type="dapo", epsilon=CLIP, epsilon_high=CLIP_HIGH, old=True),
    "dapo accumulated": dict(loss_type="dapo", **PLAIN, accumulate=2, old=True),
    "bnpo": dict(loss_type="bnpo", **PLAIN, old=True),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none", **PLAIN, old=True),
    "batch": dict(loss_type="grpo", scale_rewards="batch", old=True),
    "gspo": dict(
        loss_type="grpo", importance_sampling_level="sequence", epsilon=GSPO_CLIP, epsilon_high=GSPO_CLIP_HIGH, old=True
    ),
    "gspo kl": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=GSPO_CLIP, **PLAIN, old=True),
    "temperature": dict(loss_type="grpo", **PLAIN, temperature=TEMPERATURE, old=True),
    "grpo cut off": dict(loss_type="grpo", **PLAIN, mask_truncated_completions=True, old=True),
    "dapo cut off": dict(loss_type="dapo", **PLAIN, mask_truncated_completions=True, old=True),
}
RLOO: dict[str, dict[str, Any]] = {
    "rloo": dict(beta=0.0),
    "rloo kl": dict(beta=KL, old=True),
    "rloo short": dict(groups=SHORT_GROUPS, beta=0.0, old=True),
}


def reference_folder(folder: str) -> str:
    """TRL reads the reference from where the policy's config says that it came from."""
    import transformers

    path = os.path.join(folder, "reference")
    if not os.path.isdir(path):
        filled(transformers.Qwen3ForCausalLM, "reference").save_pretrained(path)
    return path


def given(kind: type, groups: list[Asked], old: bool) -> type:
    """The trainer `kind`, whose answers are given ones, drawn and scored under the weights of "old policy" if `old`."""
    import transformers
    import trl

    class Given(kind):
        def _generate_single_turn(self, prompt_ids, *rest):
            assert prompt_ids == [one.prompt for one in groups for _ in one.answers]
            answers = [ids for one in groups for ids in one.answers]
            return answers if kind is trl.RLOOTrainer else (answers, None)

        def _generate_and_score_completions(self, inputs):
            if not old:
                made = super()._generate_and_score_completions(inputs)
            else:
                newer = {name: x.clone() for name, x in self.model.state_dict().items()}
                self.model.load_state_dict(filled(transformers.Qwen3ForCausalLM, "old policy").state_dict())
                made = super()._generate_and_score_completions(inputs)
                self.model.load_state_dict(newer)
            self.found = made["advantages"].tolist()
            return made

    return Given


def grouped(folder: str, trainer: type, config: type, groups: list[Asked], old: bool = False, **more) -> dict[str, Any]:
    """A step of GRPO or RLOO on all groups."""
    import datasets
    import transformers

    answers = sum(len(one.answers) for one in groups)
    accumulate = more.pop("accumulate", 1)
    policy = filled(transformers.Qwen3ForCausalLM, "policy")
    policy.config._name_or_path = reference_folder(folder)
    made = given(trainer, groups, old)(
        policy,
        reward_funcs=lambda completion_ids, **_: [reward for one in groups for reward in one.rewards],
        args=arguments(
            config,
            folder,
            answers // accumulate,
            gradient_accumulation_steps=accumulate,
            num_generations=K,
            max_completion_length=T,
            shuffle_dataset=False,
            # Answers are gone through twice, the last of which is not waited for: TRL scores them when they are drawn.
            num_iterations=1 + old,
            **more,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": text(one.prompt)} for one in groups]),
        processing_class=tokenizer(),
    )
    names = LOGGED | {"entropy": "entropy", "clipped": "clip_ratio/region_mean"}
    return stepped(made, names) | {"advantages": made.found}


def critic(name: str):
    """A value or reward model with a bias, which jaxlm's have: it is 0, and has a gradient."""
    import torch
    import transformers

    model = filled(transformers.Qwen3ForSequenceClassification, name)
    score = torch.nn.Linear(D, 1)
    with torch.no_grad():
        score.weight.copy_(model.score.weight)
        score.bias.zero_()
    model.score = score
    return model


def padded(rows: list[list[int]], width: int, *, left: bool = False):
    import torch

    return torch.tensor(
        [[PAD] * (width - len(ids)) * left + ids + [PAD] * (width - len(ids)) * (not left) for ids in rows]
    )


@contextlib.contextmanager
def replaced(module, value, asked: list[Asked], found: dict[str, Any]):
    """PPO draws given answers with "old policy", and its rollout's values are those of "old value"."""
    import transformers

    older = filled(transformers.Qwen3ForCausalLM, "old policy").eval(), critic("old value").eval()
    get_reward, whiten = module.get_reward, module.masked_whiten
    order = []

    def draw(policy, queries, size, pad, generation):
        import torch

        rows = [[id for id in ids if id != PAD] for ids in queries.tolist()]
        order[:] = [next(n for n, one in enumerate(asked) if one.prompt == ids) for ids in rows]
        both = torch.cat([queries, padded([asked[n].answers[0] for n in order], T)], 1)
        logits = module.forward(older[0], both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / generation.temperature

    def rewarded(model, *rest):
        return get_reward(older[1] if model is value else model, *rest)

    def recorded(values, mask, shift_mean=True):
        white = whiten(values, mask, shift_mean)
        back = np.argsort(order)
        found["gae"] = (values * mask)[back].tolist()
        found["advantages"] = (white * mask)[back].tolist()
        return white

    with mock.patch.multiple(module, batch_generation=draw, get_reward=rewarded, masked_whiten=recorded):
        yield


def ppo(folder: str, asked: list[Asked]) -> dict[str, Any]:
    import datasets
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    reading = tokenizer()
    reading.padding_side = "left"
    rows = datasets.Dataset.from_list([{"input_ids": one.prompt} for one in asked])
    policy, value = filled(transformers.Qwen3ForCausalLM, "policy"), critic("value")
    trainer = PPOTrainer(
        args=arguments(
            PPOConfig,
            folder,
            len(asked),
            total_episodes=len(asked),
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
            local_rollout_forward_batch_size=len(asked),
            response_length=T,
            stop_token="eos",
            temperature=TEMPERATURE,
            kl_coef=PPO_KL,
            gamma=GAMMA,
            lam=LAMBDA,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            vf_coef=1.0,
        ),
        processing_class=reading,
        model=policy,
        ref_model=filled(transformers.Qwen3ForCausalLM, "reference"),
        reward_model=critic("reward"),
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
    )
    found: dict[str, Any] = {}

    def norms(*_):
        for name, model in (("gradient_norm", policy), ("value gradient_norm", value)):
            found[name] = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None) ** 0.5

    trainer.optimizer.optimizer.register_step_pre_hook(norms)
    with replaced(ppo_trainer, value, asked, found):
        names = {
            "loss": "loss/policy_avg",
            "value loss": "loss/value_avg",
            "clipped": "policy/clipfrac_avg",
            "value clipped": "val/clipfrac_avg",
            "kl": "objective/kl",
            "score": "objective/scores",
        }
        return stepped(trainer, names) | found


def online_dpo(folder: str) -> dict[str, Any]:
    import datasets
    import transformers
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Given(OnlineDPOTrainer):
        def _generate(self, model, prompts, images=None):
            # All first answers, then all second ones. The loader has shuffled the prompts.
            one = [next(one for one in PAIRED if text(one.prompt) == prompt) for prompt in prompts]
            prompt_ids = padded(2 * [x.prompt for x in one], max(len(x.prompt) for x in one), left=True)
            answers = padded([x.answers[n] for n in range(2) for x in one], T)
            self.rewards = [x.rewards[n] for n in range(2) for x in one]
            return prompt_ids, (prompt_ids != PAD).int(), answers, (answers != PAD).int()

        def training_step(self, *inputs):
            self.loss = super().training_step(*inputs)
            return self.loss

    trainer = Given(
        filled(transformers.Qwen3ForCausalLM, "policy"),
        ref_model=filled(transformers.Qwen3ForCausalLM, "reference"),
        reward_funcs=lambda **_: trainer.rewards,
        args=arguments(OnlineDPOConfig, folder, len(PAIRED), beta=BETA),
        train_dataset=datasets.Dataset.from_list([{"prompt": text(one.prompt)} for one in PAIRED]),
        processing_class=tokenizer(),
    )
    logged = stepped(trainer, LOGGED | {"margin": "rewards/margins"})
    return logged | {"loss": float(trainer.loss)}  # logged with four decimals only


def functions() -> dict[str, Any]:
    """Of given numbers alone."""
    import torch
    from trl.experimental.ppo.ppo_trainer import masked_whiten
    from trl.rewards import get_soft_overlong_punishment

    values, mask = (torch.from_numpy(x) for x in to_whiten())
    return {
        "whitened": (masked_whiten(values, mask) * mask).tolist(),
        "whitened about its mean": (masked_whiten(values, mask, shift_mean=False) * mask).tolist(),
        "overlong": get_soft_overlong_punishment(T, OVERLONG)([ids for one in GROUPS for ids in one.answers]),
    }


def to_whiten() -> tuple[np.ndarray, np.ndarray]:
    """(float32 [4, 8], bool [4, 8])"""
    from make_trl_numbers import draw

    return (3 + draw("whiten", (4, T))).astype(np.float32), np.arange(T)[None] < np.array([[3], [8], [1], [5]])


def main() -> None:
    quiet()
    import trl

    with tempfile.TemporaryDirectory() as folder:
        step = lambda kind, config, more: grouped(folder, kind, config, **dict(groups=GROUPS) | more)
        results = {name: step(trl.GRPOTrainer, trl.GRPOConfig, more) for name, more in GRPO.items()}
        results |= {name: step(trl.RLOOTrainer, trl.RLOOConfig, more) for name, more in RLOO.items()}
        results |= {"ppo": ppo(folder, EVEN), "ppo ragged": ppo(folder, RAGGED)}
        results |= {"online dpo": online_dpo(folder), "functions": functions()}
    show(results)


if __name__ == "__main__":
    main()
