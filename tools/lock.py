"""Writes the lock file of CI: every package that jaxlm's extras need, its version and the hash of its file.

    .venv/bin/python tools/lock.py .ci/lock-3.11.txt                   # of this Python and platform
    .venv/bin/pip install --require-hashes --requirement .ci/lock-3.11.txt

pip resolves, as for a fresh environment; nothing is installed. To be run where a dependency is to become newer.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXTRAS = "test,tpu,docs"


def lines(report: dict[str, Any]) -> list[str]:
    """Of pip's installation report, a requirement for each package but jaxlm itself, sorted by name.

    >>> lines({"install": [{"metadata": {"name": "A", "version": "1"},
    ...                     "download_info": {"archive_info": {"hashes": {"sha256": "0f"}}}}]})
    ['a==1 --hash=sha256:0f']
    """
    found = []
    for package in report["install"]:
        name, version = package["metadata"]["name"].lower().replace("_", "-"), package["metadata"]["version"]
        if name != "jaxlm":
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            found.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(found)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--extras", default=EXTRAS, help=f"of jaxlm (default: {EXTRAS})")
    arguments = parser.parse_args(given)
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*pip, f"{root}[{arguments.extras}]"], check=True, capture_output=True, text=True)
    found = lines(json.loads(done.stdout))
    header = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}; made by tools/lock.py\n"
    arguments.path.write_text(header + "".join(f"{line}\n" for line in found))
    print(f"{arguments.path}: {len(found)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
