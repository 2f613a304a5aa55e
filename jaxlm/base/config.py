"""Configs: frozen dataclasses, built from a file and overridden from the command line.

A config class is `@dataclass(frozen=True, kw_only=True)`; the string below a field is its documentation; its
`__post_init__` raises `ConfigError(field, problem)`. Overrides rebuild from the inside out with `dataclasses.replace`,
so every `__post_init__` sees final values:

    >>> override(PretrainConfig(...), {"model.layers": "4"}).model.layers
    4

Fields named in a class's `runtime_fields` do not bear on the result (mesh, logging): they are no part of a run's
identity. So are paths of other stages' results: what counts is the hash of their content. `changeable_fields` are part
of it, but an unfinished run may be gone on with other values (a mixture's weights).
Standard library only: help and config errors must not wait for jax.
"""

import ast
import dataclasses
import functools
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from jaxlm.base.errors import ConfigError, nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage's config has."""

    stage: ClassVar[str]
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name")

    name: str = ""
    """Name of this stage within a `run`; the stage's own name when empty."""
    workdir: str = ""
    """Folder of this stage's results; set by --workdir."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, outermost first; one of them may be -1: all devices that are left."""

    slices: int = 1
    """TPU slices joined by the data-center network; data parallel across them."""
    data: int = -1
    """Replicas of the parameters; each works on its share of the batch."""
    fsdp: int = 1
    """Shards of parameters and optimizer state, gathered layer by layer; also splits the batch."""
    expert: int = 1
    """Shards of the experts; also splits the batch outside of them."""
    context: int = 1
    """Shards of the sequence."""
    tensor: int = 1
    """Shards of heads, feed-forward and vocabulary within a layer."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            check(size == -1 or size >= 1, axis, f"got {size}; a positive size, or -1 for the devices left, is needed")
        free = [axis for axis, size in sizes.items() if size == -1]
        check(len(free) <= 1, free[-1] if free else "", f"{' and '.join(free)} are both -1; at most one can be")

    def sizes(self, device_count: int) -> dict[str, int]:
        """Axis → size for so many devices. Raises ConfigError when they do not divide."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        free = [axis for axis, size in sizes.items() if size == -1]
        if free and device_count % fixed == 0:
            return sizes | {free[0]: device_count // fixed}
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        fits = fixed == device_count and not free
        check(fits, "mesh", f"{asked} does not divide {device_count} devices; all sizes together must make them up")
        return sizes


def check(holds: bool, field: str, problem: str) -> None:
    """Raises `ConfigError(field, problem)` unless `holds`."""
    if not holds:
        raise ConfigError(field, problem)


def override(config: Any, values: Mapping[str, str]) -> Any:
    """`config` with raw command-line strings put in at dotted paths.

    Items of a tuple are reached by index, or by their `name` field. Raises `ConfigError` for unknown fields,
    values that do not parse, and whatever `__post_init__` refuses.
    """
    tree: dict[str, Any] = {}
    for path, raw in values.items():
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(path, "is set both whole and in part")
        if isinstance(node.get(last), dict):
            raise ConfigError(path, "is set both whole and in part")
        node[last] = raw
    return _rebuild(config, tree, "")


def _rebuild(value: Any, changes: Any, path: str) -> Any:
    """`value` with the nested `changes` applied; `path` is where it stands in the whole config."""
    dotted = f"{path}." if path else ""
    if isinstance(value, tuple):
        items = list(value)
        for key, change in changes.items():
            at = _item_index(items, key, f"{dotted}{key}")
            items[at] = _rebuild(items[at], change, f"{dotted}{key}")
        return tuple(items)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(path, f"has no fields; it is {type(value).__name__} {value!r}")
    hints = field_types(type(value))
    new: dict[str, Any] = {}
    for name, change in changes.items():
        if name not in hints:
            raise ConfigError(f"{dotted}{name}", "no such field" + nearest(name, hints))
        current = getattr(value, name)
        if isinstance(change, dict):
            if current is None:
                current = _default_of_optional(hints[name], f"{dotted}{name}")
            new[name] = _rebuild(current, change, f"{dotted}{name}")
        else:
            new[name] = parse(change, hints[name], f"{dotted}{name}")
    try:
        return dataclasses.replace(value, **new)
    except ConfigError as error:
        raise (error.within(path) if path else error) from None


def _item_index(items: list[Any], key: str, path: str) -> int:
    names = [getattr(item, "name", "") or getattr(item, "stage", "") for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(path, f"no such item among {len(items)}" + nearest(key, [n for n in names if n] or ["0"]))


def _default_of_optional(hint: Any, path: str) -> Any:
    """The default value of an `X | None` field that is None and of which a part is being set."""
    for option in typing.get_args(hint):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option()
    raise ConfigError(path, "is None and has no fields to set")


def parse(raw: str, hint: Any, path: str) -> Any:
    """Turns a command-line string into a value of the type `hint`, or raises `ConfigError` that names `path`."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if type(None) in options and raw.lower() == "none":
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return parse(raw, option, path)
            except ConfigError:
                if option is options[-1] or len(options) == 2:
                    raise
    if origin is Literal:
        options = typing.get_args(hint)
        if raw not in [str(o) for o in options]:
            raise ConfigError(path, f"got {raw!r}; one of {', '.join(map(str, options))} is needed")
        return next(o for o in options if str(o) == raw)
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if raw.lstrip().startswith("["):
            return tuple(parse(str(item), inner, path) for item in _json_list(raw, path))
        text = raw.strip().removeprefix("(").removesuffix(")").removesuffix(",")
        if inner is str and raw and (not text or any(part.strip(" ") != part.strip() for part in text.split(","))):
            raise ConfigError(path, f'got {raw!r}; write blanks and commas as a JSON list, such as ["\\n", "a, b"]')
        return tuple(parse(part.strip(), inner, path) for part in text.split(",")) if text else ()
    if hint is bool:
        if raw.lower() in ("true", "1", "false", "0"):
            return raw.lower() in ("true", "1")
        raise ConfigError(path, f"got {raw!r}; true or false is needed")
    if hint in (int, float):
        try:
            number = float(raw.replace("_", "")) if "e" in raw.lower() or hint is float else int(raw)
            if hint is int and number != int(number):
                raise ValueError
            return hint(number)
        except (ValueError, OverflowError):
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(path, f"got {raw!r}; {kind} is needed") from None
    if hint is str:
        return raw
    raise ConfigError(path, f"cannot be set as a whole on the command line; set its fields: {path}.FIELD=VALUE")


def _json_list(raw: str, path: str) -> list[Any]:
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ConfigError(path, f"got {raw!r}, which is no JSON list: {error}") from None
    if not isinstance(value, list):
        raise ConfigError(path, f"got {raw!r}; a list is needed")
    return value


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def check_types(config: Any) -> None:
    """Refuses values in a config file that do not have their field's type (Python itself would not mind)."""
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        _require_type(value, hint, name)
        try:
            if dataclasses.is_dataclass(value):
                check_types(value)
            elif isinstance(value, tuple):
                for index, item in enumerate(value):
                    if dataclasses.is_dataclass(item):
                        _check_item(item, index)
        except ConfigError as error:
            raise error.within(name) from None


def _require_type(value: Any, hint: Any, path: str) -> None:
    if not _fits(value, hint):
        raise ConfigError(path, f"got {value!r} ({type(value).__name__}); {type_name(hint)} is needed")


def _check_item(item: Any, index: int) -> None:
    try:
        check_types(item)
    except ConfigError as error:
        raise error.within(getattr(item, "name", "") or str(index)) from None


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        args = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def to_dict(config: Any) -> Any:
    """A config as plain JSON values; a stage's config carries its stage's name under "stage"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        stage = {"stage": config.stage} if isinstance(config, StageConfig) else {}
        return stage | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`. Unknown keys are refused by name; absent ones take their default."""
    hints = field_types(cls)
    dotted = f"{path}." if path else ""
    new: dict[str, Any] = {}
    for name, value in values.items():
        if name == "stage" and name not in hints:
            continue
        if name not in hints:
            raise ConfigError(f"{dotted}{name}", "no such field" + nearest(name, hints))
        new[name] = _from_json(value, hints[name], f"{dotted}{name}")
        _require_type(new[name], hints[name], f"{dotted}{name}")
    try:
        return cls(**new)
    except ConfigError as error:
        raise (error.within(path) if path else error) from None
    except TypeError as error:
        raise ConfigError(path or cls.__name__, str(error).split("__init__() ")[-1]) from None


def _from_json(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(value, dict) and dataclasses.is_dataclass(option) and isinstance(option, type):
            return from_dict(option, value, path)
        if isinstance(value, list) and typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            return tuple(_from_json(item, inner, f"{path}.{index}") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def identity(config: Any, continued: bool = False) -> Any:
    """`to_dict` of the fields on which the result depends; `continued`: of those that a continuation must share."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        skipped = getattr(type(config), "runtime_fields", ())
        skipped += getattr(type(config), "changeable_fields", ()) if continued else ()
        stage = {"stage": config.stage} if isinstance(config, StageConfig) else {}
        kept = [f.name for f in dataclasses.fields(config) if f.name not in skipped]
        return stage | {name: identity(getattr(config, name), continued) for name in kept}
    if isinstance(config, tuple | list):
        return [identity(item, continued) for item in config]
    return config


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) wherever two `to_dict` results differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}.{index}" if path else str(index))
    elif json.dumps(old) != json.dumps(new):
        yield path, old, new


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name → the string that stands below it in the class's source, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def describe(cls: type, prefix: str = "", made: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """(dotted field, type, default, doc) for every field of a config class, nested ones in place.

    Defaults are those of `made`, which an outer class has as its own default, and the class's without it.
    """
    docs = field_docs(cls)
    hints = field_types(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        options = [o for o in (hint, *typing.get_args(hint)) if isinstance(o, type) and dataclasses.is_dataclass(o)]
        is_tuple = typing.get_origin(hint) is tuple
        default = default_of(f) if made is None else getattr(made, f.name)
        if default is dataclasses.MISSING:
            shown = "(required)"
        else:
            shown = type(default).__name__ if dataclasses.is_dataclass(default) else repr(default)
        yield f"{prefix}{f.name}", type_name(hint), shown, docs.get(f.name, "")
        for option in options:
            own = default if type(default) is option else None
            yield from describe(option, f"{prefix}{f.name}." + ("N." if is_tuple else ""), own)


def default_of(field: dataclasses.Field) -> Any:
    """A field's default; `dataclasses.MISSING` where it has to be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(str(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return "|".join(type_name(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{type_name(typing.get_args(hint)[0])},..."
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
