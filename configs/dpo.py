"""A policy by direct preference optimisation on your own rankings, from your own assistant.

    python -m jaxlm preference --config=configs/dpo.py --workdir=runs/dpo \\
        --config.model=runs/assistant --config.sources.train.path='rankings/train*.jsonl' \\
        --config.sources.heldout.path='rankings/heldout*.jsonl'

Records: {"prompt", "chosen", "rejected"}, or rankings of 2 to 9 answers in tiers (README, "Your own chats"). The model:
a run's folder or a model directory whose chat template the answers were given under.
Hardware: any that sft fits on; a step takes about as long as one of sft with as many tokens, and the reference one
forward pass over all answers before the first step.
Result: not measured on people's rankings yet. Look for eval/pair_accuracy above .5 and rising, eval/margin above 0, and
eval/chosen_logprob that does not fall far: where it does, lower schedule.peak or raise dpo.beta. Where answers only
grow longer, set dpo.length_normalised, and with it a larger beta, 2 to 10: log-ratios are then means over an answer's
tokens and no longer sums, and under beta=0.1 the policy would go far from its reference (arXiv:2411.15124).
The other methods: dpo=DPOConfig(loss="ipo"), or in its place kto=KTOConfig(), orpo=ORPOConfig(), simpo=SimPOConfig().
"""

from jaxlm.preference.config import DPOConfig, PreferenceConfig
from jaxlm.reward.config import RankingSource
from jaxlm.train.config import CheckpointConfig, LoopConfig, ScheduleConfig


def get_config() -> PreferenceConfig:
    return PreferenceConfig(
        model="runs/assistant",
        sources=(
            RankingSource(name="train", path="rankings/train*.jsonl"),
            RankingSource(name="heldout", path="rankings/heldout*.jsonl", split="heldout"),
        ),
        dpo=DPOConfig(beta=0.1),
        batch_rows=32,
        batch_pairs=512,
        epochs=1,
        schedule=ScheduleConfig(kind="linear", peak=1e-6, warmup_steps=20, final_share=0.0),
        loop=LoopConfig(evaluate_every_steps=50, checkpoint=CheckpointConfig(every_steps=100)),
    )
