"""Looks for inputs that crash a reader, guided by the lines that each input reaches (pip install atheris).

    python tests/fuzz/explore.py jsonl              a minute of one target of targets.py
    python tests/fuzz/explore.py all --seconds=20   each of them for so long
    python tests/fuzz/explore.py --list

An input that ends in anything but a value or a message of ours is written to corpus/TARGET/crash-… and stays there:
`test_corpus.py` runs it from then on. Exit code 1 where there is one.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
LARGEST = 4096


def explore(name: str, seconds: int) -> bool:
    """Whether a target stood `seconds` of new inputs; a process of its own, since a crash ends it."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "corpus"
        shutil.copytree(CORPUS / name, kept)
        limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-rss_limit_mb=6000", "-timeout=20"]
        command = [sys.executable, __file__, name, "--inside", str(kept), f"-artifact_prefix={folder}/", *limits]
        done = subprocess.run(command, capture_output=True, text=True)
        crashes = [path for path in Path(folder).iterdir() if path.is_file()]
        for path in crashes:
            shutil.copy(path, CORPUS / name / path.name)
            print(f"{name}: corpus/{name}/{path.name}: {_reason(done.stderr)}")
        if done.returncode and not crashes:
            print(f"{name}: could not run: {_reason(done.stderr)}")
        else:
            print(f"{name}: {_runs(done.stderr)}, {len(list(kept.iterdir()))} that reach something of their own")
        return not done.returncode


def _reason(said: str) -> str:
    """The line that names the exception."""
    lines = said.splitlines()
    caught = [number for number, line in enumerate(lines) if "Uncaught Python exception" in line or "ERROR" in line]
    return " ".join(lines[caught[0] : caught[0] + 2]) if caught else (lines or ["no word"])[-1]


def _runs(said: str) -> str:
    done = [line for line in said.splitlines() if line.startswith("Done ")]
    return done[-1] if done else "ended early"


def inside(name: str, arguments: list[str]) -> None:
    """In the process that may crash. Never returns."""
    import atheris

    with atheris.instrument_imports(include=["jaxlm"]):
        import targets

    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    if "--inside" in sys.argv:
        inside(sys.argv[1], sys.argv[3:])
    names = sorted(path.name for path in CORPUS.iterdir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="all", choices=["all", *names])
    parser.add_argument("--seconds", type=int, default=60, help="how long each target is tried")
    parser.add_argument("--list", action="store_true", help="print the targets")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names))
        return 0
    wanted = names if options.target == "all" else [options.target]
    stood = [explore(name, options.seconds) for name in wanted]
    return int(not all(stood))


if __name__ == "__main__":
    sys.exit(main())
