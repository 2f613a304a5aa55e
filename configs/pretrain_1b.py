"""1.1 billion parameters from scratch on your packed rows.

    python -m jaxlm pretrain --config=configs/pretrain_1b.py --workdir=/mnt/runs/base --config.data.0.path=/mnt/rows

Hardware: TPU v5e-16 (4x4) or v5p-16 (2x2x2). It has not been trained on either; its step is compiled for both, without
a TPU, by tests/plan/test_tpu_compile.py: 7.6 of 16 GiB a chip on the first, 14.1 of 95 on the second.
Rows: 2048 tokens with a tokenizer of at most 32,768; a batch is half a million tokens, 50,000 steps are 26 B tokens, 23
a parameter, and 1.8e20 FLOPs. Time, computed at 40 % of the chips' peak: 40 hours on v5e-16, 34 on v5p-16. Result: none
yet.
"""

from jaxlm.base.config import MeshConfig
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


def get_config() -> PretrainConfig:
    return PretrainConfig(
        data=(MixtureSource(path="rows"),),
        model=ModelConfig(
            vocab_size=32768,
            layers=16,
            width=2048,
            heads=16,
            kv_heads=8,
            feed_forward=8192,
            qk_norm=True,
            remat="full",
        ),
        row_length=2048,
        batch_rows=256,
        accumulate=2,
        steps=50_000,
        loss_chunk_tokens=8192,
        z_loss=1e-4,
        optimizer=OptimizerConfig(kind="adamw", weight_decay=0.1),
        schedule=ScheduleConfig(kind="wsd", peak=6e-4, warmup_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
        loop=LoopConfig(evaluate_every_steps=500, checkpoint=CheckpointConfig(every_steps=500)),
    )
