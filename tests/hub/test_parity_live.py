"""Every family against transformers as it is installed: checkpoints of new random numbers, made and compared here.

    export JAXLM_PARITY_PYTHON=../parity/bin/python
    python -m pytest -m slow tests/hub/test_parity_live.py tests/hub/test_exchange.py

That Python needs torch and transformers and no jaxlm (`pip install torch transformers`, as the extra `parity` pins
them); test_exchange.py loads there what was exported. Without the variable it is this one, where it has them.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parity import compare_cached_logits, compare_gradients, compare_logits, compare_rewards

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parent / "make_family_fixtures.py"
SEED = 1


def names_of(table):
    """The keys, or items, of a table of the tool, which cannot be imported without torch."""
    for node in ast.parse(TOOL.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == table for target in targets):
            held = node.value
            return [ast.literal_eval(key) for key in (held.keys if isinstance(held, ast.Dict) else held.elts)]
    raise AssertionError(table)


CASES = names_of("CASES")
REWARDS = [name for name in CASES if name.startswith("reward")]
LOGITS = [name for name in CASES if not name.startswith(("reward", "bare"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of all cases."""
    python = os.environ.get("JAXLM_PARITY_PYTHON", "")
    if not python and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        python = sys.executable
    if not python:
        # torch is no part of the tests' own environment: CI has a step that names a Python with it, where none skips.
        pytest.skip(
            "needs torch and transformers, here (jaxlm[parity]) or in the Python that JAXLM_PARITY_PYTHON names"
        )
    folder = tmp_path_factory.mktemp("parity")
    subprocess.run([python, str(TOOL), "into", str(folder), str(SEED)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name, made):
    compare_logits(made / name)
    if not name.startswith("bert"):
        compare_cached_logits(made / name)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name, made):
    compare_rewards(made / name)


@pytest.mark.parametrize("name", names_of("GRADIENTS"))
def test_gradients(name, made, tmp_path):
    compare_gradients(made / name, tmp_path)
