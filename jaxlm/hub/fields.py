"""config.json ↔ ModelConfig, part by part: each part reads some of the keys, and writes them back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.base.errors import UserError
from jaxlm.model.config import ModelConfig

# What changes nothing of the mathematics: names and versions, training's dropout and initialisation, generation,
# the classes' heads for other tasks, caches. The tokens named here are read with the tokenizer.
INERT = frozenset(
    """
    _name_or_path transformers_version transformers.js_config torch_dtype dtype auto_map tokenizer_class is_llama_config
    use_cache cache_implementation _attn_implementation attn_implementation gradient_checkpointing torchscript
    use_flash_attn output_attentions output_hidden_states return_dict chunk_size_feed_forward tie_encoder_decoder
    initializer_range initializer_factor
    attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop
    hidden_dropout_prob attention_probs_dropout_prob
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    max_position_embeddings n_positions n_ctx original_max_position_embeddings pretraining_tp reorder_and_upcast_attn
    task_specific_params finetuning_task problem_type id2label label2id num_labels is_decoder prefix
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty max_length min_length num_beams
    num_return_sequences early_stopping no_repeat_ngram_size bad_words_ids suppress_tokens output_scores
    score_bias
    output_router_logits router_aux_loss_coef router_jitter_noise experts_per_token initial_context_length
    ep_size aux_loss_alpha seq_aux
    """.split()
)
# What config.json may leave out, and what it stands for then; a family's own come before these.
DEFAULTS: dict[str, Any] = {
    "architectures": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "rope_local_base_freq": 10_000.0,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
    "max_window_layers": 28,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": None,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "id2label": None,
    "num_experts": None,
    "num_local_experts": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu": "gelu_exact"}
KINDS = {"full_attention": "global", "sliding_attention": "local"}
NAMES = {kind: name for name, kind in KINDS.items()}

Made = Mapping[str, Any]
"""Our fields that were read so far."""


class Part(NamedTuple):
    read: Callable[["Reader", Made], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


class Reader:
    """A config.json of which every key has to be taken by somebody."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.values, self.defaults, self.where = values, DEFAULTS | dict(defaults), where
        self.taken = {"model_type"}

    def take(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value of a key or its default. Raises UserError where there is neither, or one of another type."""
        self.taken.add(key)
        if key not in self.values and key not in self.defaults:
            raise UserError(f"{self.where}: {key} is missing")
        value = self.values.get(key, self.defaults.get(key))
        is_number = isinstance(value, kind) and (bool in _types(kind) or not isinstance(value, bool))
        if value is not None and kind is not object and not is_number:
            raise UserError(
                f"{self.where}: {key} is {value!r}, which is no {' or '.join(t.__name__ for t in _types(kind))}"
            )
        return value

    def expect(self, key: str, value: Any) -> None:
        """Refuses a value other than this one; null and a missing key are fine."""
        self.taken.add(key)
        found = self.values.get(key)
        if found is not None and found != value:
            raise UserError(f"{self.where}: {key} is {found!r}; only {value!r} is understood here")

    def refuse_the_rest(self, family: str) -> None:
        if quantized := self.values.get("quantization_config"):
            method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
            raise UserError(
                f"{self.where}: quantization_config not understood: weights in {method} are not read; load the model "
                "with transformers, dequantized, and save it in bfloat16"
            )
        unknown = [key for key, value in self.values.items() if value is not None and key not in self.taken | INERT]
        for key in ("is_encoder_decoder", "pruned_heads"):  # of every class; nothing in them is the normal case
            if key in unknown and not self.values[key]:
                unknown.remove(key)
        if unknown:
            raise UserError(
                f"{self.where}: {', '.join(sorted(unknown))} not understood in a {family} model, and perhaps part of "
                "what it computes"
            )


def _types(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def renamed(**names: str) -> Part:
    """Their key = our field of the same meaning."""
    types = {f.name: type(f.default) for f in dataclasses.fields(ModelConfig)}

    def read(reader: Reader, made: Made) -> dict[str, Any]:
        found = {}
        for theirs, ours in names.items():
            kind = types[ours]
            value = reader.take(theirs, (int, float) if kind is float else kind)
            # Null stands for what follows from other fields, as 0 does here.
            found[ours] = kind(0) if value is None else kind(value)
            if kind is int and (value is not None or theirs not in reader.defaults) and found[ours] < 1:
                raise UserError(f"{reader.where}: {theirs} is {value!r}; 1 or more is needed")
        if "n_inner" in names:
            found["feed_forward"] = found["feed_forward"] or 4 * found["width"]
        return found

    return Part(read, lambda config: {theirs: getattr(config, ours) for theirs, ours in names.items()})


def activation(key: str, others: Mapping[str, str] | None = None) -> Part:
    """`others`: names that stand for something else in the family."""
    known = ACTIVATIONS | dict(others or {})

    def read(reader: Reader, made: Made) -> dict[str, Any]:
        name = reader.take(key, str)
        if name not in known:
            raise UserError(f"{reader.where}: {key} {name!r} is not understood; {', '.join(known)} are")
        return {"activation": known[name]}

    names = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"}
    return Part(read, lambda config: {key: names[config.activation]})


def biases(always: Sequence[str] = (), **by_key: Sequence[str]) -> Part:
    """Key → the biases that it turns on."""

    def read(reader: Reader, made: Made) -> dict[str, Any]:
        found = [name for key, names in by_key.items() if reader.take(key, bool) for name in names]
        return {"biases": tuple(name for name in ("qkv", "output", "mlp", "router") if name in (*found, *always))}

    return Part(read, lambda config: {key: set(names) <= set(config.biases) for key, names in by_key.items()})


def repeating(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these kinds, layer by layer.

    >>> repeating(["local", "global", "local"])
    ('local', 'global')
    """
    period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    return tuple(kinds[:period])


def _layers(names: Any, window: Any, made: Made, where: str, turned: Sequence[Any] | None = None) -> dict[str, Any]:
    """pattern and window of a list of layer types, and of whether each turns its queries."""
    turns: Sequence[Any] = [1] * made["layers"] if turned is None else turned
    if not isinstance(names, list) or len(names) != made["layers"] or len(turns) < len(names):
        raise UserError(f"{where}: layer_types: a list with a name for each of {made['layers']} layers is needed")
    for name in names:
        if name not in KINDS:
            raise UserError(f"{where}: layer_types: {name!r} is not understood; {' and '.join(KINDS)} are")
    kinds = [KINDS[name] + ("" if turn else "_nope") for name, turn in zip(names, turns, strict=False)]
    local = "sliding_attention" in names
    if local and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UserError(f"{where}: sliding_window is {window!r}; a number of positions is needed for sliding_attention")
    return {"pattern": repeating(kinds), "window": window if local else 0}


def _types_of(config: ModelConfig) -> list[str]:
    return [NAMES[config.kind(layer).removesuffix("_nope")] for layer in range(config.layers)]


def _read_windowed(reader: Reader, made: Made) -> dict[str, Any]:
    window = reader.take("sliding_window", int)
    names = ["full_attention" if window is None else "sliding_attention"] * made["layers"]
    return _layers(names, window, made, reader.where)


windowed = Part(_read_windowed, lambda config: {"sliding_window": config.window or None})


def _read_qwen(reader: Reader, made: Made) -> dict[str, Any]:
    uses, window = reader.take("use_sliding_window", bool), reader.take("sliding_window", int)
    window = window if uses else None
    first, names = reader.take("max_window_layers", int), reader.take("layer_types", list)
    sliding = lambda layer: window is not None and layer >= first
    derived = ["sliding_attention" if sliding(layer) else "full_attention" for layer in range(made["layers"])]
    return _layers(names or derived, window, made, reader.where)


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    values = {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
    return values | {"max_window_layers": config.layers, "layer_types": _types_of(config)}


qwen_layers = Part(_read_qwen, _write_qwen)


def _read_smollm3(reader: Reader, made: Made) -> dict[str, Any]:
    every, turned = reader.take("no_rope_layer_interval", int), reader.take("no_rope_layers", list)
    reader.take("max_window_layers")  # stands there, and is not read
    turned = turned or [int((layer + 1) % every != 0) for layer in range(made["layers"])]
    uses, window = reader.take("use_sliding_window", bool), reader.take("sliding_window", int)
    window, names = window if uses else None, reader.take("layer_types", list)
    derived = ["sliding_attention" if window is not None and not turn else "full_attention" for turn in turned]
    return _layers(names or derived[: made["layers"]], window, made, reader.where, turned)


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    turned = [int(not config.kind(layer).endswith("_nope")) for layer in range(config.layers)]
    values = {"use_sliding_window": config.window > 0, "sliding_window": config.window or None}
    return values | {"no_rope_layers": turned, "layer_types": _types_of(config)}


smollm3_layers = Part(_read_smollm3, _write_smollm3)


def _gemma(reader: Reader, made: Made, period: int) -> dict[str, Any]:
    names, window = reader.take("layer_types", list), reader.take("sliding_window", int)
    derived = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(made["layers"])]
    return _layers(names or derived, window, made, reader.where)


def _read_gemma3(reader: Reader, made: Made) -> dict[str, Any]:
    period, _ = reader.take("sliding_window_pattern", int), reader.take("_sliding_window_pattern", int)
    return _gemma(reader, made, period or 6)


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return {"layer_types": _types_of(config), "sliding_window": config.window or 4096}


alternating = Part(lambda reader, made: _gemma(reader, made, 2), _write_gemma)
gemma3_layers = Part(_read_gemma3, _write_gemma)
gemma_query = Part(
    lambda reader, made: {"query_scalar": float(reader.take("query_pre_attn_scalar", (int, float)))},
    lambda config: {"query_pre_attn_scalar": _whole(config.query_scalar or config.head_size)},
)


def soft_caps(attention: bool) -> Part:
    keys = {"final_logit_softcapping": "logit_soft_cap"}
    return renamed(**keys | ({"attn_logit_softcapping": "attention_soft_cap"} if attention else {}))._replace(
        write=lambda config: {
            "final_logit_softcapping": config.logit_soft_cap or None,
            **({"attn_logit_softcapping": config.attention_soft_cap or None} if attention else {}),
        }
    )


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def plain(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config on which its mathematics depends, each in one form only."""
    config = config.complete()
    values = dataclasses.asdict(config)
    for field in (*ModelConfig.runtime_fields, "compute"):
        del values[field]
    kinds = [config.kind(layer) for layer in range(config.layers)]
    values |= {"pattern": repeating(kinds), "query_scalar": config.query_scalar or float(config.head_size)}
    values["tied_embeddings"] = config.tied_embeddings and not config.criteria and config.head != "pooler"
    values["biases"] = tuple(sorted(config.biases))
    near = "local" in kinds
    values["window"] = config.window if any(kind.startswith("local") for kind in kinds) else 0
    turned = any(kind in ("local", "global") for kind in kinds) and not config.learned_positions
    for field in ("rope_base", "rope_size", "rope_scaling", "rope_interleaved"):
        values[field] = values[field] if turned else None
    values["rope_size"] = (config.rope_size or config.head_size) if turned or config.latent.kv_rank else 0
    values["rope_base_local"] = (config.rope_base_local or config.rope_base) if near else 0.0
    sparse = [config.has_experts(layer) for layer in range(config.layers)]
    own = {
        name: value for name, value in values.pop("experts").items() if name not in ("capacity", "first_dense", "every")
    }
    values["experts"] = (sparse, own) if any(sparse) else None
    values["feed_forward"] = 0 if all(sparse) else config.feed_forward
    values["qk_norm_over"] = config.qk_norm_over if config.qk_norm else ""
    return values


def alike(a: ModelConfig, b: ModelConfig) -> list[str]:
    """The fields in which two configs compute another thing."""
    first, second = plain(a), plain(b)
    return [name for name in first if first[name] != second[name]]
