"""Without reinforcement learning: the best of 16 answers by the reward model, and an assistant that learns from them.

    python -m jaxlm run --config=configs/best_of_n.py --workdir=/mnt/runs/best \\
        --config.stages.sample.model=/mnt/runs/assistant --config.stages.sample.prompts_file=/mnt/prompts/train.jsonl \\
        --config.stages.select.reward_model=/mnt/runs/reward --config.stages.sft.model=/mnt/runs/assistant

Rejection sampling on tasks that a program can check, in place of the reward model:
    SelectConfig(samples="@sample", keep="above", threshold=1.0, verifiers=(VerifierConfig(kind="number"),))

Hardware: TPU v5e-16 (mesh: all chips in fsdp); not yet run on one. Time: of drawing, an answer's 512 tokens one by one,
512 answers at a time. Result: select/report.json, the mean reward of the best of 1, 2, 4, 8 and 16 beside
log n - (n - 1) / n nats, which PPO at that KL is to be measured against; and sft/model.
"""

from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.rl.config import SelectConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import RunConfig, SFTConfig
from jaxlm.train.config import OptimizerConfig, ScheduleConfig


def get_config() -> RunConfig:
    mesh = MeshConfig(data=1, fsdp=-1)
    return RunConfig(
        stages=(
            SampleConfig(
                model="/mnt/runs/assistant",
                prompts_file="/mnt/prompts/train.jsonl",
                chat=True,
                sampling=SamplingConfig(max_tokens=512, samples=16, batch_rows=512),
                mesh=mesh,
            ),
            SelectConfig(samples="@sample", reward_model="/mnt/runs/reward", mesh=mesh),
            SFTConfig(
                model="/mnt/runs/assistant",
                sources=(ChatSource(name="best", path="@select/chats.jsonl"),),
                row_length=2048,
                batch_rows=64,
                epochs=1.0,
                loss_chunk_tokens=8192,
                optimizer=OptimizerConfig(weight_decay=0.0),
                schedule=ScheduleConfig(kind="linear", peak=1e-5, warmup_steps=20, final_share=0.0),
                mesh=mesh,
            ),
        )
    )
