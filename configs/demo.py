"""The whole way from documents to a reinforced assistant, in 14 minutes on two CPU cores.

    make demo        or: python -m jaxlm run --config=configs/demo.py --workdir=runs/demo

Data: the documentation that comes with Python and with jaxlm's own packages (no download). Whole modules are held out
for bits per byte. From their docstrings come chats, rankings and tasks (jaxlm/demo/questions.py), from which whole
functions are held out: what is said of these at the end was in no chat, ranking or task.
Hardware: 2 CPU cores, 6 GiB. Time and result: see the table in README.md.
"""

from typing import Literal

from jaxlm.data.config import ChatSource, MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.rl.config import CriterionWeight, GRPOConfig, KLConfig, PPOConfig, RLConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig, SFTConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.train.config import LoopConfig, OptimizerConfig, ScheduleConfig

TRAIN = """
pydoc_data.topics abc argparse array ast asyncio asyncio.base_events asyncio.events asyncio.locks asyncio.queues
asyncio.streams asyncio.tasks base64 bdb binascii builtins bz2 cmath cmd code codecs codeop collections compileall
concurrent.futures concurrent.futures.process configparser contextlib copy csv ctypes dataclasses datetime dbm decimal
dis doctest email.generator email.header email.headerregistry email.message email.policy email.utils enum filecmp
fileinput fractions ftplib functools gc getopt graphlib hashlib heapq hmac http.client http.cookiejar http.cookies
http.server imaplib importlib.abc importlib.metadata importlib.resources inspect io ipaddress itertools locale logging
logging.config logging.handlers lzma mailbox math mimetypes multiprocessing multiprocessing.managers
multiprocessing.shared_memory numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib
poplib profile pstats py_compile pyclbr queue random re rlcompleter runpy sched secrets select selectors shelve signal
site smtplib socket socketserver sqlite3 ssl string struct subprocess symtable sys sysconfig tarfile tempfile
threading time timeit tokenize trace traceback types typing unicodedata unittest unittest.loader unittest.mock
urllib.request uuid venv warnings wave weakref wsgiref.handlers xml.dom xml.dom.minidom xml.etree.ElementTree xml.sax
xml.sax.handler xmlrpc.client xmlrpc.server zipfile zipimport zlib numpy numpy.fft numpy.linalg
numpy.polynomial.chebyshev numpy.polynomial.polynomial numpy.random numpy.testing jax jax.lax jax.nn jax.numpy
jax.numpy.fft jax.profiler jax.scipy.signal jax.scipy.special jax.sharding jax.tree_util flax.core flax.linen flax.nnx
flax.traverse_util optax optax.contrib orbax.checkpoint grain matplotlib.colors matplotlib.ticker rich.console
rich.progress rich.table jinja2 absl.flags tokenizers tensorboardX
""".split()
HELDOUT = """
calendar difflib json shutil statistics textwrap urllib.parse numpy.lib.stride_tricks jax.tree optax.losses
""".split()
QUESTIONS = ("What does `os.path.join` do?", "What is `jax.numpy.mean` for?", "How is `textwrap.dedent` called?")
GOLD = VerifierConfig(kind="function", function="jaxlm.demo.questions:gold")
Kind = Literal["chats", "rankings", "prompts", "tasks"]


def both(kind: Kind, source: type = ChatSource) -> tuple:
    """Train and held-out questions about the modules that were trained on."""
    given: dict = dict(format="python", path=f"jaxlm.demo.questions:{kind}", modules=tuple(TRAIN))
    return tuple(source(name=split, split=split, **given) for split in ("train", "heldout"))


def pretraining() -> tuple:
    docs: dict = dict(format="python", path="jaxlm.demo.documentation:documents")
    sources = (
        SourceConfig(name="documentation", modules=tuple(TRAIN), **docs),
        SourceConfig(name="held-out modules", modules=tuple(HELDOUT), split="heldout", **docs),
    )
    return (
        PrepareConfig(sources=sources),
        TokenizerConfig(documents="@prepare", vocab_size=4096),
        PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=256),
        PretrainConfig(
            data=(MixtureSource(path="@pack"),),
            # A first layer that sees no further than the token before: so small a model learns in so few steps to say
            # again what stands in the prompt (held out 1.98 instead of 2.01 bits a byte, names copied 58 % for 36 %).
            model=ModelConfig(
                layers=3,
                width=256,
                heads=4,
                qk_norm=True,
                pattern=("local", "global", "global"),
                window=2,
                scan_layers=False,
            ),
            batch_rows=8,
            sample_prompts=("The function returns ", "Raises ValueError if "),
            steps=440,
            optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
            schedule=ScheduleConfig(kind="linear", peak=1.2e-2, warmup_steps=20, final_share=0.0),
            loop=LoopConfig(evaluate_every_steps=220),
        ),
        EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
    )


def reinforced(name: str, kind: Kind, steps: int, **fields) -> RLConfig:
    return RLConfig(
        name=name,
        model="@sft",
        sources=both(kind),
        heldout_prompts=256,
        steps=steps,
        # So few answers say little of most weights: with Adam's own epsilon those would move as far as the others.
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=steps),
        **fields,
    )


def reinforcement() -> tuple:
    return (
        reinforced(
            "ppo",
            "prompts",
            steps=26,
            reward_model="@reward",
            criteria=(CriterionWeight(name="overall"), CriterionWeight(name="helpful")),
            gold=GOLD,
            ppo=PPOConfig(kl=KLConfig(coefficient=0.05), value_rate=0.5),
            prompts=128,
            max_prompt_tokens=36,
            max_tokens=40,
            minibatch_answers=64,
            missing_eos="replace",
            missing_eos_amount=-4.0,
            schedule=ScheduleConfig(kind="linear", peak=4e-3, warmup_steps=4),
            kl_budget=10.0,
        ),
        reinforced(
            "grpo",
            "tasks",
            steps=20,
            verifiers=(VerifierConfig(kind="exact"),),
            grpo=GRPOConfig(kl_coefficient=0.0, baseline="leave_one_out"),
            prompts=64,
            samples=4,
            max_prompt_tokens=64,
            max_tokens=16,
            minibatch_answers=64,
            schedule=ScheduleConfig(kind="linear", peak=2e-3, warmup_steps=8),
        ),
    )


def get_config() -> RunConfig:
    asked = both("chats")[1:]
    sampling = SamplingConfig(max_tokens=48, temperature=0.0)
    return RunConfig(
        stages=(
            *pretraining(),
            SFTConfig(
                model="@pretrain",
                sources=both("chats"),
                batch_rows=8,
                steps=240,
                sample_prompts=QUESTIONS,
                heldout_batches=8,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=8e-3, warmup_steps=10, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=120),
            ),
            RewardConfig(
                model="@sft",
                sources=both("rankings", RankingSource),
                criteria=("overall", "helpful", "truthful"),
                batch_rows=8,
                steps=140,
                # Comparisons leave a prompt's level open; left alone, levels spread further than answers do.
                centring=0.02,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=8e-3, warmup_steps=10, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=140),
            ),
            *reinforcement(),
            EvaluateConfig(
                name="base-answers", model="@pretrain", chats=asked, kinds=("what",), chat_template="plain", answers=0
            ),
            EvaluateConfig(name="answers", model="@sft", chats=asked, kinds=("what",), verifiers=(GOLD,)),
            SampleConfig(
                name="base", model="@pretrain", prompts=tuple(f"Q: {q}\nA:" for q in QUESTIONS), sampling=sampling
            ),
            SampleConfig(name="assistant", model="@sft", chat=True, prompts=QUESTIONS, sampling=sampling),
            SampleConfig(name="policy", model="@ppo", chat=True, prompts=QUESTIONS, sampling=sampling),
        )
    )
