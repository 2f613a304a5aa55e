"""The tokenizer of a GGUF file ↔ a tokenizer.json: llama.cpp's "llama" (sentencepiece's BPE) and "gpt2" (byte-level).

How texts are cut before merging is named there, not said: `PRE` has what each name stands for, as the tokenizer.json
of the models that it is from says it (llama.cpp: src/llama-vocab.cpp).
"""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.base.errors import UserError
from jaxlm.hub.gguf_fields import Header
from jaxlm.hub.tokenizers import PROBES, as_json, merges_of, template_of
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.hugging_face import HuggingFaceTokenizer
from jaxlm.tokenizer.sentencepiece import SPACE
from jaxlm.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
# Said of a vocabulary beside what is read: tokens of no meaning here, and counts.
INERT = "seperator mask fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep prefix suffix middle cls".split()
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(WORDS % numbers), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def _pre(name: str) -> Any:
    if name in ("smollm", "codeshell"):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _words(r"\p{N}" if name in ("qwen2", "deepseek-r1-qwen") else r"\p{N}{1,3}")


PRE = ("gpt-2", "llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "smollm")
PRE += ("codeshell",)
# They take a word that is a token of its own as it is, whatever its merges, and begin each text with BOS.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def named_ids(header: Header) -> dict[str, Any]:
    """config.json's ids: where a text ends (all of EOS, end of turn and end of message), BOS, padding."""
    read = lambda kind: header.take(f"{KEY}{kind}_token_id", int)
    ends = [id for id in map(read, ("eos", "eot", "eom")) if id is not None]
    for kind in INERT:
        read(kind)
    return {"eos_token_id": list(dict.fromkeys(ends)), "bos_token_id": read("bos"), "pad_token_id": read("padding")}


def read(header: Header, rows: int) -> Tokenizer:
    """The tokenizer of a model with an embedding of `rows`. Raises UserError for what is not understood, by its key."""
    kind = header.need(KEY + "model", str)
    if kind not in ("llama", "gpt2"):
        raise UserError(f"{header.where}: {KEY}model {kind!r} is not understood; llama and gpt2 are")
    tokens = _listed(header, "tokens", str)
    types = _listed(header, "token_type", int) if KEY + "token_type" in header.values else [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or len(tokens) > rows:
        raise UserError(
            f"{header.where}: {KEY}tokens: {len(set(tokens))} different ones of {len(tokens)}, {len(types)} types and "
            f"{rows} rows of the embedding do not fit each other"
        )
    for key in ("add_eos_token", "add_sep_token", "remove_extra_whitespaces"):
        header.expect(KEY + key, False)
    header.take(KEY + "token_type_count", int)
    used = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
    pre = header.take(KEY + "pre", str)
    try:
        made = _sentencepiece(header, used, types) if kind == "llama" else _byte_level(header, used, pre)
        for id, token in enumerate(tokens):
            if types[id] in (CONTROL, UNKNOWN):
                made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            elif types[id] == USER_DEFINED:
                made.add_tokens([AddedToken(token, special=False, normalized=False)])
        begins = header.take(KEY + "add_bos_token", bool, kind == "llama" or pre in WHOLE_WORDS)
        bos = header.take(f"{KEY}bos_token_id", int) if begins else None
        if bos is not None and 0 <= bos < len(tokens):
            name = tokens[bos]
            single = {"single": f"{name} $A", "pair": f"{name} $A $B"}
            made.post_processor = processors.TemplateProcessing(**single, special_tokens=[(name, bos)])
        values = json.loads(made.to_str())
    except UserError:
        raise
    except Exception as error:  # the library raises no class of its own
        raise UserError(f"{header.where}: {KEY}tokens: give no tokenizer: {str(error)[:200]}") from None
    eos, pad = header.need(KEY + "eos_token_id", int), header.take(KEY + "padding_token_id", int)
    content = {"bos": bos, "eos": eos, "pad": eos if pad is None else pad, "tokenizer": values}
    return HuggingFaceTokenizer.from_bytes(json.dumps(content, ensure_ascii=False).encode(), header.where)


def _listed(header: Header, key: str, kind: type | tuple[type, ...]) -> list[Any]:
    found = header.need(KEY + key, list)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in found):
        raise UserError(f"{header.where}: {KEY}{key} has items of another type")
    return found


def _sentencepiece(header: Header, ids: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """Its pieces by their scores; bytes spell what is no piece."""
    header.expect(KEY + "pre", "default", "llama-spm")
    scores = _listed(header, "scores", (int, float))
    joined = {token: (scores[id], id) for token, id in ids.items() if types[id] == NORMAL}
    unknown = header.take(KEY + "unknown_token_id", int, 0)
    names = [token for token, id in ids.items() if id == unknown]
    if len(scores) != len(types) or not names or len({score for score, _ in joined.values()}) < min(len(joined), 2):
        raise UserError(f"{header.where}: {KEY}scores and unknown_token_id: do not tell how its tokens are joined")
    merges = merges_of(joined)
    made = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=names[0], byte_fallback=True, fuse_unk=True)
    )
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.normalizer = normalizers.Replace(" ", SPACE)
    if header.take(KEY + "add_space_prefix", bool, True):
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), made.normalizer])
        parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(parts)
    return made


def _byte_level(header: Header, ids: dict[str, int], pre: str | None) -> tokenizers.Tokenizer:
    if pre is None or pre not in PRE:
        raise UserError(f"{header.where}: {KEY}pre {pre!r} is not understood; {', '.join(PRE)} are")
    header.expect(KEY + "add_space_prefix", False)
    header.taken |= {KEY + "scores", KEY + "unknown_token_id"}  # of no meaning there
    merges = _listed(header, "merges", str) if KEY + "merges" in header.values else []
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    whole = pre in WHOLE_WORDS
    made = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=whole))  # type: ignore[arg-type]
    made.normalizer = normalizers.NFC() if pre in COMPOSED else None  # type: ignore[assignment]
    made.pre_tokenizer, made.decoder = _pre(pre), decoders.ByteLevel()
    return made


def read_template(header: Header, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = header.take("tokenizer.chat_template", str)
    # Further ones beside it are for other purposes: tools, retrieval.
    header.taken |= {key for key in header.values if key.startswith("tokenizer.chat_template")}
    bos = header.take(f"{KEY}bos_token_id", int)
    begin = tokenizer.piece(bos) if bos is not None and 0 <= bos < tokenizer.vocab_size else None
    return None if source is None else template_of(source, tokenizer, begin, f"{header.where}: tokenizer.chat_template")


def written(tokenizer: Tokenizer, template: ChatTemplate | None, rows: int) -> dict[str, Any]:
    """The keys of a header. Raises UserError where llama.cpp would cut text in another way."""
    values = as_json(tokenizer)
    model, decoder = values["model"], values.get("decoder") or {}
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer is a {model.get('type')} model, of which llama.cpp has none; it has BPE models")
    added = {token["id"]: token for token in values.get("added_tokens") or []}
    tokens = {id: token for token, id in model["vocab"].items()} | {id: t["content"] for id, t in added.items()}
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    types = [UNUSED] * rows
    for id, token in tokens.items():
        spelled = len(token) == 6 and token.startswith("<0x") and model.get("byte_fallback")
        types[id] = BYTE if spelled else NORMAL
        if id in added:
            types[id] = CONTROL if added[id]["special"] else USER_DEFINED
        if token == model.get("unk_token"):
            types[id] = UNKNOWN
    said: dict[str, Any] = {KEY + "tokens": [tokens.get(id, f"[PAD{id}]") for id in range(rows)]}
    said[KEY + "token_type"] = types
    if "ByteLevel" in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]:
        said |= {KEY + "model": "gpt2", KEY + "pre": _name_of_pre(values, pairs)}
        said[KEY + "merges"] = [f"{left} {right}" for left, right in pairs]
    else:
        # Its first merge says when a piece is made; those that no merge makes come after all.
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(pairs):
            ranks.setdefault(left + right, rank)
        scores = [-float(ranks.get(tokens.get(id, ""), len(pairs) + id)) for id in range(rows)]
        begins = tokenizer.piece(tokenizer.encode("a")[0]).startswith(SPACE)
        said |= {KEY + "model": "llama", KEY + "pre": "default", KEY + "scores": scores}
        said |= {KEY + "add_space_prefix": begins, KEY + "unknown_token_id": model["vocab"].get(model["unk_token"], 0)}
    ends = [tokenizer.eos_id, *(id for id in (template.stop_ids if template else ()) if id != tokenizer.eos_id)]
    for kind, id in zip(("eos", "eot", "eom"), ends, strict=False):
        said[f"{KEY}{kind}_token_id"] = id
    said |= {KEY + "padding_token_id": tokenizer.pad_id, KEY + "add_bos_token": tokenizer.bos_id is not None}
    said |= {f"{KEY}bos_token_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}
    said |= {"tokenizer.chat_template": template.source} if template else {}
    _require_alike(tokenizer, read(Header(said, "the GGUF header"), rows))
    return said


def _name_of_pre(values: dict[str, Any], pairs: list[Any]) -> str:
    """The name of the way that a tokenizer.json cuts text in."""

    def plain(part: Any) -> Any:  # without what changes no ids
        if not isinstance(part, dict):
            return part
        kept = {k: v for k, v in part.items() if k not in ("trim_offsets", "invert", "add_prefix_space")}
        return {k: [plain(p) for p in v] if isinstance(v, list) else v for k, v in kept.items()}

    for name in PRE:
        probe = tokenizers.Tokenizer(models.BPE())
        probe.pre_tokenizer = _pre(name)
        same = plain(json.loads(probe.to_str())["pre_tokenizer"]) == plain(values.get("pre_tokenizer"))
        whole = bool(values["model"].get("ignore_merges")) == (name in WHOLE_WORDS)
        if same and whole and (values.get("normalizer") is None) == (name not in COMPOSED):
            return name
    if not pairs:  # however it is cut, each byte is a token
        return "gpt-2"
    raise UserError("the tokenizer cuts text in a way that llama.cpp has no name for among: " + ", ".join(PRE))


def _require_alike(tokenizer: Tokenizer, again: Tokenizer) -> None:
    for text in PROBES:
        ids = tokenizer.encode(text)
        if again.encode(text) != ids or again.decode(ids) != tokenizer.decode(ids):
            raise UserError(f"the tokenizer cannot be written into a GGUF file: {text!r} would give other tokens")
    if again.special_ids != tokenizer.special_ids or again.bos_id != tokenizer.bos_id:
        raise UserError("the tokenizer cannot be written into a GGUF file: its special tokens would be others")
