"""The inspector's verdicts and exit codes, on checkpoints and model directories."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from jaxlm.base import files, manifest
from jaxlm.train import step_folder
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig

TOOL = Path(__file__).parent.parent.parent / "tools/inspect_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {
        "params": {
            "kernel": jnp.asarray(random.standard_normal((64, 64), np.float32)),
            "scale": jnp.ones(3, "bfloat16"),
        },
        "empty": jnp.zeros((0, 2)),
        "step": jnp.int32(seed),
    }


@pytest.fixture
def run(tmp_path):
    """A run's folder with steps 1 and 2."""
    checkpoints = Checkpointer(tmp_path / "run/checkpoints", CheckpointConfig(keep_last=9), identity={"config": "a"})
    for step in (1, 2):
        checkpoints.save(step, state(step), extra={"seed": step})
        checkpoints.wait()
    checkpoints.close()
    return tmp_path / "run"


def test_a_whole_run_is_shown(tool, run, capsys):
    assert tool.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "checkpoints/1: files whole" in said
    assert "run/checkpoints/2: whole" in said
    assert "params/kernel  float32           64 x 64  norm" in said
    assert "format_version: 2" in said
    assert tool.main([str(run / "checkpoints/1"), "--quiet"]) == 0


def test_a_flipped_bit_is_exit_code_1_and_names_the_array(tool, run, capsys):
    largest = max((p for p in (run / "checkpoints/2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert tool.main([str(run / "checkpoints/2")]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert tool.main([str(run / "checkpoints/1")]) == 0


def test_two_are_compared_by_bits(tool, run, capsys):
    one, two = str(run / "checkpoints/1"), str(run / "checkpoints/2")
    shutil.copytree(one, run / "copy/1")
    assert tool.main([one, str(run / "copy/1"), "--quiet"]) == 0
    assert "equal: 4 arrays, every bit" in capsys.readouterr().out
    assert tool.main([one, two, "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "params/kernel: 4,096 of 4,096 elements differ, by up to" in said
    assert "step: 1 of 1 elements differ, by up to 1;" in said
    assert "scale" not in said


def test_what_is_not_there_is_exit_code_2(tool, run, tmp_path, capsys):
    assert tool.main([str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert tool.main([str(tmp_path)]) == 2
    assert tool.main(["a", "b", "c"]) == 2


def test_a_newer_format_is_refused_by_name(tool, run, capsys):
    path = run / "checkpoints/2/manifest.json"
    values = json.loads(path.read_text()) | {"format_version": step_folder.FORMAT_VERSION + 1}
    values.pop("hash")
    files.write_json(path, values | {"hash": files.hash_json(values)})
    assert tool.main([str(run / "checkpoints/2")]) == 2
    assert "this jaxlm reads up to" in capsys.readouterr().err


def test_model_directories_too(tool, tmp_path, capsys):
    for name in "ab":
        folder = tmp_path / name
        (folder / "params").mkdir(parents=True)
        tensors = {"embedding": np.full((4, 2), ord(name), np.float32), "same": np.ones(3, np.float32)}
        safetensors.numpy.save_file(tensors, folder / "params/model-00001.safetensors")
        manifest.write(epath.Path(folder), "model", contents=["params"], inputs={}, config={}, facts={})
    assert tool.main([str(tmp_path / "a")]) == 0
    assert tool.main([str(tmp_path / "a"), str(tmp_path / "b"), "--quiet"]) == 1
    assert "embedding: 8 of 8 elements differ, by up to 1;" in capsys.readouterr().out
    with (tmp_path / "a/params/model-00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert tool.main([str(tmp_path / "a")]) == 1
