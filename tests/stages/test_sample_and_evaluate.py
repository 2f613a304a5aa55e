"""The stages sample and evaluate on a small untrained model and on real packed rows."""

import functools
import json
import lzma
import math

import jax
import pytest

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data.config import PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.hub.language_model import load
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages import evaluate, pack, prepare, sample
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.text.documents import read
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import model_directory

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>"))
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, compute="float32").complete()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: prepare, pack, and a model that finds every token equally likely."""
    folder = tmp_path_factory.mktemp("run")
    tokenizers.save(TOKENIZER, folder / "tokenizer")
    sources = []
    for split in ("train", "heldout"):
        texts = [f"Document {n} of the {split} part, with an é and {'more and ' * (n % 9)}words." for n in range(40)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(SourceConfig(name=split, path=str(folder / f"{split}.jsonl"), split=split))
    prepare.main(PrepareConfig(sources=tuple(sources), workdir=str(folder / "prepare"), min_characters=10))
    pack.main(
        PackConfig(
            documents=str(folder / "prepare"),
            tokenizer=str(folder / "tokenizer"),
            row_length=64,
            workdir=str(folder / "pack"),
        )
    )
    params = jax.tree.map(lambda x: 0 * x, jax.jit(functools.partial(initialize, define_model(CONFIG), 0))())
    facts = {"row_length": 64}
    model_directory.write(
        folder / "pretrain" / "model", params, CONFIG, folder / "tokenizer", inputs={}, config={}, facts=facts
    )
    return folder


def test_evaluate_counts_every_byte_of_the_documents(run, tmp_path):
    (tmp_path / "a.txt").write_text("A text file, 日本.")
    (tmp_path / "b.txt").write_text("Another one.\n")
    config = EvaluateConfig(
        model=str(run),
        rows=str(run / "pack"),
        documents=str(run / "prepare"),
        texts=(f"{tmp_path}/*.txt",),
        workdir=str(tmp_path / "evaluate"),
    )
    summary = evaluate.main(config)
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    texts = [document.text for document in read(run / "prepare", "heldout")]
    size = sum(len(text.encode()) for text in texts)
    bits = math.log2(TOKENIZER.vocab_size)
    heldout = results["heldout"]
    assert (heldout["documents"], heldout["bytes"], heldout["tokens"]) == (40, size, size + 40)
    assert heldout["bits_per_byte"]["value"] == pytest.approx(bits * (size + 40) / size, rel=1e-5)
    assert heldout["loss"]["value"] == pytest.approx(bits * math.log(2), rel=1e-5)
    packed = 8 * len(lzma.compress("".join(texts).encode(), preset=9)) / size
    assert heldout["xz_bits_per_byte"] == pytest.approx(packed, rel=0.01)
    files = results["texts"][f"{tmp_path}/*.txt"]
    assert (files["documents"], files["bytes"], files["tokens"]) == (2, 33, 35)

    made = manifest.read(tmp_path / "evaluate", "evaluation")
    manifest.verify(tmp_path / "evaluate", made)
    assert made.inputs == evaluate.inputs(config)
    assert len(made.inputs) == 5
    assert made.facts["summary"] == summary
    assert summary["figure"].startswith(f"{heldout['bits_per_byte']['value']:.3f} bits per byte (xz -9: ")


def test_evaluate_refuses_what_does_not_belong_together(run, tmp_path):
    config = {"model": str(run), "workdir": str(tmp_path / "out")}
    (tmp_path / "other").mkdir()
    other = SourceConfig(name="train", path=str(run / "train.jsonl"))
    prepare.main(PrepareConfig(sources=(other,), workdir=str(tmp_path / "other"), min_characters=10))
    with pytest.raises(UserError, match="documents: .* was not packed from"):
        evaluate.main(EvaluateConfig(rows=str(run / "pack"), documents=str(tmp_path / "other"), **config))
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(UserError, match="texts: .*broken.txt:1: broken_utf8"):
        evaluate.main(EvaluateConfig(texts=(str(tmp_path / "broken.txt"),), **config))
    with pytest.raises(UserError, match="no file matches"):
        evaluate.main(EvaluateConfig(texts=(str(tmp_path / "*.md"),), **config))
    tokenizers.save(ByteTokenizer(("<pad>", "<s>", "</s>", "<more>")), tmp_path / "tokenizer")
    packed = {"documents": str(run / "prepare"), "tokenizer": str(tmp_path / "tokenizer"), "row_length": 64}
    pack.main(PackConfig(**packed, workdir=str(tmp_path / "pack")))
    with pytest.raises(UserError, match="packed with another tokenizer than the model's"):
        evaluate.main(EvaluateConfig(rows=str(tmp_path / "pack"), **config))
    with pytest.raises(ConfigError, match="rows: give a pack folder"):
        EvaluateConfig(model="x")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_sample_writes_what_the_model_says(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One", "topic": "x"}\n\n{"prompt": "Two", "prompt_id": 7}\n')
    sampling = SamplingConfig(max_tokens=4, samples=2, seed=3)
    config = SampleConfig(
        model=str(run),
        prompts_file=str(tmp_path / "prompts.jsonl"),
        sampling=sampling,
        workdir=str(tmp_path / "sample"),
    )
    summary = sample.main(config)
    lines = [json.loads(line) for line in (tmp_path / "sample" / "completions.jsonl").read_text().splitlines()]
    assert [(line["prompt_id"], line["prompt"], line["sample"]) for line in lines] == [
        (0, "One", 0), (0, "One", 1), (7, "Two", 0), (7, "Two", 1),
    ]  # fmt: skip
    assert lines[1]["topic"] == "x"
    expected = load(run).generate(["One", "Two"], max_tokens=4, samples=2, seed=3, prompt_ids=[0, 7])
    assert [(line["text"], tuple(line["ids"]), line["stop_reason"]) for line in lines] == [
        (c.text, c.ids, c.stop_reason) for c in expected
    ]
    made = manifest.read(tmp_path / "sample", "samples")
    assert made.inputs == sample.inputs(config)
    assert made.facts["summary"] == summary
    assert sample.main(config)["figure"] == summary["figure"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl:2: is not valid JSON"),
        ('{"text": "a"}', 'prompts.jsonl:1: has no text under "prompt"'),
        ('{"prompt": "a", "prompt_id": -1}', "prompts.jsonl:1: prompt_id -1 is not"),
        ("\n", "holds no prompt"),
    ],
)
def test_sample_refuses_bad_prompts_by_line(run, tmp_path, content, problem):
    (tmp_path / "prompts.jsonl").write_text(content)
    config = SampleConfig(model=str(run), prompts_file=str(tmp_path / "prompts.jsonl"), workdir=str(tmp_path))
    with pytest.raises(UserError, match=problem):
        sample.main(config)


def test_sample_takes_prompts_or_a_file():
    with pytest.raises(ConfigError, match="prompts: give either prompts or a prompts_file"):
        SampleConfig(model="x", prompts=("a",), prompts_file="b")
    with pytest.raises(ConfigError, match="model: is empty"):
        SampleConfig(prompts=("a",))
