"""Every test runs on 8 simulated CPU devices: strict types, no rank promotion, shapes checked, warnings as errors."""

import contextlib
import os
import re
import resource
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite's time is compiling: without LLVM's optimizations it takes half as long, and the numbers are as good.
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
)
# Without these, TensorFlow Datasets and TPU libraries look for cloud machines on import.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jaxtyping
import pytest

from jaxlm import devices
from jaxlm.base import logging

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Whole runs compile the same step again and again; one folder for this process and its children, gone with it. CI names
# one that its later steps find again, a folder in it for each worker: two would read each other's half-written files.
_cache = tempfile.TemporaryDirectory(prefix="jaxlm-test-cache-")
_kept = os.path.join(os.environ.get("JAXLM_TEST_CACHE", _cache.name), os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _kept)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
devices.start()  # as the command line does: eight devices on two cores need it

# Shapes in signatures hold at run time in everything that computes.
jaxtyping.install_import_hook(
    ["jaxlm.model", "jaxlm.train", "jaxlm.sample", "jaxlm.reward", "jaxlm.preference", "jaxlm.rl"], "beartype.beartype"
)

# Warnings are errors; the exceptions, each with its library, version and reason.
IGNORED_WARNINGS: list[tuple[str, type[Warning], str]] = []


# How many tests may be skipped where nothing is missing (CI sets JAXLM_ALL_INSTALLED).
MOST_SKIPPED = 0


def pytest_sessionfinish(session, exitstatus):
    """A test that is skipped for good is not noticed: CI fails when there are more of them than were agreed to."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    # Those that compare with transformers and lm_eval as they are installed have a Python and a step of their own.
    elsewhere = ("JAXLM_PARITY_PYTHON", "JAXLM_LM_EVAL_PYTHON")
    reports = reporter.stats.get("skipped", ()) if reporter else ()
    skipped = sum(not any(name in str(report.longrepr) for name in elsewhere) for report in reports)
    if os.environ.get("JAXLM_ALL_INSTALLED") and skipped > MOST_SKIPPED:
        reporter.write_line(f"{skipped} tests were skipped, {MOST_SKIPPED} may be (tests/conftest.py)", red=True)
        session.exitstatus = 1


@pytest.fixture
def peak_growth():
    """How many bytes the process's memory has peaked above where it stood when the test began."""
    with contextlib.suppress(OSError):  # where that is not allowed, the peak may be one of before
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        told = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return 1024 * int((told or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0])

    before = peak()
    return lambda: peak() - before


def pytest_collection_modifyitems(items):
    """Groups, of which `-n 2 --dist loadgroup` runs one test at a time.

    Tests with processes of their own wait for each other's ports and cores; two processes can't load the TPU compiler.
    """
    for item in items:
        if "runner" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
        elif item.get_closest_marker("tpu_compiler"):
            item.add_marker(pytest.mark.xdist_group("tpu_compiler"))


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message, category, _ in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was():
    yield
    logging.stop()


@pytest.fixture(scope="session")
def packed_rows(tmp_path_factory) -> str:
    """A folder of packed rows of 64 bytes each, train and held out, made by the stages themselves."""
    import json
    import random

    from jaxlm.data.config import PackConfig
    from jaxlm.stages import pack, prepare, tokenizer
    from jaxlm.text.config import PrepareConfig, SourceConfig
    from jaxlm.tokenizer.config import TokenizerConfig

    root = tmp_path_factory.mktemp("packed")
    random_ = random.Random(0)
    words = "the a small large red blue cat dog bird sees hears follows finds house river tree and".split()
    for split, count in (("train", 400), ("heldout", 20)):
        texts = (" ".join(random_.choices(words, k=random_.randint(12, 40))) for _ in range(count))
        (root / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = (
        SourceConfig(name="train", path=f"{root}/train.jsonl"),
        SourceConfig(name="heldout", path=f"{root}/heldout.jsonl", split="heldout"),
    )
    prepare.main(PrepareConfig(sources=sources, workdir=f"{root}/prepare"))
    tokenizer.main(TokenizerConfig(documents=f"{root}/prepare", kind="byte", workdir=f"{root}/tokenizer"))
    made_from = {"documents": f"{root}/prepare", "tokenizer": f"{root}/tokenizer"}
    pack.main(PackConfig(**made_from, row_length=64, workdir=f"{root}/pack"))
    return f"{root}/pack"
