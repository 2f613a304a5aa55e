"""What a token costs: the parameters that it meets, and the FLOPs of training on it."""

import dataclasses
import math

from jaxlm.model import lora
from jaxlm.model.config import AdaptedConfig, ModelConfig
from jaxlm.model.transformer import define_model


def active_parameters(config: ModelConfig) -> int:
    """The parameters that a token meets: all but those of experts that it has not chosen."""
    e, weights = config.experts, [w for _, w in define_model(config)]
    return sum(math.prod(w.shape) * e.chosen // e.count if "experts" in w.axes else math.prod(w.shape) for w in weights)


def flops_per_token(config: ModelConfig, sequence: int) -> float:
    """Model FLOPs of training on one token: 6 per weight of a matrix product (4 where it is frozen under adapters,
    whose own are not counted; of experts, the chosen ones), and 6 per number of a key and a value seen by a head.

    The embedding lookup is free; a causal query sees (sequence + 1) / 2 keys on average (arXiv:2204.02311, appendix B,
    counts all S keys; we count those that are seen), an encoder's all.
    """
    if isinstance(config, AdaptedConfig):  # codes are no matrices
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base="compute"))
    D, N = config.width, config.head_size
    M = config.latent.value_size if config.latent.kv_rank else N
    e, sparse = config.experts, sum(config.has_experts(layer) for layer in range(config.layers))
    attention = [w for _, w in define_model(config) if w.matrix and w.name.startswith("layers/attention/")]
    weights = sum(math.prod(w.shape) for w in attention if not lora.is_adapter(w))
    weights += (config.layers - sparse) * (2 + config.gated_mlp) * D * config.feed_forward
    weights += sparse * D * (3 * (e.chosen + e.shared) * e.feed_forward + e.count)
    weights += D * (len(config.criteria) or config.vocab_size) + (config.head == "transform") * D * D
    seen = 0.0 if config.causal else float(config.layers * sequence)
    for layer in range(config.layers if config.causal else 0):
        reach = min(config.window, sequence) if config.kind(layer).startswith("local") else sequence
        seen += (reach + 1) / 2 if reach == sequence else reach - reach * (reach - 1) / (2 * sequence)
    return (4 if isinstance(config, AdaptedConfig) else 6) * weights + 6 * config.heads * (N + M) * seen
