"""Language models in JAX, from documents to a released assistant.

>>> import jaxlm
>>> lm = jaxlm.load("runs/demo")
>>> lm.generate(["The array is"], max_tokens=32)[0].text
"""

from typing import TYPE_CHECKING, Any

from jaxlm import version

if TYPE_CHECKING:
    from jaxlm.hub.language_model import load

__version__ = version.VERSION
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` brings jax with it, so it is imported when it is asked for."""
    if name == "load":
        from jaxlm.hub.language_model import load

        return load
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
