import pytest
from etils import epath

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.stages import tokenizer
from jaxlm.text.documents import Document, ShardWriter
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.tokenizer.tokenizer import load

TEXTS = [f"text number {i}, with a few words\nand a second line\n" for i in range(400)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("documents"))
    facts = {}
    for split, texts in (("train", TEXTS), ("heldout", ["held out text with other words: żółw\n"] * 2)):
        with ShardWriter(folder / split, 10**6) as shards:
            for number, text in enumerate(texts):
                shards.write(Document(text, "own", f"own:{number}"))
        facts[split] = shards.facts()
    manifest.write(folder, "documents", contents=["train", "heldout"], inputs={}, config={}, facts=facts)
    return str(folder)


def run(documents, tmp_path, **fields):
    config = TokenizerConfig(documents=documents, workdir=str(tmp_path), **fields)
    summary = tokenizer.main(config)
    made = manifest.read(tmp_path, "tokenizer")
    assert made.facts["summary"] == summary
    assert made.inputs == tokenizer.inputs(config)
    return made


def test_trained_measured_and_loaded(documents, tmp_path):
    made = run(documents, tmp_path, vocab_size=340)
    loaded = load(tmp_path)
    assert made.facts["tokenizer_hash"] == loaded.hash
    assert made.facts["vocab_size"] == loaded.vocab_size == 340
    train = made.facts["measured"]["train"]
    assert train["bytes"] == sum(map(len, TEXTS))
    assert train["bytes_per_token"] == train["bytes"] / sum(len(loaded.encode(text)) for text in TEXTS) > 2
    assert made.facts["measured"]["heldout"]["bytes_per_token"] < train["bytes_per_token"]


def test_bytes_and_an_existing_model(documents, tmp_path):
    made = run(documents, tmp_path / "byte", kind="byte")
    assert made.facts["measured"]["train"]["bytes_per_token"] == 1.0
    assert made.facts["vocab_size"] == 256 + 3 + 2 + 14
    first = run(documents, tmp_path / "first", vocab_size=340)
    taken = run(documents, tmp_path / "taken", kind="existing", path=str(tmp_path / "first" / "tokenizer.model"))
    assert taken.facts["tokenizer_hash"] == first.facts["tokenizer_hash"]


def test_the_sample_follows_the_seed(documents, tmp_path):
    def sampled(seed, sample_bytes=6000):
        made = run(documents, tmp_path / f"{seed}", vocab_size=320, sample_bytes=sample_bytes, seed=seed)
        return made.facts["measured"]["train"]["documents"], made.facts["tokenizer_hash"]

    assert sampled(0) == sampled(0) != sampled(1)
    assert 60 < sampled(0)[0] < 180  # 6,000 of 20,000 bytes
    with pytest.raises(UserError, match="sample holds no train document; raise sample_bytes"):
        sampled(0, sample_bytes=1)


def test_a_mistake_leaves_the_finished_tokenizer_alone(documents, tmp_path):
    run(documents, tmp_path, vocab_size=340)
    with pytest.raises(ConfigError, match="vocab_size: got 40000"):
        run(documents, tmp_path, vocab_size=40_000)
    assert load(tmp_path).vocab_size == 340


def test_damage_is_found(documents, tmp_path):
    run(documents, tmp_path, vocab_size=340)
    path = tmp_path / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[content.index(b"<|im_end|>") + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model: differs from the sha256"):
        load(tmp_path)


def test_documents_that_are_not_there_or_not_documents(documents, tmp_path):
    with pytest.raises(UserError, match=r"documents: .*gone: does not exist"):
        run(str(tmp_path / "gone"), tmp_path / "out", vocab_size=340)
    run(documents, tmp_path / "made", kind="byte")
    with pytest.raises(UserError, match=r"documents: .*made: holds tokenizer, but documents is needed"):
        run(str(tmp_path / "made"), tmp_path / "out", vocab_size=340)
