"""The model directory: what every later stage takes, and any tool can read.

    model/config.json                             the ModelConfig
          params/model-00001.safetensors, ...     one tensor a weight and layer: embedding, layers.7.attention.query
          params/model.safetensors.index.json     which tensor lies in which file
          tokenizer.model | byte_tokenizer.json
          chat_template.jinja                     of a model that was trained on chats
          generation_config.json                  of an imported model: stop tokens, sampling defaults
          manifest.json                           a sha256 of each, written last

The layout of the layers in memory (stacked for the scan or unrolled) is no part of it: either one reads what the other
wrote. Tensors are float32, whatever type the reader asks for.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import operator
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.config import from_dict, to_dict
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.base.manifest import Manifest
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Definition, Params, Weight
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.train import tensor_files

KIND = "model"
FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """A model on disk whose files are those that were written; the parameters are still there, not here."""

    folder: epath.Path
    config: ModelConfig
    manifest: Manifest

    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(self.folder)

    def chat_template(self) -> ChatTemplate | None:
        """None for a model that was not trained on chats."""
        path = self.folder / chat.FILE_NAME
        return chat.load(path, self.tokenizer()) if path.exists() else None

    def template_or(self, chosen: str) -> ChatTemplate:
        """The `chosen` chat template (what `chat.load` takes); where that is empty the model's own, else ChatML."""
        own = None if chosen else self.chat_template()
        return own or chat.load(chosen or "chatml", self.tokenizer())

    def row_length_or(self, chosen: int) -> int:
        """The `chosen` row length; where that is 0, that of the rows on which the model was trained."""
        found = chosen or self.manifest.facts.get("row_length", 0)
        if not found:
            raise ConfigError("row_length", f"is 0, and {self.folder} does not say on what rows it was trained")
        return found

    def context_tokens(self) -> int:
        """Length of the rows it was trained on; 0 where the manifest does not say."""
        return self.manifest.facts.get("row_length", 0)

    def load_params(self, definition: Definition, shardings: Any = None, *, part: Definition | None = None) -> Params:
        """The parameters in the definition's layout and types, read tensor by tensor.

        With `shardings` (a tree like the parameters: `definition.shardings(mesh)`), every device gets its own part
        and no host reads more than its devices hold. Raises UserError with the list of tensors that are missing,
        unknown, of another shape or not float32. `part`: of these weights alone; the definition still has all.
        """
        with contextlib.ExitStack() as opened:
            tensors = self.open_tensors(opened)
            self._compare(definition, tensors)
            return build(part or definition, tensors, shardings)

    def open_tensors(self, opened: contextlib.ExitStack) -> dict[str, Any]:
        """Tensor name → what gives slices of it: shape and type are known, nothing is read."""
        folder = self.folder / "params"
        if "://" in str(folder):  # files are mapped into memory, which takes local ones
            local = epath.Path(opened.enter_context(tempfile.TemporaryDirectory()))
            for name in files.walk(folder):
                (folder / name).copy(local / name)
            folder = local
        index = files.read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise UserError(f"{self.folder}/params/{INDEX}: has no weight_map; was it edited?")
        tensors = {}
        for file in sorted(set(map(str, weight_map.values()))):
            if f"params/{file}" not in self.manifest.files:
                raise UserError(f"{self.folder}/params/{INDEX}: names {file!r}, which the manifest does not list")
            try:
                tensors |= tensor_files.read(folder / file)
            except safetensors.SafetensorError as error:
                raise UserError(f"{self.folder}/params/{file}: is not a sound safetensors file: {error}") from None
        return tensors

    def _compare(self, definition: Definition, tensors: Mapping[str, Any]) -> None:
        expected = {name: shape for _, declared in definition for name, shape in tensor_shapes(declared)}
        problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
        problems += [f"unknown: {name} {tensors[name].get_shape()}" for name in tensors if name not in expected]
        for name in tensors.keys() & expected.keys():
            shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
            if (shape, kind) != (expected[name], "F32"):
                problems.append(f"{name}: is {kind}{list(shape)}, but F32{list(expected[name])} is needed")
        if problems:
            raise UserError(
                f"{self.folder}: its tensors do not fit its config.json:\n  " + "\n  ".join(sorted(problems))
            )


def write(
    folder: epath.PathLike,
    params: Params,
    model_config: ModelConfig,
    tokenizer_folder: epath.PathLike,
    *,
    inputs: Mapping[str, str],
    config: Any,
    facts: Mapping[str, Any],
    chat_template: ChatTemplate | None = None,
    others: Mapping[str, Any] | None = None,
) -> Manifest | None:
    """Writes a model directory, shard by shard; in a run of many processes, all call it and process 0 writes.

    `params` are float32 in either layout, sharded or not; Refused is raised when they are not finite. `inputs`,
    `config` and `facts` go to the manifest; `facts["row_length"]` tells later stages on how long rows the model was
    trained. `others`: further JSON files, by name. Returns the manifest (None on the other processes). A rewritten
    directory counts as unfinished until its manifest is there.
    """
    folder = epath.Path(folder)
    definition = define_model(model_config)
    tokenizer = tokenizers.load(tokenizer_folder)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{tokenizer_folder}: has {tokenizer.vocab_size} tokens, the model only {model_config.vocab_size}"
        )
    writes = jax.process_index() == 0
    if writes:
        (folder / "manifest.json").unlink(missing_ok=True)
        if (folder / "params").exists():
            (folder / "params").rmtree()
        files.write_json(folder / "config.json", {"format_version": FORMAT_VERSION} | to_dict(model_config))
        tokenizers.save(tokenizer, folder)
        if chat_template is not None:
            files.write_bytes(folder / chat.FILE_NAME, chat_template.source.encode())
        for name, values in (others or {}).items():
            files.write_json(folder / name, values)
    weight_map = {}
    for number, names in enumerate(_shards(definition), 1):
        file = f"model-{number:05}.safetensors"
        shapes = dict(sorted(x for _, declared in definition for x in tensor_shapes(declared) if x[0] in names))
        arrays = _finite(folder, host_tensors(definition, params, names))
        if writes:
            kinds = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
            tensor_files.write(folder / "params" / file, kinds, arrays, "np")
        else:
            collections.deque(arrays, maxlen=0)  # what is sharded over processes is gathered by all
        weight_map |= dict.fromkeys(shapes, file)
    if not writes:
        return None
    size = 4 * definition.parameter_count()
    files.write_json(folder / "params" / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    contents = [name for name in files.walk(folder) if name != "manifest.json"]
    return manifest.write(folder, KIND, contents=contents, inputs=inputs, config=config, facts=facts)


def _finite(folder: epath.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[np.ndarray]:
    for name, value in tensors:
        # A NaN is its array's least and greatest; a mask of all numbers would take a quarter of its memory.
        if not (np.isfinite(value.min(initial=0)) and np.isfinite(value.max(initial=0))):
            raise Refused(f"{folder}: is not written; not finite: {name}")
        yield value
        del value


def read(folder: epath.PathLike, *, verify: bool = True, field: str = "", encoders: bool = False) -> ModelDirectory:
    """Opens a model directory; refuses one that is unfinished, newer, or (unless told not to look) changed.

    `verify=False` skips the sha256 of the files, about a second a GB. `field` names the config's field in errors.
    `encoders`: one that is not causal is welcome too; it would train and speak as if it knew what comes next.
    """
    folder = epath.Path(folder)
    found = manifest.read(folder, KIND, field)
    if verify:
        manifest.verify(folder, found)
    values = files.read_json(folder / "config.json")
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder}/config.json: has format_version {version}, this jaxlm reads {FORMAT_VERSION}")
    config = from_dict(ModelConfig, values, f"{folder}/config.json")
    if not (config.causal or encoders):
        raise UserError(f"{field or 'model'}: {folder} is an encoder, which only jaxlm.load and export take")
    return ModelDirectory(folder=folder, config=config, manifest=found)


def tensor_shapes(declared: Weight) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the tensors that hold a weight: one for each of its layers.

    >>> tensor_shapes(...)  # a stacked query of 2 layers
    [('layers.0.attention.query', (64, 64)), ('layers.1.attention.query', (64, 64))]
    """
    first, *rest = declared.name.split("/")
    if not declared.layers:
        return [(".".join([first, *rest]), declared.shape)]
    shape = declared.shape[1:] if _stacked(declared) else declared.shape
    return [(".".join([first, str(layer), *rest]), shape) for layer in declared.layers]


def _stacked(declared: Weight) -> bool:
    return declared.axes[0] == "layers"


def _shards(definition: Definition) -> list[set[str]]:
    """The names of the tensors of each file, filled up to SHARD_BYTES."""
    shards: list[set[str]] = [set()]
    filled = 0
    for _, declared in definition:
        for name, shape in tensor_shapes(declared):
            size = 4 * math.prod(shape)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append(set())
                filled = 0
            shards[-1].add(name)
            filled += size
    return shards


def host_tensors(
    definition: Definition, params: Params, names: set[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor on the host) of the named tensors or of all, one at a time, in the names' order."""
    places = {
        name: (path, row if _stacked(declared) else None)
        for path, declared in definition
        for row, (name, _) in enumerate(tensor_shapes(declared))
        if names is None or name in names
    }
    for name, (path, row) in sorted(places.items()):
        leaf: Any = functools.reduce(operator.getitem, path, params)
        yield name, _fetch(leaf if row is None else leaf[row])


def _fetch(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def build(definition: Definition, tensors: Mapping[str, Any], shardings: Any) -> Params:
    """The parameter tree, each leaf made from the slices that its devices need."""
    params: Params = {}
    for path, declared in definition:
        names = [name for name, _ in tensor_shapes(declared)]

        def part(index: Any, declared: Weight = declared, names: list[str] = names) -> np.ndarray:
            if not _stacked(declared):
                return tensors[names[0]][index].astype(declared.dtype)
            return np.stack([tensors[name][index[1:]].astype(declared.dtype) for name in names[index[0]]])

        node, placed = params, shardings
        for step in path[:-1]:
            node = node.setdefault(step, {})
            placed = placed and placed[step]
        if placed is None:
            node[path[-1]] = jax.device_put(part((slice(None),) * len(declared.shape)))
        else:
            node[path[-1]] = jax.make_array_from_callback(declared.shape, placed[path[-1]], part)
    return params
