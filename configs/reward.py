"""A reward model from people's rankings of the assistant's answers.

    python -m jaxlm reward --config=configs/reward.py --workdir=/mnt/runs/reward \\
        --config.model=/mnt/runs/assistant --config.sources.train.path='/mnt/rankings/train/*.jsonl' \\
        --config.sources.heldout.path='/mnt/rankings/heldout.jsonl'

Hardware: TPU v5e-16 (mesh: all chips in fsdp); not yet run on one. Time, computed at 40 % of its peak for a model of
1.1 billion parameters: 10 minutes for 50,000 prompts of four answers of 500 tokens. Result: /mnt/runs/reward/model and
the report beside it. No more is to be expected of eval/pair_accuracy than people agree among themselves: in
arXiv:2203.02155 on 73 % of pairs, and the reward model with people it had not seen on 70 %.
"""

from jaxlm.base.config import MeshConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


def get_config() -> RewardConfig:
    return RewardConfig(
        model="/mnt/runs/assistant",
        sources=(
            RankingSource(name="train", path="/mnt/rankings/train.jsonl"),
            RankingSource(name="heldout", path="/mnt/rankings/heldout.jsonl", split="heldout"),
        ),
        criteria=("overall",),
        centring=0.01,
        row_length=2048,
        batch_rows=64,
        batch_pairs=512,
        epochs=1,
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", peak=1e-5, warmup_steps=20, final_share=0.0),
        mesh=MeshConfig(data=1, fsdp=-1),
        loop=LoopConfig(evaluate_every_steps=100, checkpoint=CheckpointConfig(every_steps=200)),
    )
