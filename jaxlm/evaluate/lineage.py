"""What a model was made from, by the manifests: its ancestors, and the reward models that it was optimised for."""

import dataclasses
from collections.abc import Iterator, Sequence

from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.manifest import Manifest
from jaxlm.feedback.records import Annotation
from jaxlm.train import model_directory

METRIC = "eval/bits_per_byte"


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """A model that went into another one, or the model itself."""

    folder: epath.Path
    manifest: Manifest

    @property
    def metrics(self) -> epath.Path:
        """Of the run that made it."""
        return self.folder.parent / "metrics.jsonl"


def ancestors(folder: epath.PathLike) -> Iterator[Ancestor]:
    """The model, then what it was made from, nearest first; reward models apart.

    Folders that were moved together are found beside one another; what is found has the hash that is written down.
    """
    waiting, seen = [epath.Path(folder)], set()
    while waiting:
        here = waiting.pop(0)
        found = manifest.read(here, model_directory.KIND)
        if found.hash in seen:
            continue
        seen.add(found.hash)
        yield Ancestor(here, found)
        for path, digest in found.inputs.items():
            beside = here.parent.parent / epath.Path(path).parent.name / epath.Path(path).name
            places = [place for place in (epath.Path(path), beside) if _is_model(place, digest)]
            waiting += [place for place in places[:1] if not files.read_json(place / "config.json").get("criteria")]


def _is_model(folder: epath.Path, digest: str) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    found = manifest.read(folder)
    return found.kind == model_directory.KIND and found.hash == digest


def optimised_for(family: Sequence[Ancestor]) -> set[str]:
    """Hashes of all that was read to choose what the model learnt from, its reward models among them: by reinforcement
    learning, and by the selection of the chats that a stage on the way was tuned on."""
    read: set[str] = set()
    for ancestor in family:
        inputs = ancestor.manifest.inputs
        if ancestor.manifest.config.get("stage") == "rl":
            read |= {*inputs.values()}
        for path, digest in inputs.items():
            read |= _read_to_select(ancestor.folder, epath.Path(path), digest)
    return read


def _read_to_select(model: epath.Path, path: epath.Path, digest: str) -> set[str]:
    """What the stage `select` read that made this file, by hashes; nothing where another stage did."""
    for folder in (path.parent, model.parent.parent / path.parent.name):
        if (folder / "manifest.json").exists():
            found = manifest.read(folder)
            if found.kind == "chats" and found.files.get(path.name, {}).get("sha256") == digest:
                return {*found.inputs.values()}
    return set()


def unfit_judge(annotation: Annotation, optimised: set[str]) -> str:
    """Why a judge's annotation is no evidence for a model that was optimised for these; empty: it is.

    A judge says under "model_hash" (or anywhere in its annotation's own fields) by which model it judges: its
    manifest's hash, of which 12 digits do. Beside a reward model, one that does not say so cannot be told from it.
    """
    if annotation.role != "judge" or not optimised:
        return ""
    said = " ".join([annotation.annotator, *(str(value) for value in annotation.raw.values())])
    if any(digest[:12] in said for digest in optimised):
        return "is the very reward model that the model was optimised for"
    if not annotation.raw.get("model_hash"):
        return 'does not say by which model it judges ("model_hash"), and the model was optimised for one'
    return ""


def curve_path(family: Sequence[Ancestor], given: str) -> epath.Path | None:
    """The metrics.jsonl that shows the error: of the `given` run, or of the nearest ancestor that has the metric."""
    if given:
        path = epath.Path(given)
        return path / "metrics.jsonl" if path.is_dir() else path
    with_it = (a.metrics for a in family if a.metrics.exists() and f'"{METRIC}"' in a.metrics.read_text("utf-8"))
    return next(with_it, None)
