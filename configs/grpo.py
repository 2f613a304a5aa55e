"""GRPO on tasks that a program can check: {"prompt": "…", "target": "42"}, the answer's number after ####.

    python -m jaxlm rl --config=configs/grpo.py --workdir=/mnt/runs/solver \\
        --config.model=/mnt/runs/assistant --config.sources.train.path=/mnt/tasks/train.jsonl \\
        --config.sources.heldout.path=/mnt/tasks/heldout.jsonl

Its kin, by fields: Dr. GRPO        --config.grpo.baseline=mean --config.grpo.normalization=constant
                    GSPO            --config.grpo.ratio=sequence --config.grpo.clip=3e-4 --config.grpo.clip_high=4e-4
                    DAPO            --config.grpo.clip_high=0.28 --config.grpo.normalization=token
                                    --config.grpo.extra_prompts=64 --config.overlong_tokens=128
                    KL by the ratio --config.grpo.kl_ratio=true
REINFORCE++ is another part: reinforce=ReinforceConfig() in place of grpo.

Hardware: TPU v5e-16 (mesh: all chips in fsdp); not yet run on one. Time: mostly of drawing, 1024 answers of up to 1024
tokens an iteration (rl/rollout_seconds). Expected: eval/reward, the share of held-out tasks that are solved, rises;
where rl/equal_groups is near 1, the tasks are too hard or too easy for this model to learn from.
"""

from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl.config import GRPOConfig, RLConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig, WatchdogConfig


def get_config() -> RLConfig:
    return RLConfig(
        model="/mnt/runs/assistant",
        verifiers=(VerifierConfig(kind="number", marker="####"),),
        sources=(
            ChatSource(name="train", path="/mnt/tasks/train.jsonl"),
            ChatSource(name="heldout", path="/mnt/tasks/heldout.jsonl", split="heldout"),
        ),
        grpo=GRPOConfig(kl_coefficient=0.01),
        prompts=64,
        samples=16,
        max_prompt_tokens=512,
        max_tokens=1024,
        minibatch_answers=256,
        steps=300,
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
