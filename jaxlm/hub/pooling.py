"""How a sentence-transformers directory makes one vector of a text: modules.json, and its Pooling module's config."""

from typing import Any, Literal

from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError

Pooling = Literal["mean", "first", "pooler"]
# Their names, as flags of older configs (pooling_mode_…) and as one word of newer ones.
MODES: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}


def read(folder: epath.Path) -> Pooling | None:
    """None for a directory of transformers alone. Raises UserError for what is not understood, by name.

    A Normalize module is passed over: it changes no vector's direction, and `embed` says that its vectors are not
    normalised.
    """
    path = folder / "modules.json"
    if not path.exists():
        return None
    listed = files.read_json(path)
    modules = listed if isinstance(listed, list) and all(isinstance(item, dict) for item in listed) else []
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if strange or kinds.count("Pooling") != 1:
        raise UserError(
            f"{path}: {', '.join(strange) or 'no single Pooling module'} not understood; without modules.json the "
            "transformer alone is read, and `embed` takes the pooling that it is given"
        )
    named = str(modules[kinds.index("Pooling")].get("path", ""))
    if named.startswith(("/", "~")) or ".." in named.split("/"):
        raise UserError(f"{path}: the path {named!r} leads out of its folder")
    where = folder / named / "config.json"
    return _mode(files.read_json(where), str(where))


def _mode(values: Any, where: str) -> Pooling:
    given = values if isinstance(values, dict) else {}
    flags = [key.removeprefix("pooling_mode_") for key, value in given.items() if value is True and "_mode_" in key]
    named = [given["pooling_mode"]] if isinstance(given.get("pooling_mode"), str) else flags
    if len(named) != 1 or named[0] not in MODES:
        raise UserError(
            f"{where}: pooling by {', '.join(named) or 'nothing'} is not understood; {', '.join(MODES)} are"
        )
    return MODES[named[0]]
