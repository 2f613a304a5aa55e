import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / ".ci/lock-3.11.txt"


def package(name, version="1.0", digest="0f"):
    hashes = {"archive_info": {"hashes": {"sha256": digest}}}
    return {"metadata": {"name": name, "version": version}, "download_info": hashes}


def test_a_report_becomes_sorted_requirements_without_jaxlm():
    report = {"install": [package("Typing_Extensions", "4.1", "aa"), package("jaxlm"), package("absl-py", digest="bb")]}
    lines = runpy.run_path(f"{ROOT}/tools/lock.py")["lines"]
    assert lines(report) == ["absl-py==1.0 --hash=sha256:bb", "typing-extensions==4.1 --hash=sha256:aa"]


@pytest.mark.parametrize("name", ["jax", "flax", "libtpu", "pytest", "ruff", "mkdocs-material", "scipy", "pyarrow"])
def test_the_lock_holds_what_ci_needs(name):
    found = [line for line in LOCK.read_text().splitlines() if line.startswith(f"{name}==")]
    assert len(found) == 1
    assert re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", found[0])
