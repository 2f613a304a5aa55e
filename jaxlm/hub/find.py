"""Which model a path means."""

from collections.abc import Iterable

from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.errors import UserError
from jaxlm.text import readers
from jaxlm.text.config import Source
from jaxlm.train import model_directory


def find_model(path: epath.PathLike, field: str = "") -> epath.Path:
    """The model directory at `path`: itself, its `model/`, or the newest among its stages' (`path/STAGE/model`).

    >>> find_model("runs/demo")
    PosixPath('runs/demo/pretrain/model')

    Raises UserError that says what was found instead; `field` names the config's field in it.
    """
    path = epath.Path(path)
    where = f"{field}: {path}" if field else str(path)
    if not path.exists():
        raise UserError(f"{where}: no such folder; a model directory or a run's folder is needed")
    if not path.is_dir():
        raise UserError(f"{where}: is a file; a model directory or a run's folder is needed")
    if _is_model(path):
        return path
    if _is_model(path / "model"):
        return path / "model"
    # `run` keeps results of another config as NAME.outdated-1.
    folders = (child for child in sorted(path.iterdir()) if child.is_dir() and ".outdated-" not in child.name)
    stages = [child / "model" for child in folders if _is_model(child / "model")]
    if stages:
        return max(stages, key=lambda folder: manifest.read(folder).created)
    if is_hugging_face(path):
        raise UserError(
            f"{where}: is a Hugging Face directory; make a model of ours of it: python -m jaxlm import "
            f"--source={path} --workdir=DIR"
        )
    held = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    unfinished = " (a model without manifest.json is not finished)" if (path / "params").exists() else ""
    raise UserError(f"{where}: holds no finished model{unfinished}; found {held}")


def inputs_of(model: str, chat_template: str, sources: Iterable[Source]) -> dict[str, str]:
    """What a stage that trains a model on records reads (model, template if it is a file, sources) → a hash of each."""
    found = find_model(model, "model")
    read = {str(found): manifest.read(found).hash}
    if epath.Path(chat_template).suffix:
        read[chat_template] = files.sha256(chat_template)
    return read | {name: digest for source in sources for name, digest in readers.inputs(source).items()}


def is_hugging_face(folder: epath.Path) -> bool:
    """Whether a folder holds a model of transformers (a run of ours has a config.json too)."""
    if not (folder / "config.json").exists():
        return False
    values = files.read_json(folder / "config.json")
    return isinstance(values, dict) and ("architectures" in values or "model_type" in values)


def _is_model(folder: epath.Path) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    return manifest.read(folder).kind == model_directory.KIND
