"""Russian from your own files: a tokenizer for Cyrillic, and a model of 10 M parameters.

    python -m jaxlm run --config=configs/russian.py --workdir=runs/russian \\
        --config.stages.prepare.sources.train.path='knigi/*.txt' \\
        --config.stages.prepare.sources.heldout.path='otlozheno/*.txt'

Hardware: 2 CPU cores, 6 GiB. On 3.9 MB of the messages of programs, in Russian, 16 minutes: held out 0.880 bits a byte
after 1,250 steps and 0.925 after all 1,500, which is 5.6 times through that text and begins to learn it by heart
(xz -9: 1.543). The steps are for 10 MB, twice through; for less text take fewer.

What differs for Russian: a letter is two bytes, so 16,384 tokens are worth their rows (rich inflection: more word forms
than English has), and figures are in bits a *byte*: half of those a letter. Unigram pieces follow stems and endings
better than BPE's do. Text is normalised (NFC) and kept as it is otherwise: ё and е stay different, stress marks stay.
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
            PrepareConfig(
                sources=(
                    SourceConfig(name="train", path="train/*.txt"),
                    SourceConfig(name="heldout", path="heldout/*.txt", split="heldout"),
                )
            ),
            TokenizerConfig(documents="@prepare", vocab_size=16384, algorithm="unigram"),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=256),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                # Unrolled: XLA's CPU path runs a scan's elementwise work on one core.
                model=ModelConfig(layers=5, width=256, heads=4, qk_norm=True, scan_layers=False),
                batch_rows=8,
                sample_prompts=("Однажды вечером ", "Она "),
                steps=1500,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=50, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=250),
            ),
            SampleConfig(
                model="@pretrain", prompts=("Однажды вечером ", "Она "), sampling=SamplingConfig(max_tokens=80)
            ),
            EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
        )
    )
