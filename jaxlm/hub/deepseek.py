"""DeepSeek-V2's and V3's config.json: latent attention, experts in groups, YaRN with its sharper scores."""

import dataclasses
from typing import Any

from jaxlm.base.errors import UserError
from jaxlm.hub.fields import Made, Part, Reader
from jaxlm.hub.rope import rope
from jaxlm.model.config import ExpertsConfig, LatentConfig, ModelConfig

SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _whole(reader: Reader, key: str) -> int:
    """A size, which has to be there."""
    value = reader.take(key, int)
    if value is None or value < 1:
        raise UserError(f"{reader.where}: {key} is {value!r}; 1 or more is needed")
    return value


def _read_latent(reader: Reader, made: Made) -> dict[str, Any]:
    rank, own, turned, value = (_whole(reader, key) for key in SIZES)
    query_rank = 0 if reader.take("q_lora_rank", int) is None else _whole(reader, "q_lora_rank")
    for key in ("head_dim", "qk_head_dim"):  # transformers 5 writes both, and derives them from the others again
        reader.taken.add(key)
    latent = LatentConfig(kv_rank=rank, query_rank=query_rank, value_size=value)
    return {"latent": latent, "head_size": own + turned, "rope_size": turned}


def _write_latent(config: ModelConfig) -> dict[str, Any]:
    c, turned = config.latent, config.rope_size
    values = dict(zip(SIZES, (c.kv_rank, config.head_size - turned, turned, c.value_size), strict=True))
    return values | {"q_lora_rank": c.query_rank or None}


latent = Part(_read_latent, _write_latent)


def _experts(reader: Reader, made: Made, **kinds: Any) -> ExpertsConfig:
    found = ExpertsConfig(
        count=_whole(reader, "n_routed_experts"),
        chosen=_whole(reader, "num_experts_per_tok"),
        feed_forward=_whole(reader, "moe_intermediate_size"),
        shared=_whole(reader, "n_shared_experts"),
        first_dense=min(reader.take("first_k_dense_replace", int) or 0, made["layers"]),
        scale=float(reader.take("routed_scaling_factor", (int, float))),
        **kinds,
    )
    reader.expect("moe_layer_freq", 1)
    return found


def _groups(reader: Reader) -> dict[str, int]:
    return {"groups": reader.take("n_group", int) or 1, "chosen_groups": reader.take("topk_group", int) or 1}


def _read_v2(reader: Reader, made: Made) -> dict[str, Any]:
    method, groups = reader.take("topk_method", str), _groups(reader)
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(
            f"{reader.where}: topk_method {method!r} is not understood; greedy and group_limited_greedy are"
        )
    limited = groups if method == "group_limited_greedy" else {}
    reader.expect("scoring_func", "softmax")
    # transformers' class does not read it, and DeepSeek's own would leave routed_scaling_factor out where it is true.
    reader.expect("norm_topk_prob", False)
    return {"experts": _experts(reader, made, normalize=False, **limited)}


def _read_v3(reader: Reader, made: Made) -> dict[str, Any]:
    groups = _groups(reader)
    # A group is as good as its best two together; alone, all experts stand in it.
    kinds = groups | {"group_best": 2 if groups["groups"] > 1 else 1, "scores": "sigmoid", "choice_bias": True}
    reader.expect("scoring_func", "sigmoid")
    reader.expect("topk_method", "noaux_tc")
    return {"experts": _experts(reader, made, normalize=reader.take("norm_topk_prob", bool), **kinds)}


def _write(config: ModelConfig) -> dict[str, Any]:
    e = config.experts
    values = {"n_routed_experts": e.count, "num_experts_per_tok": e.chosen, "moe_intermediate_size": e.feed_forward}
    values |= {"n_shared_experts": e.shared, "first_k_dense_replace": e.first_dense, "moe_layer_freq": 1}
    values |= {"routed_scaling_factor": e.scale, "n_group": e.groups, "topk_group": e.chosen_groups}
    return values | {"norm_topk_prob": e.normalize}


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if config.experts.groups > 1 else "greedy"
    return _write(config) | {"topk_method": method, "scoring_func": "softmax"}


v2_experts = Part(_read_v2, _write_v2)
v3_experts = Part(_read_v3, lambda config: _write(config) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})


def _read_rope(reader: Reader, made: Made) -> dict[str, Any]:
    size = made["rope_size"]
    found = rope().read(reader, made) | {"rope_size": size}
    values = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    sharp = values.get("mscale_all_dim") or 0
    if found["rope_scaling"].kind == "yarn" and sharp:
        found["rope_scaling"] = dataclasses.replace(found["rope_scaling"], mscale_all_dim=float(sharp))
    return found


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    values, scaling = rope().write(config), config.rope_scaling
    if scaling.mscale_all_dim:
        written = values["rope_scaling"] | {"mscale_all_dim": scaling.mscale_all_dim}
        if scaling.attention_factor == 1:  # the usual case, in the words that all readers of theirs know
            written |= {"mscale": scaling.mscale_all_dim}
            del written["attention_factor"]
        values["rope_scaling"] = written
    return values


deepseek_rope = Part(_read_rope, _write_rope)
