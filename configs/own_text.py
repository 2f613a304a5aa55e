"""A model of 12 M parameters (depth 5) on your own text files.

    python -m jaxlm run --config=configs/own_text.py --workdir=runs/mine \\
        --config.stages.prepare.sources.train.path='books/*.txt' \\
        --config.stages.prepare.sources.heldout.path='kept/*.txt'

Hardware: any. Batch, learning rate and steps follow from the depth: 180 M tokens in 2,700 steps, more than a CPU does
in a day. For a first look on one, add --config.stages.pretrain.batch_rows=8 --config.stages.pretrain.steps=300.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.train.config import OptimizerConfig, ScheduleConfig


def get_config() -> RunConfig:
    return RunConfig(
        stages=(
            PrepareConfig(
                sources=(
                    SourceConfig(name="train", path="train/*.txt"),
                    SourceConfig(name="heldout", path="heldout/*.txt", split="heldout"),
                )
            ),
            TokenizerConfig(documents="@prepare", vocab_size=8192),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=512),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                depth=5,
                model=ModelConfig(qk_norm=True),
                optimizer=OptimizerConfig(kind="muon"),
                schedule=ScheduleConfig(kind="wsd"),
                loss_chunk_tokens=4096,
            ),
            SampleConfig(model="@pretrain", prompts=("The ",), sampling=SamplingConfig(max_tokens=100)),
            EvaluateConfig(model="@pretrain", rows="@pack"),
        )
    )
