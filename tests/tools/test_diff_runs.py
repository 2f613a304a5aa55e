"""Where two runs part: at the first step, array and layer that differ."""

import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "inspect_checkpoint", raising=False)
    spec = importlib.util.spec_from_file_location("diff_runs", TOOLS / "diff_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder: Path, *, rate: float = 0.1, losses=(3.0, 2.0, 1.0), off: float = 0.0, jax: str = "1") -> str:
    """A run of three steps; at step 2 the third layer's query is `off`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"workdir": str(folder), "schedule": {"peak": rate}}}))
    (folder / "manifest.json").write_text(json.dumps({"versions": {"jax": jax}, "commit": "c"}))
    (folder / "inputs.json").write_text(json.dumps({f"{folder}/rows": "hash"}))
    lines = ({"step": n, "time": hash(str(folder)), "train/loss": x} for n, x in enumerate(losses, 1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoints = Checkpointer(folder / "checkpoints", CheckpointConfig(keep_last=9))
    for step in (1, 2):
        query = jnp.ones((4, 8)).at[2].add(off if step == 2 else 0.0)
        state = {"params": {"embedding": jnp.ones(3), "layers": {"query": query}}, "step": jnp.int32(step)}
        checkpoints.save(step, state, extra={})
        checkpoints.wait()
    checkpoints.close()
    return str(folder)


def test_runs_that_are_alike_wherever_they_lie(tool, tmp_path, capsys):
    assert tool.main([make(tmp_path / "a"), make(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [
        f"{part}: alike" for part in ("config", "versions", "inputs", "metrics", "arrays")
    ]


def test_the_first_difference_of_each_kind_is_named(tool, tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", rate=0.2, losses=(3.0, 2.5, 0.5), off=0.25, jax="2")
    assert tool.main([a, b]) == 1
    said = capsys.readouterr().out
    assert "schedule.peak: 0.1 and 0.2" in said
    assert "jax: 1 and 2" in said
    assert "first at step 2: train/loss 2.0 and 2.5" in said
    assert "first at checkpoint 2:" in said
    assert "params/layers/query: 8 of 32 elements differ, by up to 0.25;" in said
    assert "; first in layer 2" in said
    assert "embedding" not in said


def test_a_tolerance_and_lines_that_are_missing(tool, tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", losses=(3.0, 2.0000001))
    assert tool.main([a, b, "--tolerance=1e-5"]) == 1
    said = capsys.readouterr().out
    assert "first at step" not in said
    assert "1 steps have a line in one run only, the first is 3" in said


def test_no_run_is_exit_code_2(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path), str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
