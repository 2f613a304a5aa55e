"""The manifest of an artifact: what it was made from and with, and a hash of each file in it.

An artifact is a folder. `manifest.json` is written last, so a folder without one is unfinished work:

    {"kind": "tokenizer", "format_version": 1, "inputs": {"runs/demo/prepare": "<hash>"}, "config": {...},
     "versions": {"jax": "0.10.2", ...}, "commit": "…", "created": "2026-01-02T03:04:05Z",
     "files": {"tokenizer.model": {"bytes": 1, "sha256": "…"}}, "facts": {...}, "hash": "…"}

`hash` covers kind, inputs, config identity and files, so it names the content and survives a copy to another place.
"""

import dataclasses
import importlib.metadata
import platform
import subprocess
import time
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError

FORMAT_VERSION = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    kind: str
    """What the folder holds: documents, tokenizer, rows, model, evaluation, ..."""
    inputs: dict[str, str]
    """Path of each input → hash of its content."""
    config: dict[str, Any]
    """`config.identity` of the stage's config."""
    files: dict[str, dict[str, Any]]
    """Relative path → {"bytes", "sha256"}."""
    facts: dict[str, Any]
    """Counts and figures that later stages and reports read."""
    versions: dict[str, str]
    commit: str
    created: str
    format_version: int
    hash: str


def write(
    folder: epath.PathLike,
    kind: str,
    *,
    contents: Sequence[str],
    inputs: Mapping[str, str],
    config: Any,
    facts: Mapping[str, Any],
) -> Manifest:
    """Hashes the `contents` (files, or folders with all below them) of `folder` and writes its manifest, last."""
    folder = epath.Path(folder)
    names = [
        f"{entry}/{below}" if below else entry
        for entry in contents
        for below in (files.walk(folder / entry) if (folder / entry).is_dir() else ("",))
    ]
    listed = {name: {"bytes": (folder / name).stat().length, "sha256": files.sha256(folder / name)} for name in names}
    content = {"kind": kind, "inputs": sorted(inputs.values()), "config": config, "files": listed}
    manifest = Manifest(
        kind=kind,
        inputs=dict(inputs),
        config=config,
        files=listed,
        facts=dict(facts),
        versions=versions(),
        commit=commit(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        format_version=FORMAT_VERSION,
        hash=files.hash_json(content),
    )
    files.write_json(folder / "manifest.json", dataclasses.asdict(manifest))
    return manifest


def read(folder: epath.PathLike, kind: str | None = None, field: str = "") -> Manifest:
    """The manifest of `folder`. Refuses a folder without one, of another kind, or of a newer format."""
    folder = epath.Path(folder)
    where = f"{field}: {folder}" if field else str(folder)
    if not (folder / "manifest.json").exists():
        state = "is not finished (it has no manifest.json)" if folder.exists() else "does not exist"
        raise UserError(f"{where}: {state}{_made_by(kind)}")
    values = files.read_json(folder / "manifest.json")
    known = {f.name for f in dataclasses.fields(Manifest)}
    if not isinstance(values, dict) or not known <= set(values) or not has_types(Manifest, values):
        raise UserError(f"{where}/manifest.json: is not a jaxlm manifest")
    if values["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{where}: has format_version {values['format_version']}, this jaxlm reads up to {FORMAT_VERSION}; "
            "update jaxlm"
        )
    if kind is not None and values["kind"] != kind:
        raise UserError(f"{where}: holds {values['kind']}, but {kind} is needed here{_made_by(kind)}")
    return Manifest(**{name: values[name] for name in known})


def hashes(folders: Sequence[str], kind: str, field: str) -> dict[str, str]:
    """Folder → its hash; `field` is the config's tuple of what has these under "path"."""
    return {folder: read(folder, kind, f"{field}.{number}.path").hash for number, folder in enumerate(folders)}


def _made_by(kind: str | None) -> str:
    stages = {"documents": "prepare", "rows": "pack", "samples": "sample", "evaluation": "evaluate"}
    stage = stages.get(kind or "", kind)
    return f"; python -m jaxlm {stage} makes it" if stage in (*stages.values(), "tokenizer") else ""


def add_facts(folder: epath.PathLike, facts: Mapping[str, Any]) -> None:
    """Puts facts into a finished artifact's manifest, in place of those of the same names.

    All else stays as it is, the hash too, which facts are no part of: what was made from the artifact still fits.
    """
    read(folder)  # refuses what is no manifest
    path = epath.Path(folder) / "manifest.json"
    values = files.read_json(path)
    files.write_json(path, values | {"facts": values["facts"] | dict(facts)})


def keep_inputs(folder: epath.PathLike, inputs: Mapping[str, str]) -> None:
    """Notes what a run began with; a continuation with other inputs is refused by name."""
    path = epath.Path(folder) / "inputs.json"
    if path.exists():
        refuse_other_inputs(folder, files.read_json(path), inputs)
    files.write_json(path, dict(inputs))


def refuse_other_inputs(folder: epath.PathLike, known: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """Raises UserError when `inputs` differ in content from those that `folder` was made from."""
    if not same_inputs(known, inputs):
        changed = [name for name, digest in inputs.items() if digest not in known.values()] or [*inputs]
        raise UserError(
            f"{folder}: began with another content of {', '.join(changed)}; "
            "use another --workdir, or bring the old content back"
        )


def same_inputs(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether both name the same contents in the same order, wherever these lie."""
    return list(a.values()) == list(b.values())


def verify(folder: epath.PathLike, manifest: Manifest) -> None:
    """Refuses missing, cut and changed files, each by name."""
    folder = epath.Path(folder)
    for name, entry in manifest.files.items():
        path = inside(folder, name)
        if not path.exists():
            raise UserError(f"{path}: is missing, though {folder}/manifest.json lists it")
        if path.stat().length != entry["bytes"] or files.sha256(path) != entry.get("sha256"):
            raise UserError(
                f"{path}: its content differs from the manifest's sha256; the file is damaged or was edited"
            )


def has_types(cls: type, values: Mapping[str, Any]) -> bool:
    """Whether JSON values have the types of a dataclass's fields, and files their sizes: what was edited may not."""
    hints = typing.get_type_hints(cls)
    fine = all(_has_type(values[name], hint) for name, hint in hints.items() if name in values)
    return fine and all(isinstance(e.get("bytes"), int) for e in values["files"].values())


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is dict and isinstance(value, dict):
        return all(_has_type(held, typing.get_args(hint)[1]) for held in value.values())
    return hint is Any or isinstance(value, hint if isinstance(hint, types.UnionType) else origin or hint)


def inside(folder: epath.Path, name: str) -> epath.Path:
    """`folder / name`, refusing names that lead out of the folder."""
    if name.startswith(("/", "~")) or ".." in name.split("/") or "\\" in name:
        raise UserError(f"{folder}/manifest.json: the name {name!r} leads out of its folder")
    return folder / name


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("jaxlm", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str:
    """The git commit that this code runs from, "+changes" when the tree is not clean; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        describe = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
