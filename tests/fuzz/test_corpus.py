"""What fuzzing once found, and a sound file of each kind: every reader says something to it, and says it soon."""

import time
from pathlib import Path

import pytest
from targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
KEPT = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_corpus():
    assert {path.parent.name for path in KEPT} == {*TARGETS}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kept_inputs(path):
    began = time.monotonic()
    TARGETS[path.parent.name](path.read_bytes())
    assert time.monotonic() - began < 10
