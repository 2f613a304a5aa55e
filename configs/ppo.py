"""PPO: the assistant is rewarded by the reward model, and pays for leaving where it began.

    python -m jaxlm rl --config=configs/ppo.py --workdir=/mnt/runs/policy \\
        --config.model=/mnt/runs/assistant --config.reward_model=/mnt/runs/reward \\
        --config.sources.train.path=/mnt/prompts/train.jsonl --config.sources.heldout.path=/mnt/prompts/heldout.jsonl

Hardware: TPU v5e-16 (mesh: all chips in fsdp); not yet run on one. Of two models of 1.1 billion parameters that learn
and two that stay, 2 GiB lie on each chip, and as much of a rollout's cache. Time: mostly of drawing, 512 answers of up
to 512 tokens an iteration (rl/rollout_seconds). Expected: eval/reward rises from about 0; reward_kl.png says at what
KL. Before believing it, look at completions.jsonl and at a `gold` score, and compare with the best of n answers at the
same KL (configs/best_of_n.py).
"""

from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.rl.config import KLConfig, PPOConfig, RLConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig, WatchdogConfig


def get_config() -> RLConfig:
    return RLConfig(
        model="/mnt/runs/assistant",
        reward_model="/mnt/runs/reward",
        sources=(
            ChatSource(name="train", path="/mnt/prompts/train.jsonl"),
            ChatSource(name="heldout", path="/mnt/prompts/heldout.jsonl", split="heldout"),
        ),
        ppo=PPOConfig(kl=KLConfig(coefficient=0.05), value_rate=5.0),
        prompts=512,
        samples=1,
        max_prompt_tokens=512,
        max_tokens=512,
        missing_eos="replace",
        missing_eos_amount=-3.0,
        minibatch_answers=128,
        steps=300,
        kl_budget=30.0,
        heldout_prompts=512,
        loss_chunk_tokens=8192,
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", peak=1e-6, warmup_steps=20),
        mesh=MeshConfig(data=1, fsdp=-1),
        loop=LoopConfig(
            log_every_steps=1,
            evaluate_every_steps=25,
            checkpoint=CheckpointConfig(every_steps=25),
            watchdog=WatchdogConfig(step_seconds=3600.0),
        ),
    )
