"""The whole way from documents to a model that speaks, in a few minutes on a laptop's CPU.

    make demo        or: python -m jaxlm run --config=configs/demo.py --workdir=runs/demo

Data: the documentation that comes with Python and with jaxlm's own packages (no download), whole modules held out.
Hardware: 2 CPU cores, 6 GiB. Time and result: see the table in README.md.
"""

from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
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
PROMPTS = ("os.path.join\n\nJoin", "jax.numpy.mean\n\nReturn", "The for statement")


def get_config() -> RunConfig:
    sources = (
        SourceConfig(name="documentation", format="installed_docs", modules=tuple(TRAIN)),
        SourceConfig(name="held-out modules", format="installed_docs", modules=tuple(HELDOUT), split="heldout"),
    )
    return RunConfig(
        stages=(
            PrepareConfig(sources=sources),
            TokenizerConfig(documents="@prepare", vocab_size=4096),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=256),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                model=ModelConfig(layers=3, width=256, heads=4, qk_norm=True, scan_layers=False),
                batch_rows=8,
                steps=440,
                optimizer=OptimizerConfig(kind="muon", embedding_rate=24.0),
                schedule=ScheduleConfig(kind="linear", peak=1.2e-2, warmup_steps=20, final_share=0.0),
                loop=LoopConfig(evaluate_every_steps=220),
            ),
            SampleConfig(model="@pretrain", prompts=PROMPTS, sampling=SamplingConfig(max_tokens=64, temperature=0.7)),
            EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
        )
    )
