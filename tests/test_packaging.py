"""What a wheel and an sdist carry, and one place for the version."""

import re
import subprocess
import sys
import tarfile
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
    given, places = (PROJECT["tool"]["setuptools"][key] for key in ("package-data", "package-dir"))
    place = lambda name: ROOT / places.get(name, name.replace(".", "/"))
    held = {p for name, globs in given.items() for g in globs for p in place(name).glob(g)}
    folders = (ROOT / "jaxlm", ROOT / "configs")
    other = {p for f in folders for p in f.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert held == other


def test_extras_are_found_by_every_pip():
    """pip 23, which Python 3.11 brings, installs nothing for an extra with an underscore in its name: it only warns."""
    assert not [name for name in PROJECT["project"]["optional-dependencies"] if "_" in name]


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert jaxlm.__version__ == re.search(r'VERSION = "(.*)"', (ROOT / "jaxlm/version.py").read_text())[1]
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_runs_the_demo_from_an_empty_folder(tmp_path):
    """Of the demo its first stage; .ci/run has them all, from a checkout."""
    build = [sys.executable, "-m", "build", f"--outdir={tmp_path}", str(ROOT)]  # the wheel is built from the sdist
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "configs/demo.py", "tests/conftest.py", "tools/torture.py"} <= carried
    names = zipfile.ZipFile(wheel).namelist()
    assert {"jaxlm/configs/demo.py", "jaxlm/configs/gate/thresholds.json", "jaxlm/report/page.html.jinja"} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "tools", "configs"))]
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    command = [sys.executable, "-m", "jaxlm", "run", "--config=demo", "--workdir=runs/demo", "--config.only=prepare"]
    subprocess.run(command, cwd=empty, env={"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}, check=True)
    assert (empty / "runs/demo/prepare/manifest.json").exists()
    assert (empty / "runs/demo/report.html").exists()
