"""A model wherever it comes from: ours, a Hugging Face directory, or a GGUF file."""

from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.errors import UserError
from jaxlm.hub import gguf, hugging_face
from jaxlm.hub.find import find_model, is_hugging_face
from jaxlm.hub.hugging_face import HuggingFaceDirectory
from jaxlm.train import model_directory
from jaxlm.train.model_directory import ModelDirectory


def open_model(
    path: epath.PathLike, field: str = "", *, verify: bool = True, encoders: bool = False
) -> ModelDirectory | HuggingFaceDirectory:
    """The model at a path (what `find_model` takes, and others' formats); the weights are not read yet.

    `verify=False` skips the sha256 of ours. Raises UserError, with the config's `field` in it, where there is none, and
    for encoders that were not asked for.
    """
    if gguf.is_gguf(path):
        return gguf.read(path)
    if is_hugging_face(epath.Path(path)):
        found = hugging_face.read(path)
        if not (found.config.causal or encoders):
            raise UserError(f"{field or 'model'}: {path} is an encoder, which only jaxlm.load, import and export take")
        return found
    return model_directory.read(find_model(path, field), verify=verify, encoders=encoders)


def hash_of(path: epath.PathLike, field: str = "") -> str:
    """Of its content: the manifest's where it is ours, else of its file or of all files at the top of the directory."""
    folder = epath.Path(path)
    if gguf.is_gguf(folder):
        if not folder.is_file():
            raise UserError(f"{field}: {folder} is no file")
        return files.sha256(folder)
    if is_hugging_face(folder):
        return files.hash_json({each.name: files.sha256(each) for each in sorted(folder.iterdir()) if each.is_file()})
    return manifest.read(find_model(path, field)).hash
