"""Mixtures of experts in config.json: the parts that only they have."""

from typing import Any

from jaxlm.base.errors import UserError
from jaxlm.hub.fields import Made, Part, Reader
from jaxlm.model.config import ExpertsConfig, ModelConfig


def _counts(reader: Reader) -> dict[str, Any]:
    """transformers 5 writes num_local_experts for all, others num_experts too."""
    found = {key: reader.take(key, int) for key in ("num_local_experts", "num_experts")}
    given = {value for value in found.values() if value is not None}
    if len(given) != 1:
        raise UserError(f"{reader.where}: num_experts {'is missing' if not given else 'and num_local_experts differ'}")
    counts: dict[str, Any] = {"count": given.pop(), "chosen": reader.take("num_experts_per_tok", int)}
    if counts["count"] < 1:
        raise UserError(f"{reader.where}: num_experts is {counts['count']}; 1 or more is needed")
    return counts


def _read_all(reader: Reader, made: Made) -> dict[str, Any]:
    return {"experts": ExpertsConfig(**_counts(reader))}


def _write_all(config: ModelConfig) -> dict[str, Any]:
    e = config.experts
    return {"num_local_experts": e.count, "num_experts_per_tok": e.chosen, "intermediate_size": e.feed_forward}


every_layer = Part(_read_all, _write_all)
"""Mixtral's and GPT-OSS's: experts in each layer, the chosen ones' weights from a softmax over them."""


def _read_qwen(reader: Reader, made: Made) -> dict[str, Any]:
    step, dense = reader.take("decoder_sparse_step", int), reader.take("mlp_only_layers", list) or []
    if step < 1:
        raise UserError(f"{reader.where}: decoder_sparse_step is {step}; 1 or more is needed")
    sparse = lambda layer: layer not in dense and (layer + 1) % step == 0
    layers = made["layers"]
    first = next((layer for layer in range(layers) if sparse(layer)), layers)
    if any(sparse(layer) != ((layer + 1) % step == 0) for layer in range(first, layers)):
        raise UserError(f"{reader.where}: mlp_only_layers is {dense}; only the first layers are understood here")
    # The least number of first layers that says so.
    while first and first % step:
        first -= 1
    experts = ExpertsConfig(
        **_counts(reader),
        feed_forward=reader.take("moe_intermediate_size", int),
        normalize=reader.take("norm_topk_prob", bool),
        first_dense=first,
        every=step,
    )
    uses, window = reader.take("use_sliding_window", bool), reader.take("sliding_window", int)
    reader.take("max_window_layers")  # stands there, and is not read
    window = window if uses else None
    return {"experts": experts, "pattern": ("local",) if window else ("global",), "window": window or 0}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    e = config.experts
    values = {"num_experts": e.count, "num_experts_per_tok": e.chosen, "moe_intermediate_size": e.feed_forward}
    values |= {"norm_topk_prob": e.normalize, "decoder_sparse_step": e.every}
    values |= {"mlp_only_layers": list(range(e.first_dense))}
    return values | {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}


qwen_moe = Part(_read_qwen, _write_qwen)
