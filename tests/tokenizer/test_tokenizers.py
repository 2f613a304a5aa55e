import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.config import BASIC_TOKENS, TokenizerConfig
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxlm.tokenizer.tokenizer import load, save
from jaxlm.tokenizer.train import train

WORDS = ["the", "of", "and", "in", "to", "that", "for", "was", "with", "not", "his", "number", "little", "because"]
WORDS += ["чай", "и", "в", "не", "на", "что", "он", "как", "это", "по", "сегодня", "который"]


def texts(count=300):
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + "." for _ in range(count * 4)]
    return ["\n".join(lines[i : i + 4]) + "\n\n     indented\t42\n" for i in range(0, len(lines), 4)]


def config(**fields):
    return TokenizerConfig(**{"documents": "unused", "vocab_size": 400, "reserved_tokens": 3, **fields})


MADE = {
    "bpe": SentencePieceTokenizer(train(texts(), config())),
    "unigram": SentencePieceTokenizer(train(texts(), config(vocab_size=350, algorithm="unigram"))),
    "byte": ByteTokenizer([*BASIC_TOKENS[:3], "<|im_start|>", "<|im_end|>"]),
}
kinds = pytest.mark.parametrize("tokenizer", MADE.values(), ids=MADE.keys())

UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@kinds
@settings(deadline=None, max_examples=150)
@given(text=UNICODE)
@example("a\r\n\r\n\tb  c   \n ")
@example("\u2581 a\u2581\u2581b \u2581")  # sentencepiece's own sign for a space
@example("й и\u0306 e\u0301 \u2585 \u2047 \ufeff \u2028 \u3000")
@example("👩‍👩‍👧 🇺🇦 \U0010ffff")
@example("<s> </s> <unk> <0x41> <|im_start|>user")
@example("")
def test_every_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids) & set(tokenizer.special_ids.values())


@kinds
def test_special_tokens(tokenizer):
    assert tokenizer.special_ids["<pad>"] == tokenizer.pad_id
    assert tokenizer.special_ids["<s>"] == tokenizer.bos_id
    assert tokenizer.special_ids["</s>"] == tokenizer.eos_id
    start, end = tokenizer.special_ids["<|im_start|>"], tokenizer.special_ids["<|im_end|>"]
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, start, end}) == 5
    assert (tokenizer.token_bytes()[list(tokenizer.special_ids.values())] == 0).all()
    ids = [tokenizer.bos_id, start, *tokenizer.encode("the tea"), end, *tokenizer.encode(" чай"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == "the tea чай"
    assert tokenizer.piece(start) == "<|im_start|>"
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size


@kinds
def test_bytes_that_are_no_text_and_ids_that_are_none(tokenizer):
    assert tokenizer.decode(tokenizer.encode("ß")[:1]) == "\ufffd"
    with pytest.raises((ValueError, IndexError)):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises((ValueError, IndexError)):
        tokenizer.piece(tokenizer.vocab_size)


def test_training_learns_line_feeds_and_runs_of_spaces_and_repeats_exactly():
    bpe = MADE["bpe"]
    pieces = [bpe.piece(i) for i in range(bpe.vocab_size)]
    assert any("\n" in piece for piece in pieces)
    assert any(piece in ("\u2581" * 2, "\u2581" * 4) for piece in pieces)
    assert len(bpe.encode("the of and чай")) < 8
    assert [bpe.piece(i) for i in bpe.encode("42")] == ["4", "2"]
    assert len(bpe.special_ids) == 4 + 2 + 3
    assert bpe.vocab_size == 400
    assert train(texts(), config()) == bpe.content
    unigram = config(vocab_size=350, algorithm="unigram")
    assert train(texts(), unigram) == MADE["unigram"].content


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_vocabulary_that_cannot_be_reached_names_the_one_that_can(algorithm):
    with pytest.raises(ConfigError, match=r"vocab_size: got 50000; .* bytes of text with .* give at most \d+") as error:
        train(texts(), config(vocab_size=50_000, algorithm=algorithm))
    reachable = int(str(error.value).split("at most ")[1].split(":")[0])
    train(texts(), config(vocab_size=reachable, algorithm=algorithm))
    with pytest.raises(ConfigError, match=r"vocab_size: got 270; the characters of the text alone need \d+") as error:
        train(texts(), config(vocab_size=270, algorithm=algorithm))
    needed = int(str(error.value).split("alone need ")[1])
    train(texts(), config(vocab_size=needed, algorithm=algorithm))


def other_model(**fields):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, minloglevel=2, **fields
    )
    return SentencePieceTokenizer(model.getvalue())


def test_existing_models_that_rewrite_text_work_by_their_own_rules():
    usual = other_model(vocab_size=310, byte_fallback=True)  # NFKC, a space in front, runs of spaces joined
    assert usual.decode(usual.encode("the  of ﬁ")) == "the of fi"
    ids = usual.encode("the of")
    assert usual.token_bytes()[ids].sum() == len(" the of")
    assert usual.decode(usual.encode("a\u2581b")) == "a b"
    assert usual.pad_id == usual.special_ids["<unk>"]

    bare = other_model(vocab_size=60, byte_fallback=False, bos_id=-1, character_coverage=1.0)
    assert bare.bos_id is None
    assert "<unk>" not in bare.special_ids
    ids = bare.encode("of 語")
    assert bare.pad_id in ids, "an unknown character is <unk>, which stands in for the missing <pad>"
    assert bare.token_bytes()[ids].sum() == len(" of ")


def test_saved_and_loaded(tmp_path):
    for number, tokenizer in enumerate(MADE.values()):
        folder = tmp_path / str(number)
        name = save(tokenizer, folder)
        loaded = load(folder)
        assert loaded.hash == tokenizer.hash == load(folder / name).hash
        assert loaded.special_ids == tokenizer.special_ids
        assert loaded.encode("the чай\n") == tokenizer.encode("the чай\n")


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "gone")
    with pytest.raises(UserError, match="holds neither"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: is not a sentencepiece model"):
        load(tmp_path)
    (tmp_path / "byte_tokenizer.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer\.model and byte_tokenizer\.json; exactly one"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"byte_tokenizer\.json: is not a byte tokenizer"):
        load(tmp_path / "byte_tokenizer.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, "vocab_size: is not set"),
        ({"vocab_size": 100}, "vocab_size: got 100; 265 are taken"),
        ({"kind": "byte"}, "vocab_size: got 400; kind=byte has its own"),
        ({"kind": "existing", "vocab_size": None}, "path: is empty"),
        ({"path": "a.model"}, "path: got 'a.model'; only kind=existing"),
        ({"special_tokens": ("<a>", "<a>")}, "special_tokens: got '<a>' twice"),
        ({"special_tokens": ("<s>",)}, "special_tokens: got '<s>' twice, or it is one of the built-in"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)
