"""A base model of about a billion parameters becomes an assistant, on your chats.

    python -m jaxlm sft --config=configs/sft.py --workdir=/mnt/runs/assistant \\
        --config.model=/mnt/runs/base --config.sources.train.path='/mnt/chats/train/*.jsonl' \\
        --config.sources.heldout.path='/mnt/chats/heldout.jsonl'

Hardware: TPU v5e-16 (mesh: all chips in fsdp); not yet run on one. Time, computed at 40 % of its peak: 10 minutes for
100 million tokens, such as two epochs of 100,000 chats of 500. Expected: eval/bits_per_byte, of the answers, falls;
where it rises in the second epoch, one is enough. Result: /mnt/runs/assistant/model, which reward, rl and chat take.
"""

from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.stages.config import SFTConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


def get_config() -> SFTConfig:
    return SFTConfig(
        model="/mnt/runs/base",
        sources=(
            ChatSource(name="train", path="/mnt/chats/train.jsonl"),
            ChatSource(name="heldout", path="/mnt/chats/heldout.jsonl", split="heldout"),
        ),
        row_length=2048,
        batch_rows=64,
        epochs=2.0,
        loss_chunk_tokens=8192,
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", peak=2e-5, warmup_steps=20, final_share=0.0),
        mesh=MeshConfig(data=1, fsdp=-1),
        loop=LoopConfig(evaluate_every_steps=100, checkpoint=CheckpointConfig(every_steps=200)),
    )
