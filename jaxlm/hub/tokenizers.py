"""Tokenizers and chat templates of Hugging Face directories, read and written."""

import json
from collections.abc import Mapping
from typing import Any

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.base import files
from jaxlm.base.errors import UserError
from jaxlm.hub.generation import Generation
from jaxlm.tokenizer import chat
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.hugging_face import HuggingFaceTokenizer
from jaxlm.tokenizer.sentencepiece import SPACE, SentencePieceTokenizer
from jaxlm.tokenizer.tokenizer import Tokenizer

CONFIG, FAST, SLOW = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"
# Texts on which a tokenizer made from one of ours must agree with it, before it is written.
PROBES = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttab\n\nnew lines  and an end ",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 1234567890",
    "Füße, naïve café, Привет, 你好, 🙂👩‍👩‍👧, \x00\x7f",
    "aaaaaaaaaaaaa bbbbbbb ababababab </s> <|im_start|>user",
)


def read_tokenizer(folder: epath.Path, vocab_size: int, generation: Generation) -> Tokenizer:
    """tokenizer.json, or a sentencepiece tokenizer.model without it. Raises UserError where there is no end of text."""
    config = _config(folder)
    if not (folder / FAST).exists():
        return _read_sentencepiece(folder, config)
    values = files.read_json(folder / FAST)
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f"{folder / FAST}: is no tokenizer of Hugging Face's tokenizers")
    try:
        # Gemma 3's smallest names a token of its larger kin that has no row in its own table.
        added = [token for token in values.get("added_tokens") or [] if token.get("id", 0) < vocab_size]
        values["added_tokens"] = added
        model = tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises no class of its own
        raise UserError(f"{folder / FAST}: cannot be read: {error}") from None

    def id_of(kind: str) -> int | None:
        name = _name(config, kind)
        return model.token_to_id(name) if name else None

    eos = id_of("eos")
    eos = generation.eos_ids[0] if eos is None and generation.eos_ids else eos
    with_specials, without = model.encode("a").ids, model.encode("a", add_special_tokens=False).ids
    if eos is None and with_specials[:-1][-len(without) :] == without:
        eos = with_specials[-1]  # BERT's [SEP], which is called no end of text
    if eos is None:
        raise UserError(f"{folder}: {CONFIG} names no eos_token, and generation_config.json has no eos_token_id")
    pad = id_of("pad")
    pad = generation.pad_id if pad is None else pad
    bos = with_specials[0] if with_specials[1 : 1 + len(without)] == without != with_specials[:-1] else None
    if isinstance(config.get("add_bos_token"), bool):
        bos = id_of("bos") if config["add_bos_token"] else None
    content = {"bos": bos, "eos": eos, "pad": eos if pad is None else pad, "tokenizer": values}
    tokenizer = HuggingFaceTokenizer.from_bytes(json.dumps(content, ensure_ascii=False).encode(), str(folder / FAST))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{folder / FAST}: has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
    return tokenizer


def _read_sentencepiece(folder: epath.Path, config: Mapping[str, Any]) -> Tokenizer:
    if not (folder / SLOW).exists():
        raise UserError(f"{folder}: holds neither {FAST} nor {SLOW}; a tokenizer is needed")
    tokenizer = SentencePieceTokenizer.from_bytes((folder / SLOW).read_bytes(), str(folder / SLOW))
    added = files.read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    beyond = [int(id) for id in (*(config.get("added_tokens_decoder") or {}), *added.values())]
    if any(id >= tokenizer.vocab_size for id in beyond):
        raise UserError(
            f"{folder}: has tokens that {SLOW} does not know; save it with transformers once, so that there is a {FAST}"
        )
    return tokenizer


def read_template(folder: epath.Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """chat_template.jinja, or that of tokenizer_config.json; None where there is neither."""
    config, path = _config(folder), folder / chat.FILE_NAME
    source = path.read_text() if path.exists() else config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is None:
        return None
    where = str(path if path.exists() else folder / CONFIG)
    if not isinstance(source, str):
        raise UserError(f"{where}: chat_template is no text")
    return template_of(source, tokenizer, _name(config, "bos"), f"{where}: chat_template")


def template_of(source: str, tokenizer: Tokenizer, bos: str | None, where: str) -> ChatTemplate:
    """A template that can write a beginning, `bos`, which the tokenizer itself puts before no text."""
    if tokenizer.bos_id is None and bos and "bos_token" in source:
        source = f"{{%- set bos_token = {json.dumps(bos)} -%}}" + source
    return ChatTemplate(source, tokenizer, where)


def _config(folder: epath.Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json where that alone names a token."""
    values: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if (folder / name).exists():
            found = files.read_json(folder / name)
            if not isinstance(found, dict):
                raise UserError(f"{folder / name}: is no JSON object")
            values |= found
    return values


def _name(config: Mapping[str, Any], kind: str) -> str | None:
    token = config.get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def write(
    tokenizer: Tokenizer, template: ChatTemplate | None, folder: epath.Path, context_tokens: int, encoder: bool = False
) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as `AutoTokenizer` reads them.

    An `encoder`'s puts BOS and EOS around every text, as `LanguageModel.embed` does, and calls them BERT's names too.
    """
    values = _framed(as_json(tokenizer), tokenizer) if encoder else as_json(tokenizer)
    files.write_bytes(folder / FAST, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    names = {id: name for name, id in tokenizer.special_ids.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for kind, id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        if id is not None:
            config[f"{kind}_token"] = names.get(id) or tokenizer.piece(id)
    if encoder:
        config |= {"cls_token": config.get("bos_token"), "sep_token": config["eos_token"]}
        config |= {f"{name[1:-1].lower()}_token": name for name in ("[MASK]", "[UNK]") if name in tokenizer.special_ids}
    if context_tokens:
        config["model_max_length"] = context_tokens
    files.write_json(folder / CONFIG, config)
    if template is not None:
        files.write_bytes(folder / chat.FILE_NAME, template.source.encode())


def _framed(values: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The same with BOS and EOS around a text."""
    made = tokenizers.Tokenizer.from_str(json.dumps(values))
    ends = [id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None]
    pieces = [(made.id_to_token(id) or "", id) for id in ends]
    inner = made.encode("a", add_special_tokens=False).ids
    if made.encode("a").ids == [*ends[:-1], *inner, ends[-1]]:
        return values
    first, last = " ".join([piece for piece, _ in pieces[:-1]]), pieces[-1][0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(), pair=f"{first} $A {last} $B {last}".strip(), special_tokens=pieces
    )
    return json.loads(made.to_str())


def as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of its tokenizer.json. Raises UserError where that would cut text in another way."""
    return tokenizer.values if isinstance(tokenizer, HuggingFaceTokenizer) else _converted(tokenizer)


def _converted(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a byte or sentencepiece tokenizer. Raises UserError where it would cut text in another way."""
    if isinstance(tokenizer, ByteTokenizer):
        made = tokenizers.Tokenizer(models.BPE(vocab={sign: byte for byte, sign in _byte_signs().items()}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, SentencePieceTokenizer):
        made = _from_sentencepiece(tokenizer)
    else:
        raise UserError(f"a {type(tokenizer).__name__} cannot be written as {FAST}")
    special = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name, _ in special])
    if tokenizer.bos_id is not None:
        name = tokenizer.piece(tokenizer.bos_id)
        made.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, tokenizer.bos_id)]
        )
    values = json.loads(made.to_str())
    content = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "tokenizer": values}
    again = HuggingFaceTokenizer(json.dumps(content).encode())
    same_names = again.special_ids == tokenizer.special_ids
    for text in PROBES:
        ids = tokenizer.encode(text)
        if not same_names or again.encode(text) != ids or again.decode(ids) != tokenizer.decode(ids):
            raise UserError(
                f"the tokenizer cannot be written as {FAST}: Hugging Face's tokenizers would make other tokens of "
                f"{text!r}; export tokenizers that jaxlm made, or that came as {FAST}"
            )
    return values


def merges_of(pieces: Mapping[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Piece → (score, id), as the merges of a BPE model.

    sentencepiece joins the two neighbours whose joint has the highest score: every way to cut a piece is a merge.

    >>> merges_of({"a": (-2, 0), "b": (-3, 1), "ab": (0, 2), "abb": (-1, 3)})
    [('a', 'b'), ('ab', 'b')]
    """
    cuts = [(piece, piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    sound = [(piece, left, right) for piece, left, right in cuts if left in pieces and right in pieces]
    made = [(-pieces[piece][0], pieces[left][1], (left, right)) for piece, left, right in sound]
    return [pair for *_, pair in sorted(made)]


def _byte_signs() -> dict[int, str]:
    """Byte → its character in byte-level BPE (GPT-2): itself where it can be seen, else one from U+100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(unseen)}


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The same pieces with their scores, or with merges in the order of these; bytes spell what is no piece.

    A text's own U+2581, which jaxlm spells in bytes, becomes a space there.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    ids = range(tokenizer.vocab_size)
    pieces = [(model.id_to_piece(id), model.get_score(id)) for id in ids]
    joined = {id for id in ids if not (model.is_control(id) or model.is_unknown(id) or model.is_byte(id))}
    vocabulary = {piece: id for id, (piece, _) in enumerate(pieces)}
    if any(pieces[id][1] != int(pieces[id][1]) for id in joined):  # a BPE model's scores are 0, -1, -2, ...
        made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    else:
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges_of({pieces[id][0]: (pieces[id][1], id) for id in joined}),
                unk_token=model.id_to_piece(model.unk_id()),
                byte_fallback=True,
                fuse_unk=True,
            )
        )
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made
