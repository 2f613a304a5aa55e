"""A model of 10 M parameters on your own text file, in half an hour on a laptop.

    python -m jaxlm run --config=configs/own_text.py --workdir=runs/mine \\
        --config.stages.prepare.sources.mine.path=book.txt

A file, a folder, a glob or JSONL: whatever `prepare` reads. A twentieth of it is held out.
Hardware: 2 CPU cores, 6 GiB. Steps are for a book of 1 MB: three times through it; for 3 MB take 650, which is half an
hour where a step of 4,096 tokens takes two and a half seconds. More often through the same text, and it is learnt by
heart: on Moby Dick (1.2 MB), held out, 1.99 bits a byte after 220 steps, 3.44 after 700.
On an accelerator, set pretrain's depth instead of its model, batch and steps: they then follow from it.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.train.config import LoopConfig, OptimizerConfig, ScheduleConfig


def get_config() -> RunConfig:
    return RunConfig(
        stages=(
            # A book is one document to the reader: its parts can be held out, and lie in rows beside others.
            PrepareConfig(
                sources=(SourceConfig(name="mine", path="book.txt", part_characters=4000, heldout_share=0.05),)
            ),
            TokenizerConfig(documents="@prepare", vocab_size=4096),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=256),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                # Unrolled: XLA's CPU path runs a scan's elementwise work on one core.
                model=ModelConfig(layers=6, width=320, heads=5, qk_norm=True, scan_layers=False),
                batch_rows=16,
                sample_prompts=("The ", "It was "),
                steps=220,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=20, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=55),
            ),
            SampleConfig(model="@pretrain", prompts=("The ", "It was "), sampling=SamplingConfig(max_tokens=100)),
            EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
        )
    )
