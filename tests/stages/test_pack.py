import json
import random
import resource
import shutil
import unicodedata

import pytest
import sentencepiece

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data import rows
from jaxlm.data.config import PackConfig
from jaxlm.data.loader import Loader, RowSource, heldout_batches
from jaxlm.stages import pack, prepare, tokenizer
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.text.documents import read
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.tokenizer.tokenizer import load

WHO = ["Старый рыбак", "Моя бабушка", "Ёжик в тумане", "Никакой учитель", "Хороший музыкант", "Рыжий котёнок"]
DOES = ["находит", "рисует", "поёт про", "покупает", "забывает", "чинит", "помнит"]
WHAT = ["синий чайник", "жёлтый трамвай", "новый словарь", "твой зонт", "чей-то самовар", "большой секрет"]
WHERE = ["в тёплом Крыму", "у реки", "на краю света", "под дождём", "за чаем", "«по пути домой»"]


def russian(count, seed):
    """Documents of sentences from templates; every second one spells й and ё with combining marks."""
    draw = random.Random(seed)
    for number in range(count):
        lines = [
            f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)} {draw.choice(WHERE)} №{draw.randint(1, 999)}."
            for _ in range(draw.choice([1, 2, 3, 5, 8, 40]))
        ]
        yield unicodedata.normalize("NFD" if number % 2 else "NFC", "\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def russian_documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("russian")
    sources = []
    for split, count in (("train", 800), ("heldout", 40)):
        path = folder / f"{split}.jsonl"
        texts = russian(count, seed=split)
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        sources.append(SourceConfig(name=split, path=str(path), split=split))
    prepare.main(PrepareConfig(sources=tuple(sources), workdir=str(folder / "prepare"), min_characters=20))
    documents = str(folder / "prepare")
    tokenizer.main(TokenizerConfig(documents=documents, workdir=str(folder / "bpe"), vocab_size=700))
    tokenizer.main(TokenizerConfig(documents=documents, workdir=str(folder / "byte"), kind="byte"))
    return folder


def run(folder, workdir, tokenizer_name="bpe", **fields):
    config = PackConfig(
        documents=str(folder / "prepare"),
        tokenizer=str(folder / tokenizer_name),
        workdir=str(workdir),
        **{"row_length": 256, **fields},
    )
    pack.main(config)
    made = manifest.read(workdir, "rows")
    assert made.inputs == pack.inputs(config)
    return made


def test_russian_goes_from_documents_to_rows_and_back(russian_documents, tmp_path):
    made = run(russian_documents, tmp_path)
    texts = {n: d.text for n, d in enumerate(read(russian_documents / "prepare", "train"))}
    assert all(unicodedata.is_normalized("NFC", text) for text in texts.values())
    assert any("й" in text for text in texts.values())
    assert not any("\u0306" in text for text in texts.values())

    vocabulary = load(tmp_path / "tokenizer")
    assert vocabulary.hash == load(russian_documents / "bpe").hash == made.facts["tokenizer_hash"]
    token_bytes = vocabulary.token_bytes()
    found, target_bytes, targets = {}, 0, 0
    source = RowSource(tmp_path, "train")
    for index in range(len(source)):
        row = source[index]
        target_bytes += int(token_bytes[row["ids"][row["loss_mask"]]].sum())
        targets += int(row["loss_mask"].sum())
        for piece in rows.decode(source._reader[index]):
            found.setdefault(piece.document, []).append(piece.ids.tolist())
    for number, pieces in found.items():
        if len(pieces) == 1:
            assert pieces[0][0] == vocabulary.bos_id
            assert pieces[0].count(vocabulary.bos_id) == pieces[0].count(vocabulary.eos_id) == 1
            assert pieces[0][-1] == vocabulary.eos_id
            assert vocabulary.decode(pieces[0]) == texts[number]
    train = made.facts["train"]
    assert sorted(found) == list(range(train["documents"]))
    assert target_bytes == train["bytes"] == sum(len(text.encode()) for text in texts.values())
    assert targets == train["target_tokens"] == train["text_tokens"] + train["documents"]  # each text token, each </s>
    sizes = [len(vocabulary.encode(text)) + 2 for text in texts.values()]  # <s> and </s>
    bounds = [int(bound) for bound in train["lengths"]]
    assert bounds == sorted(bounds)
    assert [*train["lengths"].values()] == [sum((b // 2 if b > 16 else 0) < n <= b for n in sizes) for b in bounds]
    assert train["padding_share"] < 0.03
    assert train["split_documents"] == sum(len(pieces) > 1 for pieces in found.values()) > 0
    assert train["bytes_per_token"] == pytest.approx(train["bytes"] / train["text_tokens"])
    assert train["bytes_per_token"] > 3


def test_byte_rows_hold_the_same_text(russian_documents, tmp_path):
    made = run(russian_documents, tmp_path, "byte", row_length=1024)
    train = made.facts["train"]
    assert train["text_tokens"] == train["bytes"]
    assert train["bytes_per_token"] == 1.0
    assert train["padding_share"] < 0.03


def test_rows_repeat_exactly_and_the_seed_changes_only_their_order(russian_documents, tmp_path):
    def stored(folder):
        reader = RowSource(folder, "train")._reader
        return [reader[i] for i in range(len(reader))]

    first = run(russian_documents, tmp_path / "a", rows_per_file=50)
    second = run(russian_documents, tmp_path / "b", rows_per_file=50)
    assert first.hash == second.hash
    assert sum(name.startswith("train/") for name in first.files) == -(-first.facts["train"]["rows"] // 50) > 1
    run(russian_documents, tmp_path / "c", seed=1)
    assert stored(tmp_path / "a") != stored(tmp_path / "c")
    assert sorted(stored(tmp_path / "a")) == sorted(stored(tmp_path / "c"))
    assert not list(tmp_path.glob("*/*/unshuffled*"))


def test_the_loader_takes_what_the_stage_made(russian_documents, tmp_path):
    run(russian_documents, tmp_path)
    batch = Loader([(str(tmp_path), 1.0)], "train", global_batch=4, seed=0).batch(10)
    assert batch["ids"].shape == (4, 256)
    held = RowSource(tmp_path, "heldout")
    assert sum(real for _, real in heldout_batches(held, 4)) == held.manifest.facts["heldout"]["rows"]


def test_long_documents_can_be_dropped(russian_documents, tmp_path):
    split = run(russian_documents, tmp_path / "split").facts["train"]
    dropped = run(russian_documents, tmp_path / "drop", long_documents="drop").facts["train"]
    assert dropped["dropped_documents"] == split["split_documents"] > 0
    assert dropped["documents"] + dropped["dropped_documents"] == split["documents"]
    assert dropped["split_documents"] == 0


def test_mistakes_are_named(russian_documents, tmp_path):
    with pytest.raises(UserError, match="gone: no such file or folder; a tokenizer is needed"):
        run(russian_documents, tmp_path / "out", "gone")
    with pytest.raises(UserError, match="no train document fits into a row; raise row_length"):
        run(russian_documents, tmp_path / "out", "byte", row_length=16, long_documents="drop")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9),
        model_prefix=str(tmp_path / "bare"),
        vocab_size=8,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(ConfigError, match=r"add_bos: the tokenizer .*bare\.model has no <s>; set add_bos=False"):
        run(russian_documents, tmp_path / "out", tmp_path / "bare.model")


def test_a_full_disk_is_the_error_and_leaves_no_manifest(russian_documents, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))  # no file may grow beyond it
    try:
        with pytest.raises(UserError, match=r"array_record: cannot be written: .*File too large"):
            run(russian_documents, tmp_path, "byte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UserError, match="is not finished"):
        RowSource(tmp_path, "train")
    assert run(russian_documents, tmp_path, "byte").facts["train"]["rows"] > 100


def test_damaged_documents_are_refused(russian_documents, tmp_path):
    shutil.copytree(russian_documents / "prepare", tmp_path / "prepare")
    path = tmp_path / "prepare" / "train" / "part-00000.jsonl.gz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00000\.jsonl\.gz: its content differs"):
        pack.main(
            PackConfig(
                documents=str(tmp_path / "prepare"),
                tokenizer=str(russian_documents / "bpe"),
                workdir=str(tmp_path / "out"),
            )
        )
