"""Reading and writing files, local or remote, so that a kill never leaves half a file under its final name."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from jaxlm.base.errors import UserError


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes beside `path` and renames: readers see the old file or the whole new one."""
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{path.name}.part"
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: epath.PathLike, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror or error}")


def write_json(path: epath.PathLike, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    path = epath.Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); was it edited or cut off?") from None


def sha256(path: epath.PathLike) -> str:
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """A sha256 of JSON values that does not depend on the order of keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
    ).hexdigest()


def expand(pattern: str, field: str) -> list[epath.Path]:
    """The files that a path or glob names, sorted; a folder stands for itself. Names `field` when there are none."""
    if "**" in pattern:
        raise UserError(f"{field}: got {pattern!r}; ** is not understood, but a folder is read with all below it")
    path = epath.Path(pattern)
    if not any(c in pattern for c in "*?["):
        if not path.exists():
            raise UserError(f"{field}: no such file or folder: {pattern} (seen from {os.getcwd()})")
        return [path]
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    found = sorted(root.glob("/".join(parts[first:])))
    if not found:
        raise UserError(f"{field}: no file matches {pattern} (seen from {os.getcwd()})")
    return found


def walk(folder: epath.PathLike) -> Iterator[str]:
    """Paths of all files below `folder`, relative to it, sorted, hidden ones left out."""
    for path in sorted(epath.Path(folder).iterdir(), key=lambda p: p.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from (f"{path.name}/{below}" for below in walk(path))
        else:
            yield path.name


def clear(folder: epath.PathLike, patterns: Iterable[str]) -> None:
    """Makes `folder` and deletes the files in it that match a glob of `patterns`: what an unfinished run left behind.

    Only names that the caller itself writes belong in `patterns`; whatever else is in the folder stays.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error
