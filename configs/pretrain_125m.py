"""A model of 125 million parameters from scratch on your packed rows.

    python -m jaxlm pretrain --config=configs/pretrain_125m.py --workdir=runs/base --config.data.0.path=runs/rows

Hardware: TPU v5e-8 (2x4), for which its step is compiled, without a TPU: 10.7 of a chip's 16 GiB, and the only traffic
between chips is the sum of gradients. With accumulate=2 it does not fit. Any number of GPUs too, with more accumulate
where they are few: an out-of-memory error says what would fit. It has been trained on neither.
Rows: 1024 tokens with a tokenizer of at most 32,768; a batch is a quarter of a million tokens, 20,000 steps are 5.2 B
tokens, 42 a parameter, and 4.2e18 FLOPs. Time, computed at 40 % of the chips' peak: 1.9 hours. Result: none of ours; of
GPT-2's 124 M shape, llm.c's log says 3.28 nats a token on FineWeb after 10 B tokens (github.com/karpathy/llm.c,
discussion 481).
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
            vocab_size=32768, layers=12, width=768, heads=12, feed_forward=2560, qk_norm=True, tied_embeddings=True
        ),
        row_length=1024,
        batch_rows=256,
        accumulate=4,
        steps=20_000,
        loss_chunk_tokens=16384,
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
        schedule=ScheduleConfig(kind="wsd", peak=2e-3, warmup_steps=500),
        mesh=MeshConfig(data=-1),
        loop=LoopConfig(evaluate_every_steps=500, checkpoint=CheckpointConfig(every_steps=500)),
    )
