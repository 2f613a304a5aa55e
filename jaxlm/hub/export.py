"""A model directory as a Hugging Face directory, which `from_pretrained` loads with nothing missing or left over; or as
a GGUF file."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxlm.base import files, manifest
from jaxlm.base.config import identity
from jaxlm.base.errors import Refused, UserError, nearest
from jaxlm.base.logging import logger
from jaxlm.hub import families, generation, gguf_export, hugging_face
from jaxlm.hub import tokenizers as tokenizer_files
from jaxlm.hub.config import ExportConfig
from jaxlm.hub.find import find_model
from jaxlm.hub.hugging_face import TYPES, Tensor
from jaxlm.train import model_directory, tensor_files
from jaxlm.train.model_directory import ModelDirectory

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 2**30


def inputs(config: ExportConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    found = find_model(config.model, "model")
    return {str(found): manifest.read(found).hash}


def export(config: ExportConfig) -> dict[str, Any]:
    """Writes the directory, and with a workdir WORKDIR/manifest.json; returns {"seconds", "figure"}.

    Raises Refused for a model without a passing verdict of the gate, unless the config says that it may go without, and
    UserError for one that no family of theirs has, with what stands against each.
    """
    began = time.monotonic()
    read_from = inputs(config)
    directory = model_directory.read(find_model(config.model, "model"), field="model", encoders=True)
    if not config.without_verdict:
        require_verdict(directory)
    output = epath.Path(config.output or f"{config.workdir}/{config.format}")
    if output.exists() and any(output.iterdir()) and not _is_ours(output, config.format):
        raise UserError(f"output: {output} holds something else; give a new or an empty folder")
    origin = directory.manifest.facts.get("hugging_face") or {}
    if config.family and config.family not in families.BY_TYPE:
        raise UserError(f"family: no family is called {config.family!r}{nearest(config.family, families.BY_TYPE)}")
    made = (_write_gguf if config.format == "gguf" else _write_hugging_face)(directory, config, origin, output)
    contents = [name for name in files.walk(output) if name != "manifest.json"]
    figure = f"a {made['family']} model, {made['bytes'] / 1e6:,.1f} MB of {made['dtype']}"
    logger.info("%s: %s", output, figure)
    summary = {"seconds": round(time.monotonic() - began, 2), "figure": figure}
    made_with: Any = dict(inputs=read_from, config=identity(config), facts=made | {"summary": summary})
    manifest.write(output, config.format, contents=contents, **made_with)
    if config.workdir:
        manifest.write(config.workdir, "export", contents=[] if config.output else [config.format], **made_with)
    return summary


def _dtype(config: ExportConfig, origin: Mapping[str, Any]) -> str:
    return origin.get("dtype", "F32") if config.dtype == "auto" else DTYPES[config.dtype]


def _write_hugging_face(
    directory: ModelDirectory, config: ExportConfig, origin: Mapping[str, Any], output: epath.Path
) -> dict[str, Any]:
    """The directory's files; returns {"family", "dtype", "bytes"}."""
    family, values = families.find(directory.config, config.family or origin.get("model_type", ""))
    if family.model_type == "qwen2" and "qwen2" not in (origin.get("model_type"), config.family):
        raise UserError(
            "family: only qwen2 models are as this one, and transformers 5 cuts text in Qwen2's way for them, whatever "
            "tokenizer they come with; set family=qwen2 to export it all the same"
        )
    dtype = _dtype(config, origin)
    types = _types(origin if config.dtype == "auto" else {}, dtype)
    tensors = hugging_face.tensors_of(family, directory.config)
    files.clear(output, ("manifest.json", "*.safetensors", hugging_face.INDEX))
    _write_config(directory, values, dtype, output)
    _write_tensors(directory, tensors, types, output)
    size = sum(math.prod(t.shape) * TYPES[types(t.name)].itemsize for t in tensors)
    return {"family": family.model_type, "dtype": dtype, "bytes": size}


def _write_gguf(
    directory: ModelDirectory, config: ExportConfig, origin: Mapping[str, Any], output: epath.Path
) -> dict[str, Any]:
    """OUTPUT/model.gguf; returns {"family", "dtype", "bytes"}."""
    dtype, quantized = _dtype(config, origin), config.quantization == "q8_0"
    with contextlib.ExitStack() as opened:
        stored = directory.open_tensors(opened)
        kind = config.family or origin.get("model_type", "")
        name, size = gguf_export.write(directory, stored, kind, output, dtype, quantized)
    return {"family": name, "dtype": "Q8_0" if quantized else dtype, "bytes": size}


def require_verdict(directory: ModelDirectory) -> None:
    """Refuses a model that the gate has not passed."""
    verdict = directory.manifest.facts.get("gate")
    if isinstance(verdict, Mapping) and verdict.get("passed") is True:
        return
    reasons = verdict.get("reasons", ()) if isinstance(verdict, Mapping) else ()
    state = "was refused by the gate" if verdict else "has no verdict of the gate"
    raise Refused(
        f"model: {directory.folder} {state}; evaluate it with a gate (default, or a file of thresholds), or export "
        "it with --without_verdict=true" + "".join(f"\n  {reason}" for reason in reasons)
    )


def _is_ours(output: epath.Path, kind: str) -> bool:
    return (output / "manifest.json").exists() and manifest.read(output).kind == kind


def _types(origin: Mapping[str, Any], dtype: str) -> Any:
    """Name of a tensor → its type: that which it was imported as, else `dtype`."""
    others = {name: kind for kind, names in (origin.get("other_dtypes") or {}).items() for name in names}
    return lambda name: others.get(name, dtype)


def _write_config(directory: ModelDirectory, values: dict[str, Any], dtype: str, output: epath.Path) -> None:
    """config.json, generation_config.json, tokenizer and chat template."""
    tokenizer, template = directory.tokenizer(), directory.chat_template()
    context = directory.context_tokens()
    stored = generation.Generation.read(directory.folder, {})
    stops = (tokenizer.eos_id, *(template.stop_ids if template else ()), *stored.eos_ids)
    ends = list(dict.fromkeys(stops))
    ids: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_id}
    ids["bos_token_id"] = tokenizer.bos_id
    names = {kind: name for name, kind in DTYPES.items()}
    extra: dict[str, Any] = {"torch_dtype": names[dtype], "use_cache": True}
    if context and not {"n_positions", "max_position_embeddings"} & values.keys():
        extra["max_position_embeddings"] = context
    if directory.config.criteria:
        # Their class adds nothing to the score: this is kept for reading the model back, and ignored by others.
        bias = _read(directory, ["score_bias"])[0]
        extra |= {"score_bias": bias.tolist()} if bias.any() else {}
    files.write_json(output / "config.json", values | ids | extra)
    if not directory.config.criteria and directory.config.causal:
        files.write_json(output / generation.FILE_NAME, dict(stored.values) | ids)
    tokenizer_files.write(tokenizer, template, output, context, encoder=not directory.config.causal)


def _read(directory: ModelDirectory, names: list[str]) -> list[np.ndarray]:
    with contextlib.ExitStack() as opened:
        stored = directory.open_tensors(opened)
        return [stored[name][:] for name in names]


def _write_tensors(directory: ModelDirectory, tensors: list[Tensor], types: Any, output: epath.Path) -> None:
    """The safetensors, one file or several with an index; one tensor is in memory at a time."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * TYPES[types(tensor.name)].itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    weight_map: dict[str, str] = {}
    total = 0
    with contextlib.ExitStack() as opened:
        stored = directory.open_tensors(opened)
        for number, shard in enumerate(shards, 1):
            several = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = several if len(shards) > 1 else hugging_face.WHOLE
            shard = sorted(shard, key=lambda tensor: -TYPES[types(tensor.name)].itemsize)
            shapes = {tensor.name: (TYPES[types(tensor.name)], tensor.shape) for tensor in shard}
            tensor_files.write(output / name, shapes, _made(shard, stored, types), "pt")
            weight_map |= dict.fromkeys(shapes, name)
            total += sum(kind.itemsize * math.prod(shape) for kind, shape in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(output / hugging_face.INDEX, index)


def _made(tensors: list[Tensor], stored: Mapping[str, Any], types: Any) -> Iterator[np.ndarray]:
    for tensor in tensors:
        whole = hugging_face.join(tensor, [tensor.of(stored[name]) for name, _ in tensor.parts])
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(whole.astype(TYPES[types(tensor.name)]))
        if not np.isfinite(made.astype(np.float32)).all():
            raise UserError(
                f"dtype: {tensor.name} has numbers that {types(tensor.name)} has not; take bfloat16 or float32"
            )
        yield made
