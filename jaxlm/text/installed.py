"""Which release an installed module is of: what a function of the user's reads from it."""

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Mapping


def version(module: str) -> str:
    """ "numpy 2.4.6" of numpy.linalg, "python 3.12.1" of a module of the standard library."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return f"python {platform.python_version()}"
    found = sorted(set(_distributions().get(top, [])))
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found) or "unknown"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Top-level module → the packages that it came with; a quarter of a second's work."""
    return importlib.metadata.packages_distributions()
