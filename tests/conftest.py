"""Every test runs on 8 simulated CPU devices, with strict types, no rank promotion, shapes checked, warnings as errors."""

import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Without these, TensorFlow Datasets and TPU libraries look for cloud machines on import.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes in signatures hold at run time in everything that computes.
jaxtyping.install_import_hook(["jaxlm.model", "jaxlm.train", "jaxlm.sample"], "beartype.beartype")

# Warnings are errors; the exceptions, each with its library, version and reason.
IGNORED_WARNINGS: list[tuple[str, type[Warning], str]] = []


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message, category, _ in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield
