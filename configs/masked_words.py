"""A small BERT on your own text file: missing words, then vectors of sentences and a Hugging Face directory.

    python -m jaxlm run --config=configs/masked_words.py --workdir=runs/bert \\
        --config.stages.prepare.sources.mine.path=book.txt

Hardware: 2 CPU cores.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.hub.config import ExportConfig
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
                # BERT's shape (arXiv:1810.04805): only what it fixes can be exported as one.
                model=ModelConfig(
                    layers=3,
                    width=192,
                    heads=3,
                    feed_forward=768,
                    causal=False,
                    norm="layer",
                    norm_place="sum",
                    norm_epsilon=1e-12,
                    biases=("qkv", "output", "mlp"),
                    gated_mlp=False,
                    activation="gelu_exact",
                    learned_positions=128,
                    token_types=2,
                    head="transform",
                    tied_embeddings=True,
                    scan_layers=False,
                ),
                objective=ObjectiveConfig(masked_words=MaskedWordsConfig()),
                batch_rows=16,
                steps=1500,
                optimizer=OptimizerConfig(kind="adamw", weight_decay=0.01),
                schedule=ScheduleConfig(kind="linear", peak=2e-3, warmup_steps=100, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=250),
            ),
            # The gate asks what a model says; an encoder says nothing, and goes without.
            ExportConfig(model="@pretrain", without_verdict=True),
        )
    )
