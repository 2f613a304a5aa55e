"""A GGUF file, as llama.cpp has models, as a model of ours: dequantised, by the `gguf` package (the extra of its name).

    directory = read("models/SmolLM2-135M.Q4_K_M.gguf")

Its header becomes the config.json of the family that it holds (`gguf_fields.py`), its tensors get Hugging Face's names,
and from there on it is read as a directory of theirs. The file is mapped: a tensor is dequantised when it is asked for.
"""

import contextlib
import functools
import importlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base.errors import UserError
from jaxlm.hub import families, gguf_tokenizers
from jaxlm.hub.gguf_fields import FACTORS, Architecture, Header, architecture_of, config_values
from jaxlm.hub.hugging_face import HuggingFaceDirectory, Tensor, tensors_of
from jaxlm.model.config import ModelConfig
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer

SUFFIX = ".gguf"
PLAIN = ("F32", "F16", "BF16")
QUANTIZED = tuple("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())


def library() -> Any:
    """The gguf package. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(f"GGUF files need gguf: pip install -e '.[gguf]' ({error})") from error


class StoredTensor:
    """A tensor as safetensors' slice objects are: nothing is read before []. It comes in Hugging Face's order."""

    def __init__(self, stored: Any, change: Callable[[np.ndarray], np.ndarray] | None, expert: int = -1):
        self.stored, self.change, self.expert = stored, change, expert
        self.kind: str = stored.tensor_type.name

    def get_dtype(self) -> str:
        """Of what [] gives: quantised ones are float32 then. Others that are not understood, by their own name."""
        return "F32" if self.kind in QUANTIZED else self.kind

    def get_shape(self) -> list[int]:
        shape = [int(size) for size in reversed(self.stored.shape)][self.expert >= 0 :]
        # Only two-dimensional ones are turned.
        return shape[::-1] if self.change is transposed else shape

    def __getitem__(self, index: Any) -> np.ndarray:
        raw = self.stored.data if self.expert < 0 else self.stored.data[self.expert]
        index = index if isinstance(index, tuple) else (index,)
        if self.change is None and isinstance(index[0], slice) and raw.ndim > 1:
            raw, index = raw[index[0]], (slice(None), *index[1:])  # blocks lie within rows
        read = library().quants.dequantize(np.ascontiguousarray(raw), self.stored.tensor_type)
        return (read if self.change is None else self.change(read))[index]


def transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys of Hugging Face in llama.cpp's order: within a head 0, d/2, 1, d/2 + 1, …"""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def permuted_back(array: np.ndarray, heads: int) -> np.ndarray:
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def change_of(architecture: Architecture, config: ModelConfig, name: str, back: bool) -> Any:
    """What a tensor of Hugging Face's `name` undergoes on its way into a file, or `back`; None for nothing."""
    if architecture.permuted and ".q_proj." in name:
        return functools.partial(permuted_back if back else permuted, heads=config.heads)
    if architecture.permuted and ".k_proj." in name:
        return functools.partial(permuted_back if back else permuted, heads=config.kv_heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return lambda array: array - np.float32(1) if back else array + np.float32(1)
    return transposed if name.endswith(architecture.transposed) and architecture.transposed else None


def stored_names(architecture: Architecture, tensors: list[Tensor], layers: int) -> dict[str, str]:
    """Hugging Face's name of each tensor → llama.cpp's, one for all experts. Raises UserError where it has none."""
    gguf = library()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], layers)
    made = {}
    for tensor in tensors:
        name = tensor.name.replace(f".experts.{tensor.expert}.", ".experts.") if tensor.expert >= 0 else tensor.name
        made[tensor.name] = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if made[tensor.name] is None:
            raise UserError(f"llama.cpp's {architecture.name} models have no {tensor.name}")
    return made


class GgufFile(HuggingFaceDirectory):
    """A model in a GGUF file, of which the header is read and the weights are not."""

    described = "header"

    def __init__(self, path: epath.PathLike, compute: str = ""):
        self.folder = epath.Path(path)
        metadata, self.stored = _parsed(self.folder)
        self.header = Header(metadata, str(self.folder))
        shapes = {name: tuple(int(size) for size in reversed(t.shape)) for name, t in self.stored.items()}
        self.architecture = architecture_of(self.header)
        # Before anything is made layer by layer: a header may ask for a billion of them.
        if (self.header.take(f"{self.architecture.name}.block_count", int) or 0) > len(shapes):
            raise UserError(f"{path}: block_count is more than its {len(shapes)} tensors")
        factors = StoredTensor(self.stored[FACTORS], None)[:] if FACTORS in self.stored else None
        self.values = config_values(self.header, shapes, factors)
        self.values |= gguf_tokenizers.named_ids(self.header)
        self.family = families.BY_TYPE[self.architecture.model_type]
        self.config = self.family.read(self.values, str(self.folder))
        self._tokenizer = gguf_tokenizers.read(self.header, self.config.vocab_size)
        self._template = gguf_tokenizers.read_template(self.header, self._tokenizer)
        self.header.refuse_the_rest()
        with self._open() as opened:
            self._choose_types(opened, compute)

    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        return self._tokenizer

    def chat_template(self) -> ChatTemplate | None:
        return self._template

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """Hugging Face's name → what reads it; a tensor that has none keeps its own, and is refused by it."""
        tensors = tensors_of(self.family, self.config)
        names = stored_names(self.architecture, tensors, self.config.layers)
        missing = sorted({name for name in names.values() if name not in self.stored})
        left = self.stored.keys() - set(names.values()) - {FACTORS}
        if missing or left:
            problems = [*(f"missing: {name}" for name in missing), *(f"unknown: {name}" for name in sorted(left))]
            raise UserError(f"{self.folder}: its tensors do not fit its header:\n  " + "\n  ".join(problems[:20]))
        opened = {}
        for tensor in tensors:
            change = change_of(self.architecture, self.config, tensor.name, back=True)
            opened[tensor.name] = StoredTensor(self.stored[names[tensor.name]], change, tensor.expert)
            held = len(self.stored[names[tensor.name]].shape)
            if held != len(tensor.shape) + (tensor.expert >= 0):
                raise UserError(f"{self.folder}: {names[tensor.name]} has {held} dimensions")
            if tensor.expert >= 0 and int(self.stored[names[tensor.name]].shape[-1]) != self.config.experts.count:
                raise UserError(f"{self.folder}: {names[tensor.name]} is not of {self.config.experts.count} experts")
        yield opened


def _parsed(path: epath.Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(metadata, tensors) of a file. Raises UserError where it is none, or cut off, by what was wrong in it.

    The library's reader maps the file and takes slices of it, so that a size that the file has not is an error of
    indexing or of a shape before anything is allocated.
    """
    gguf = library()
    try:
        with path.open("rb") as file:
            magic, version = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if magic != b"GGUF" or version not in (2, 3):
            raise UserError(f"{path}: is no GGUF file of version 2 or 3")
        with np.errstate(over="raise"):
            reader = gguf.GGUFReader(path)
        metadata = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    except UserError:
        raise
    except Exception as error:  # whatever its parsing runs into: ValueError, IndexError, KeyError, RecursionError, …
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is not a sound GGUF file, damaged or cut off ({said[:200]})") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def read(path: epath.PathLike, compute: str = "") -> GgufFile:
    """Opens a GGUF file; `compute` as `hugging_face.read` has it, where quantised tensors count as float32.

    Raises UserError for whatever is not understood, by its key or its tensor.
    """
    return GgufFile(path, compute)


def is_gguf(path: epath.PathLike) -> bool:
    return epath.Path(path).suffix == SUFFIX
