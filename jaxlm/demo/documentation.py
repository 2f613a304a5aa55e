"""The documentation that is installed with Python and its packages: real text that needs no download.

    SourceConfig(name="docs", format="python", path="jaxlm.demo.documentation:documents", modules=("json", "textwrap"))

`pydoc_data.topics` gives a document a topic; any other module gives one for each public function and class (with its
methods), where that is at least 200 characters, and gathers what is shorter. It depends on the installed versions
only: names are sorted and addresses cut out.
"""

import contextlib
import importlib
import inspect
import io
import re
import types
import warnings
from collections.abc import Iterable, Iterator

from jaxlm.base.errors import UserError

SHORT, LONG = 200, 8000  # characters: below, sections are gathered; above, they are divided between documents
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def documents(modules: Iterable[str], split: str, field: str = "modules") -> Iterator[dict[str, str]]:
    """{"text", "source": module, "where": "module:object"} for each document of the named modules, of either split.
    Nothing is printed, no device started.

    Raises UserError, naming the config's `field`, for a module that cannot be imported.
    """
    for name in modules:
        module = import_module(name, field)
        topics = getattr(module, "topics", None)
        if name == "pydoc_data.topics" and isinstance(topics, dict):
            found: Iterable[tuple[str, str]] = ((topic, _ADDRESS.sub("", topics[topic])) for topic in sorted(topics))
        else:
            found = _of_module(module)
        yield from ({"text": text, "source": name, "where": f"{name}:{owner}"} for owner, text in found)


def import_module(name: str, field: str) -> types.ModuleType:
    silent = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{field}: {name} cannot be imported ({type(error).__name__}: {error})") from error


def _of_module(module: types.ModuleType) -> Iterator[tuple[str, str]]:
    """(object's name, text) for each document of a module."""
    gathered = [_section(module.__name__, module)] if docstring(module) else []
    for name, value in public(module):
        sections = list(_sections(f"{module.__name__}.{name}", value))
        if sum(map(len, sections)) < SHORT:
            gathered += sections
        else:
            yield from _divided(name, sections)
    yield from _divided("", gathered)


def _divided(owner: str, sections: list[str]) -> Iterator[tuple[str, str]]:
    """Sections joined to documents of at most LONG characters, a longer section being one by itself."""
    joined: list[str] = []
    part = 0
    for section in sections:
        if joined and sum(map(len, joined)) + len(section) > LONG:
            yield f"{owner}#{part}", "\n\n".join(joined)
            joined, part = [], part + 1
        joined.append(section)
    if joined:
        yield (f"{owner}#{part}" if part or not owner else owner), "\n\n".join(joined)


def _sections(title: str, value: object) -> Iterator[str]:
    """The docstring of a function or class, then those of the class's own public methods, each under its name."""
    if docstring(value):
        yield _section(title, value)
    if inspect.isclass(value):
        for name, member in sorted(vars(value).items()):
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            described = inspect.isroutine(member) or isinstance(member, property)
            if not name.startswith("_") and described and docstring(member):
                yield _section(f"{title}.{name}", member)


def _section(title: str, value: object) -> str:
    return f"{title}\n\n{docstring(value)}\n"


def docstring(value: object) -> str:
    """The object's own docstring, without indentation; empty when it has none, or only one made by a decorator."""
    text = getattr(value, "__doc__", None)
    if not isinstance(text, str) or (not inspect.isclass(value) and text == type(value).__doc__):
        return ""
    if inspect.isclass(value) and text.startswith(f"{value.__name__}("):
        return ""  # what @dataclass and namedtuple write
    return _ADDRESS.sub("", inspect.cleandoc(text)).strip()


def public(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """The documented callables that a module offers: those in `__all__`, else those of its own package."""
    names = vars(module).get("__all__")
    package = module.__name__.partition(".")[0]
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or isinstance(value, types.ModuleType) or not callable(value):
            continue
        home = getattr(value, "__module__", None)
        own = name in names if names is not None else isinstance(home, str) and home.partition(".")[0] == package
        if own:
            yield name, value
