"""Every file of configs/ is a config that its stage takes, on the devices that its header names."""

import ast
import re
from pathlib import Path

import pytest

from jaxlm.__main__ import load_stage
from jaxlm.config_files import load_config_file
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


def test_what_docstrings_name_is_there():
    for path in (*(ROOT / "jaxlm").rglob("*.py"), *FILES, ROOT / "README.md"):
        for name in re.findall(r"configs/[a-z_0-9]+\.py", path.read_text()):
            assert name == "configs/x.py" or (ROOT / name).exists(), f"{path} names {name}"
