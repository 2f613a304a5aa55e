"""The model of configs/own_text.py, which learns to fill gaps too (arXiv:2207.14255).

    python -m jaxlm run --config=configs/fill_in_the_middle.py --workdir=runs/middle \\
        --config.stages.prepare.sources.mine.path=book.txt

A gap is asked for with ids, for the sentinels are no text (docs/recipes.md).
Hardware: 2 CPU cores, 6 GiB. Time and result: 6 minutes 45 s for 1.2 MB (the first of configs/demo.py's documents), on
two busy cores; held out, as plain text, 1.684 bits a byte (xz -9: 2.484). configs/own_text.py came to 1.732 on the same
text, one run each.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.objectives.config import FillInTheMiddleConfig, ObjectiveConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import CHAT_TOKENS, TokenizerConfig
from jaxlm.train.config import LoopConfig, OptimizerConfig, ScheduleConfig

MIDDLE = FillInTheMiddleConfig(rate=0.5, suffix_first=0.5)
SENTINELS = (MIDDLE.prefix_token, MIDDLE.suffix_token, MIDDLE.middle_token)


def get_config() -> RunConfig:
    return RunConfig(
        stages=(
            PrepareConfig(
                sources=(SourceConfig(name="mine", path="book.txt", part_characters=4000, heldout_share=0.05),)
            ),
            TokenizerConfig(documents="@prepare", vocab_size=4096, special_tokens=(*CHAT_TOKENS, *SENTINELS)),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=256),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                model=ModelConfig(layers=6, width=320, heads=5, qk_norm=True, scan_layers=False),
                objective=ObjectiveConfig(fill_in_the_middle=MIDDLE),
                batch_rows=16,
                steps=220,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=20, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=55),
            ),
            EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
        )
    )
