"""What a wheel carries, and one place for the version."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxlm

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "jaxlm").rglob("*.py")}
    listed = {*PROJECT["tool"]["setuptools"]["packages"]}
    assert listed == {str(folder).replace("/", ".") for folder in folders} | {"jaxlm.configs"}


def test_every_file_that_is_not_code_is_package_data():
    given = PROJECT["tool"]["setuptools"]["package-data"]
    held = {p for name, globs in given.items() for g in globs for p in (ROOT / name.replace(".", "/")).glob(g)}
    other = {p for p in (ROOT / "jaxlm").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert held == other


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert jaxlm.__version__ == re.search(r'VERSION = "(.*)"', (ROOT / "jaxlm/version.py").read_text())[1]
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_wheel_runs_the_demo_from_an_empty_folder(tmp_path):
    """Of the demo its first stage; .ci/run has them all, from a checkout."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"jaxlm/configs/demo.py", "jaxlm/report/page.html.jinja"} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "tools", "configs"))]
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    command = [sys.executable, "-m", "jaxlm", "run", "--config=demo", "--workdir=runs/demo", "--config.only=prepare"]
    subprocess.run(command, cwd=empty, env={"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}, check=True)
    assert (empty / "runs/demo/prepare/manifest.json").exists()
    assert (empty / "runs/demo/report.html").exists()
