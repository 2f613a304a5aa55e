"""Rotary positions in config.json: bases, scalings, the part of a head that is turned."""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.base.errors import UserError
from jaxlm.hub.fields import KINDS, NAMES, Made, Part, Reader
from jaxlm.model.config import ModelConfig, RopeScaling

REQUIRED = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
        "original_max_position_embeddings": "trained_positions",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "trained_positions",
        "beta_slow": "low_frequency",
        "beta_fast": "high_frequency",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
# What may be left out.
OPTIONAL = {"yarn": {"beta_slow": 1, "beta_fast": 32, "attention_factor": 0, "truncate": True}}
OPTIONAL["yarn"] |= {"mscale": 0, "mscale_all_dim": 0}


def scaling(values: Mapping[str, Any], where: str) -> RopeScaling:
    """The RopeScaling of a rope_scaling or rope_parameters object, its base and share apart."""
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in REQUIRED:
        raise UserError(f"{where}: the RoPE type {kind!r} is not understood; {', '.join(REQUIRED)} are")
    apart = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    given = OPTIONAL.get(kind, {}) | {
        key: value for key, value in values.items() if key not in apart and value is not None
    }
    if wrong := given.keys() ^ REQUIRED[kind].keys():
        state = "is missing" if min(wrong) in REQUIRED[kind] else "is not understood"
        raise UserError(f"{where}: the RoPE type {kind}: {min(wrong)} {state}")
    made: dict[str, Any] = {ours: given[theirs] for theirs, ours in REQUIRED[kind].items()}
    truncate = bool(made.pop("truncate", True))
    for name, value in made.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: the RoPE type {kind}: {name} is {value!r}, which is no number")
    made = {name: int(value) if name == "trained_positions" else float(value) for name, value in made.items()}
    up, down = made.pop("mscale", 0), made.pop("mscale_all_dim", 0)
    if up and down and not made["attention_factor"]:
        log = 0.1 * math.log(max(made["factor"], 1.0))
        made["attention_factor"] = (up * log + 1) / (down * log + 1)
    return RopeScaling(kind="none" if kind == "default" else kind, truncate=truncate, **made)  # type: ignore[arg-type]


def scaling_values(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
        values |= {"original_max_position_embeddings": scaling.trained_positions}
    if scaling.kind == "yarn":
        values |= {"beta_slow": scaling.low_frequency, "beta_fast": scaling.high_frequency}
        values |= {"original_max_position_embeddings": scaling.trained_positions, "truncate": scaling.truncate}
        values |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    return values


def rope(theta: str = "rope_theta", share: str = "") -> Part:
    """Base, scaling, and under the key `share` the part of a head that is turned; as versions 4 and 5 write them."""

    def read(reader: Reader, made: Made) -> dict[str, Any]:
        base, part = reader.take(theta, (int, float)), reader.take(share, (int, float)) if share else None
        old, new = reader.take("rope_scaling", dict), reader.take("rope_parameters", dict)
        values = old or new or {}
        base, part = values.get("rope_theta", base), values.get("partial_rotary_factor", part)
        if part not in (None, 1.0) and not share:
            raise UserError(f"{reader.where}: partial_rotary_factor is {part}; only 1 is understood here")
        head = made.get("head_size") or made["width"] // made["heads"]
        size = int(head * part) if part not in (None, 1.0) else 0
        return {"rope_base": float(base), "rope_size": size, "rope_scaling": scaling(values, reader.where)}

    def write(config: ModelConfig) -> dict[str, Any]:
        values = {theta: config.rope_base, "rope_scaling": scaling_values(config.rope_scaling)}
        return values | ({share: (config.rope_size or config.head_size) / config.head_size} if share else {})

    return Part(read, write)


# Its class takes "su" and "yarn" for names of LongRoPE, and knows no other scaling.
LONGROPE = ("longrope", "su", "yarn")
FACTORS = {"short_factors": "short_factor", "long_factors": "long_factor"}
PHI3_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor")
TRAINED = "original_max_position_embeddings"
PHI3_ROPE += ("short_factor", "long_factor", TRAINED)


def _read_phi3_rope(reader: Reader, made: Made) -> dict[str, Any]:
    """Its class takes the trained positions from beside the scaling, 4096 where they stand nowhere."""
    old, new = reader.take("rope_scaling", dict), reader.take("rope_parameters", dict)
    values = old or new or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", *LONGROPE):
        raise UserError(
            f"{reader.where}: the RoPE type {kind!r} is not understood in a phi3 model; default and longrope are"
        )
    if kind == "default":
        return partial_rope.read(reader, made)
    if unknown := values.keys() - set(PHI3_ROPE):
        raise UserError(f"{reader.where}: the RoPE type {kind}: {min(unknown)} is not understood")
    base, share = reader.take("rope_theta", (int, float)), reader.take("partial_rotary_factor", (int, float))
    base, share = values.get("rope_theta", base), values.get("partial_rotary_factor", share)
    longest, trained = (reader.take(key, int) for key in ("max_position_embeddings", TRAINED))
    if (said := values.get(TRAINED)) not in (None, trained):
        raise UserError(f"{reader.where}: {TRAINED} is {trained}, but {said} in the scaling")
    head = made["head_size"] or made["width"] // made["heads"]
    factors = {ours: values.get(theirs) for ours, theirs in FACTORS.items()}
    for name, found in factors.items():
        if not isinstance(found, list) or not all(_is_number(factor) for factor in found):
            raise UserError(
                f"{reader.where}: the RoPE type {kind}: {FACTORS[name]} is {found!r}; a list of numbers is needed"
            )
    numbers = {
        "factor": values.get("factor") or longest / max(trained, 1),
        "attention": values.get("attention_factor") or 0,
    }
    for name, found in numbers.items():
        if not _is_number(found):
            raise UserError(f"{reader.where}: the RoPE type {kind}: {name} is {found!r}, which is no number")
    sets: dict[str, Any] = {name: tuple(map(float, found or ())) for name, found in factors.items()}
    scaling = RopeScaling(
        kind="longrope",
        factor=float(numbers["factor"]),
        trained_positions=trained,
        attention_factor=float(numbers["attention"]),
        **sets,
    )
    size = int(head * share) if share not in (None, 1.0) else 0
    return {"rope_base": float(base), "rope_size": size, "rope_scaling": scaling}


def _write_phi3_rope(config: ModelConfig) -> dict[str, Any]:
    values, scaling = partial_rope.write(config), config.rope_scaling
    if scaling.kind != "longrope":
        return values
    written = {
        "rope_type": "longrope",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.trained_positions,
    }
    written |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    written |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    return values | {"rope_scaling": written, "original_max_position_embeddings": scaling.trained_positions}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


partial_rope = rope(share="partial_rotary_factor")
phi3_rope = Part(_read_phi3_rope, _write_phi3_rope)
neox_rope = rope("rotary_emb_base", "rotary_pct")


def _read_gemma3_rope(reader: Reader, made: Made) -> dict[str, Any]:
    base, local = reader.take("rope_theta", (int, float)), reader.take("rope_local_base_freq", (int, float))
    old, new = reader.take("rope_scaling", dict) or {}, reader.take("rope_parameters", dict) or {}
    if unknown := new.keys() - NAMES.values():
        raise UserError(f"{reader.where}: rope_parameters: {min(unknown)} is not understood; {', '.join(KINDS)} are")
    whole, near = (new.get("full_attention") or {}) | old, new.get("sliding_attention") or {}
    if scaling(near, reader.where).kind != "none":
        raise UserError(f"{reader.where}: rope_parameters: a scaling of sliding_attention is not understood")
    return {
        "rope_base": float(whole.get("rope_theta", base)),
        "rope_base_local": float(near.get("rope_theta", local)),
        "rope_scaling": scaling(whole, reader.where),
    }


gemma3_rope = Part(
    _read_gemma3_rope,
    lambda config: {
        "rope_theta": config.rope_base,
        "rope_local_base_freq": config.rope_base_local or config.rope_base,
        "rope_scaling": scaling_values(config.rope_scaling),
    },
)


# Without a scaling, its class takes one of its own.
gpt_oss_rope = Part(
    rope().read,
    lambda config: {
        "rope_theta": config.rope_base,
        "rope_scaling": scaling_values(config.rope_scaling) or {"rope_type": "default"},
    },
)
