"""A specialist: the demo's assistant, trained on the questions about one family of modules, and what it forgets.

    python -m jaxlm sft --config=configs/specialise.py --workdir=runs/specialist            # after make demo

Hardware: any; on two CPU cores about two minutes. eval/… are held-out questions about numpy, eval/general_… are those
about all that is not numpy: the first fall, the second rise, and --config.pretraining.0.weight=… (rows of the demo's
pretraining, mixed in) trades one for the other.
"""

from collections.abc import Sequence

from jaxlm.data.config import ChatSource, MixtureSource
from jaxlm.stages.config import SFTConfig
from jaxlm.train.config import LoopConfig, OptimizerConfig, ScheduleConfig

FAMILY = """
numpy numpy.fft numpy.linalg numpy.polynomial.chebyshev numpy.polynomial.polynomial numpy.random numpy.testing
""".split()
OTHERS = """
argparse ast asyncio base64 collections datetime email.message functools inspect itertools logging os pathlib random
re shutil socket sqlite3 string subprocess tarfile threading typing unittest zipfile jax jax.lax jax.nn flax.nnx optax
""".split()


def get_config() -> SFTConfig:
    def chats(name: str, modules: Sequence[str], **fields) -> ChatSource:
        path = "jaxlm.demo.questions:chats"
        return ChatSource(name=name, format="python", path=path, modules=tuple(modules), **fields)

    return SFTConfig(
        model="runs/demo/sft",
        sources=(
            chats("numpy", FAMILY),
            chats("numpy held out", FAMILY, split="heldout"),
            chats("others held out", OTHERS, split="heldout", general=True),
        ),
        pretraining=(MixtureSource(path="runs/demo/pack", weight=0.0),),
        batch_rows=8,
        steps=60,
        optimizer=OptimizerConfig(kind="muon"),
        schedule=ScheduleConfig(kind="linear", peak=2e-3, warmup_steps=5, final_share=0.0),
        loop=LoopConfig(evaluate_every_steps=20),
    )
