"""A model directory as one GGUF file, which llama.cpp and what builds on it load."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.base.logging import logger
from jaxlm.hub import families, gguf_tokenizers, hugging_face
from jaxlm.hub.gguf import change_of, library, stored_names, transposed
from jaxlm.hub.gguf_fields import FACTORS, header_values, require_readable
from jaxlm.hub.hugging_face import Tensor
from jaxlm.train.model_directory import ModelDirectory

FILE_NAME = "model.gguf"
# llama.cpp's convention: vectors, norms, positions and routers stay in float32.
EXACT = ("_norm.weight", "position_embd.weight", "ffn_gate_inp.weight")


def write(
    directory: ModelDirectory,
    stored: Mapping[str, Any],
    model_type: str,
    output: epath.Path,
    dtype: str,
    quantized: bool,
) -> tuple[str, int]:
    """Writes OUTPUT/model.gguf with matrices in `dtype` (F32, F16, BF16), or `quantized` to Q8_0; returns
    (architecture, bytes). `stored`: our tensors, of which one is in memory at a time.

    Raises UserError for models that llama.cpp has not, with what stands against it.
    """
    gguf, config = library(), directory.config
    architecture, said = header_values(config, model_type, directory.context_tokens())
    said["general.architecture"] = architecture.name
    tensors = hugging_face.tensors_of(families.BY_TYPE[architecture.model_type], config)
    names = stored_names(architecture, tensors, config.layers)
    groups = [list(group) for _, group in itertools.groupby(_by_name(tensors, names), lambda t: names[t.name])]
    changes = {t.name: change_of(architecture, config, t.name, back=False) for t in tensors}
    shapes = {names[group[0].name]: _shape(group, changes) for group in groups}
    require_readable(said, shapes, config)
    factors = said.pop(FACTORS, None)
    said |= gguf_tokenizers.written(directory.tokenizer(), directory.chat_template(), config.vocab_size)
    types = {name: _type(name, shape, dtype, quantized) for name, shape in shapes.items()}
    if quantized and (others := [name for name, kind in types.items() if kind == "F16"]):
        logger.warning("%d matrices have rows of no multiple of 32 numbers: F16: %s", len(others), others[0])
    files.clear(output, ("manifest.json", FILE_NAME))
    writer = gguf.GGUFWriter(output / FILE_NAME, architecture.name)
    _add_header(writer, said, "Q8_0" if quantized else dtype)
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        plain = types[name] in ("F32", "F16")
        held = shape if plain else gguf.quants.quant_shape_to_byte_shape(shape, kind)
        held_type = np.dtype({"F32": np.float32, "F16": np.float16}.get(types[name], np.uint8))
        writer.add_tensor_info(name, held, held_type, math.prod(held) * held_type.itemsize, raw_dtype=kind)
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for group in groups:
        name = names[group[0].name]
        writer.write_tensor_data(_made(group, changes, stored, types[name], name))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    return architecture.name, (output / FILE_NAME).stat().length


def _by_name(tensors: list[Tensor], names: Mapping[str, str]) -> list[Tensor]:
    """The experts of a tensor behind each other, in their order."""
    first = {name: place for place, name in reversed(list(enumerate(names[t.name] for t in tensors)))}
    return sorted(tensors, key=lambda t: (first[names[t.name]], t.expert))


def _shape(group: list[Tensor], changes: Mapping[str, Any]) -> tuple[int, ...]:
    tensor = group[0]
    shape = tensor.shape[::-1] if changes[tensor.name] is transposed else tensor.shape
    return (len(group), *shape) if tensor.expert >= 0 else shape


def _type(name: str, shape: tuple[int, ...], dtype: str, quantized: bool) -> str:
    if len(shape) == 1 or name.endswith(EXACT):
        return "F32"
    if not quantized:
        return dtype
    return "Q8_0" if shape[-1] % 32 == 0 else "F16"


def _made(
    group: list[Tensor], changes: Mapping[str, Any], stored: Mapping[str, Any], kind: str, name: str
) -> np.ndarray:
    gguf, parts = library(), []
    for tensor in group:
        whole = hugging_face.join(tensor, [np.asarray(tensor.of(stored[part])) for part, _ in tensor.parts])
        whole = whole.astype(np.float32)
        change = changes[tensor.name]
        parts.append(np.ascontiguousarray(whole if change is None else change(whole)))
    array = np.stack(parts) if group[0].expert >= 0 else parts[0]
    with np.errstate(over="ignore"):
        made = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    if not np.isfinite(gguf.quants.dequantize(made, gguf.GGMLQuantizationType[kind])).all():
        raise UserError(f"dtype: {name} has numbers that {kind} has not; take bfloat16 or float32")
    return made


def _add_header(writer: Any, said: Mapping[str, Any], kind: str) -> None:
    file_types = library().LlamaFileType
    stored_as = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_file_type(file_types[stored_as[kind]])
    writer.add_quantization_version(library().GGML_QUANT_VERSION)
    for key, value in said.items():
        if key == "general.architecture":  # the writer has said it
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
