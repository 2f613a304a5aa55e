"""A small encoder on your own text file: missing words (arXiv:1810.04805), and vectors of sentences.

    python -m jaxlm run --config=configs/masked_words.py --workdir=runs/encoder \\
        --config.stages.prepare.sources.mine.path=book.txt

Hardware: 2 CPU cores. Time and result: Moby Dick (1.2 MB) took 6 and a half minutes on two busy ones; held out, 4.15
nats a missing word, 27 % of them right (after the first 250 steps, which learn how often each word is: 5.93 and 14 %).
For BERT's own shape, which can be exported, see docs/recipes.md.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.model.config import ModelConfig
from jaxlm.objectives.config import MaskedWordsConfig, ObjectiveConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.train.config import LoopConfig, OptimizerConfig, ScheduleConfig


def get_config() -> RunConfig:
    return RunConfig(
        stages=(
            PrepareConfig(
                sources=(SourceConfig(name="mine", path="book.txt", part_characters=4000, heldout_share=0.05),)
            ),
            TokenizerConfig(documents="@prepare", vocab_size=2048, special_tokens=("[MASK]",)),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=128),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                model=ModelConfig(layers=3, width=192, heads=3, causal=False, scan_layers=False),
                objective=ObjectiveConfig(masked_words=MaskedWordsConfig()),
                batch_rows=16,
                steps=1500,
                optimizer=OptimizerConfig(kind="adamw"),
                schedule=ScheduleConfig(kind="linear", peak=2e-3, warmup_steps=100, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=250),
            ),
        )
    )
