"""Config files: Python with a function get_config()."""

import dataclasses
import pathlib
import re
import runpy
import traceback
from typing import Any

from jaxlm.base.config import StageConfig, check_types, field_types
from jaxlm.base.errors import ConfigError, UserError, nearest


def shipped_configs() -> dict[str, pathlib.Path]:
    """Name → file of the configs that come with jaxlm: in a wheel inside the package, in a checkout beside it."""
    package = pathlib.Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def load_config_file(path: str) -> Any:
    """Runs a config file, or the shipped one of that name ("demo"), and returns what its `get_config()` gives."""
    shipped = shipped_configs()
    if not pathlib.Path(path).is_file():
        if path not in shipped:
            raise UserError(f"--config: no such file: {path}; shipped with jaxlm, by name: {', '.join(shipped)}")
        path = str(shipped[path])
    try:
        namespace = runpy.run_path(path)
        if "get_config" not in namespace:
            raise UserError(f"{path}: has no function get_config(); a config file must define one")
        config = namespace["get_config"]()
    except UserError as error:
        if isinstance(error, ConfigError):
            raise UserError(f"{path}:{_line_in(path, error)}: {error}") from error
        raise
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        told = _wrong_type(error) or _wrong_field(error) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}:{_line_in(path, error)}: {told}") from error
    if not dataclasses.is_dataclass(config):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config() returned {kind}; return a stage's config, such as PretrainConfig(...)")
    return config


def _wrong_type(error: Exception) -> ConfigError | None:
    """The field of another type over which a config's own checks stumbled, if one did: types are checked later."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if frame.f_code.co_name == "__post_init__" and dataclasses.is_dataclass(made):
            try:
                check_types(made)
            except ConfigError as found:
                return found
    return None


def _wrong_field(error: Exception) -> ConfigError | None:
    """The field that a config class does not have, if that is what Python says."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    classes = StageConfig.__subclasses__() if found else ()
    namespaces = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
    for cls in [*classes, *(space[found[1]] for space in namespaces if found and found[1] in space)]:
        if found and cls.__name__ == found[1] and dataclasses.is_dataclass(cls):
            return ConfigError(found[2], f"no such field of {found[1]}{nearest(found[2], field_types(cls))}")
    return None


def _line_in(path: str, error: BaseException) -> int:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path and f.lineno]
    return lines[-1] if lines else 1
