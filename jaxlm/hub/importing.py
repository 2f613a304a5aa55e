"""A Hugging Face directory or a GGUF file as a model directory on disk."""

import functools
import operator
import tempfile
import time
from typing import Any

from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.config import identity
from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger
from jaxlm.hub import generation, gguf, hugging_face, peft
from jaxlm.hub.config import ImportConfig
from jaxlm.hub.find import is_hugging_face
from jaxlm.hub.opened import hash_of
from jaxlm.hub.tokenizers import read_template
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.train import model_directory


def inputs(config: ImportConfig) -> dict[str, str]:
    """What the stage reads → a hash of each: here of all files at the top of the directory."""
    folder = epath.Path(config.source)
    if gguf.is_gguf(folder) and folder.is_file() and not config.adapter:
        return {config.source: hash_of(folder)}
    if not folder.is_dir() or not is_hugging_face(folder):
        raise UserError(
            f"source: {folder} is no Hugging Face directory: a folder with a model's config.json, or a "
            "file NAME.gguf (without an adapter), is needed"
        )
    read = {config.source: hash_of(config.source)}
    if config.adapter:
        held = [path for path in sorted(epath.Path(config.adapter).iterdir()) if path.is_file()]
        read[config.adapter] = files.hash_json({path.name: files.sha256(path) for path in held})
    return read


def import_model(config: ImportConfig) -> dict[str, Any]:
    """Writes WORKDIR/model, one tensor in memory at a time, and WORKDIR/manifest.json; returns
    {"seconds", "figure"}.

    facts["hugging_face"] keeps what `export` needs to give the same files back.
    """
    began = time.monotonic()
    files.clear(config.workdir, ("manifest.json",))
    made_with: Any = dict(inputs=inputs(config), config=identity(config))
    read = gguf.read if gguf.is_gguf(config.source) else hugging_face.read
    directory = read(config.source, "" if config.compute == "auto" else config.compute)
    template, shape = _template(config, directory), directory.config
    definition = define_model(shape)
    origin = {
        "model_type": directory.family.model_type,
        "dtype": directory.dtype,
        "other_dtypes": directory.other_dtypes,
        "pooling": directory.pooling(),
    }
    facts: dict[str, Any] = {"hugging_face": origin}
    if context := directory.context_tokens():
        facts["row_length"] = context
    with tempfile.TemporaryDirectory() as temporary, directory.opened(definition) as params:
        tokenizers.save(directory.tokenizer(), temporary)
        if config.adapter:
            adapter = peft.read(config.adapter, directory.family, shape)
            shape = adapter.shape(shape)
            definition = define_model(shape)
            params = _merged(params, definition, adapter)
        facts["parameters"] = definition.parameter_count()
        written = model_directory.write(
            f"{config.workdir}/model",
            params,
            shape,
            temporary,
            facts=facts,
            chat_template=template,
            others={generation.FILE_NAME: directory.generation().written()},
            **made_with,
        )
    assert written is not None  # one process
    figure = f"a {directory.family.model_type} model of {facts['parameters']:,} parameters"
    logger.info("%s: %s", config.source, figure)
    summary = {"seconds": round(time.monotonic() - began, 2), "figure": figure}
    contents = [f"model/{name}" for name in written.files]
    manifest.write(config.workdir, "run", contents=contents, facts=facts | {"summary": summary}, **made_with)
    return summary


def _merged(params: Params, definition: Definition, adapter: peft.Adapter) -> Params:
    """The definition's tree, a matrix with its adapter when numpy asks for it."""
    leaves: list[Any] = []
    params = params | (adapter.head.params() if adapter.head else {})
    for path, declared in definition:
        leaf: Any = functools.reduce(operator.getitem, path, params)
        names = [name for name, _ in model_directory.tensor_shapes(declared)]
        parts = leaf if isinstance(leaf, list) else [leaf]
        made = [adapter.merged(name, part) for name, part in zip(names, parts, strict=True)]
        leaves.append(made if isinstance(leaf, list) else made[0])
    return definition.filled(leaves)


def _template(config: ImportConfig, directory: hugging_face.HuggingFaceDirectory) -> ChatTemplate | None:
    if config.chat_template == "none":
        return None
    if config.chat_template:
        return chat.load(config.chat_template, directory.tokenizer())
    try:
        own = read_template(epath.Path(config.adapter), directory.tokenizer()) if config.adapter else None
        return own or directory.chat_template()
    except UserError as error:
        raise UserError(f"{error}; or import it with chat_template=none, or with another") from None
