"""Every file of configs/ is a config that its stage takes, on the devices that its header names."""

import ast
import re
from pathlib import Path

import pytest

from jaxlm.__main__ import load_stage
from jaxlm.config_files import load_config_file
from jaxlm.evaluate import gate, tasks
from jaxlm.stages.config import RunConfig

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_its_stage_takes_it(path, tmp_path, monkeypatch):
    for split in ("train", "heldout"):  # the user's own files
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text("a")
    (tmp_path / "book.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    config = load_config_file(str(path))
    devices = 16 if "v5e-16" in path.read_text() else 1
    load_stage(config.stage).validate(config, devices)
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"jaxlm {config.stage} --config=configs/{path.name}" in header
    assert "Hardware:" in header
    # What it says to override is there.
    for field in re.findall(r"--config\.([a-z_.0-9]+)=", header):
        found = config
        for part in field.split("."):
            if isinstance(found, tuple):
                named = {getattr(item, "name", "") or getattr(item, "stage", ""): item for item in found}
                found = found[int(part)] if part.isdigit() else named[part]
            else:
                found = getattr(found, part)
    assert not isinstance(config, RunConfig) or config.stages


def test_the_gates_example():
    """Its files agree with each other, and judge as its header says."""
    stage = load_config_file(str(ROOT / "configs" / "evaluate.py")).stages[1]
    found = {task.name: task for task in tasks.load(stage.tasks)}
    thresholds = gate.read(stage.gate)
    named = {threshold.figure.split(".")[1] for threshold in thresholds.thresholds if "." in threshold.figure}
    assert named == {*found}
    assert {found["functions"].choices(example)[1] for example in found["functions"].examples} == {0, 1, 2, 3}
    assert len(found["modules"].examples) == 40

    def results(modules: list[float], functions: list[float]) -> dict:
        never = {"value": 0.0, "interval": [0.0, 0.088]}
        score, ended = {"value": modules[0], "interval": modules[1:]}, {"value": 1.0, "interval": [0.912, 1.0]}
        measured = {"functions": {"accuracy": {"value": functions[0], "interval": functions[1:]}}}
        return {"tasks": measured | {"modules": {"score": score, "ended": ended}}, "toxicity": never}

    assistant, policy = (
        results([0.2, 0.105, 0.348], [0.35, 0.221, 0.505]),
        results([0.925, 0.801, 0.974], [0.375, 0.242, 0.53]),
    )
    assert gate.verdict(policy, thresholds, assistant)["passed"]
    reasons = gate.verdict(assistant, thresholds, assistant)["reasons"]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "answers in the form asked for",
        "better at it than the assistant",
    ]


def test_what_docstrings_name_is_there():
    for path in (*(ROOT / "jaxlm").rglob("*.py"), *FILES, ROOT / "README.md"):
        for name in re.findall(r"configs/[a-z_0-9]+\.py", path.read_text()):
            assert name == "configs/x.py" or (ROOT / name).exists(), f"{path} names {name}"
