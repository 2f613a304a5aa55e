"""Import and export: the same files come back; what is damaged is refused; transformers reads what was written."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

import jaxlm
from jaxlm.__main__ import main, make_config, parse_arguments
from jaxlm.base import manifest
from jaxlm.base.errors import Refused, UserError
from jaxlm.hub import export as exporting
from jaxlm.hub import hugging_face
from jaxlm.hub import tokenizers as exchange
from jaxlm.hub.config import ExportConfig, ImportConfig
from jaxlm.hub.forward import embeddings, last_scores, padded
from jaxlm.hub.generation import Generation
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model, for_inference
from jaxlm.model.weights import apply, initialize
from jaxlm.sample.config import SamplingConfig
from jaxlm.stages import export, import_
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer import train
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxlm.train import model_directory

FIXTURES = Path(__file__).parent / "fixtures"
ALL = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))
ENCODERS = ("bert", "bert-untied", "bare-bert")
TOKENIZERS = ("byte-level", "spaces")
TOOL = Path(__file__).parent / "make_family_fixtures.py"
PYTHON = os.environ.get("JAXLM_TRANSFORMERS_PYTHON") or os.environ.get("JAXLM_PARITY_PYTHON", "")


def copied(tmp_path, name="llama", tokenizer=""):
    """A Hugging Face directory with a model and a tokenizer."""
    tokenizer = tokenizer or ("wordpiece" if name in ENCODERS else "byte-level")
    folder = tmp_path / "source"
    folder.mkdir()
    for path in (*(FIXTURES / name).iterdir(), *(FIXTURES / f"tokenizer-{tokenizer}").iterdir()):
        shutil.copy(path, folder / path.name)
    return folder


def imported(tmp_path, source, **fields):
    import_.main(ImportConfig(source=str(source), workdir=f"{tmp_path}/imported", **fields))
    return tmp_path / "imported"


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.mark.parametrize("name", ALL)
def test_export_gives_the_imported_files_back(name, tmp_path):
    """Every tensor bit for bit and of its own type, and a config of the same meaning."""
    source = copied(tmp_path, name)
    folder = imported(tmp_path, source)
    output = tmp_path / "output"
    export.main(ExportConfig(model=str(folder), output=str(output), without_verdict=True))
    before, after = tensors(source), tensors(output)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert after[key].tobytes() == value.tobytes(), key
    a, b = hugging_face.read(source), hugging_face.read(output)
    assert a.config == b.config
    assert a.context_tokens() == b.context_tokens()
    assert a.tokenizer().eos_id == b.tokenizer().eos_id
    if name not in ENCODERS:
        assert a.generation().eos_ids == b.generation().eos_ids[:1]
    assert manifest.read(output).inputs == {str(folder / "model"): manifest.read(folder / "model").hash}


def test_shards_mixed_types_and_bare_decoders(tmp_path, monkeypatch):
    """A norm of another type than the rest, several files out, and names without the class's prefix in."""
    source = copied(tmp_path, "qwen2-windows")
    first = min(source.glob("model-*-of-*.safetensors"))
    stored = safetensors.numpy.load_file(first)
    name = min(key for key in stored if key.endswith("norm.weight"))
    stored[name] = stored[name].astype(np.float32) + np.float32(1e-7)
    safetensors.numpy.save_file(stored, first)
    folder = imported(tmp_path, source)
    monkeypatch.setattr(exporting, "SHARD_BYTES", 8000)
    export.main(ExportConfig(model=str(folder), output=f"{tmp_path}/output", without_verdict=True))
    again = tensors(tmp_path / "output")
    assert len(list((tmp_path / "output").glob("model-*-of-*.safetensors"))) > 1
    for key, value in tensors(source).items():
        assert again[key].dtype == value.dtype
        assert again[key].tobytes() == value.tobytes(), key

    (tmp_path / "bare").mkdir()
    source = copied(tmp_path / "bare", "gpt2")
    stored = tensors(source)
    bare = {key.removeprefix("transformer."): value for key, value in stored.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32), "lm_head.weight": bare["wte.weight"]}
    with_prefix = hugging_face.read(source, "float32")
    definition = for_inference(with_prefix.config)[1]
    expected = with_prefix.load_params(definition)
    safetensors.numpy.save_file(bare, source / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hugging_face.read(source, "float32").load_params(definition), expected)


def test_load_reads_a_directory_as_it_is(tmp_path):
    source = copied(tmp_path)
    values = {"eos_token_id": [2, 4], "do_sample": True, "temperature": 0.5, "top_k": 3, "bos_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(values))
    lm = jaxlm.load(source, compute="float32")
    expected = safetensors.numpy.load_file(source / "expected.safetensors")
    logits = lm.logits(expected["ids"], expected["lengths"])
    np.testing.assert_allclose(logits[0], expected["right"][0], atol=1e-4)
    assert lm.context_tokens == 64
    assert lm.defaults == {"temperature": 0.5, "top_k": 3}
    assert lm.sampler.ends[:1] == [2]
    assert 4 in lm.sampler.ends
    chat = json.loads((source / "expected.json").read_text())
    assert lm.chat_template is not None
    assert lm.chat_template.render(chat["chat"]) == chat["rendered"]
    # The same from our own directory, defaults and stops with it.
    again = jaxlm.load(imported(tmp_path, source), compute="float32")
    np.testing.assert_array_equal(again.logits(expected["ids"], expected["lengths"]), logits)
    assert (again.defaults, again.sampler.ends, again.context_tokens) == (lm.defaults, lm.sampler.ends, 64)
    assert again.config.compute == "float32"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_cut_text_as_transformers_does(name, tmp_path):
    source = copied(tmp_path, tokenizer=name)
    expected = json.loads((source / "expected.json").read_text())
    directory = hugging_face.read(source)
    tokenizer = directory.tokenizer()
    assert tokenizer.bos_id == (1 if name == "spaces" else None)
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, ids in expected["texts"].items():
        assert front + tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        spaces = 1 if name == "spaces" and text else 0  # the one that is put in front
        assert int(tokenizer.token_bytes()[tokenizer.encode(text)].sum()) == len(text.encode()) + spaces
    # A text that names a special token stays text, but in a chat's own places.
    assert not set(tokenizer.special_ids.values()) - {5} & set(tokenizer.encode("the </s> cat"))
    template = directory.chat_template()
    assert template is not None
    assert template.render(expected["chat"][:1], add_generation_prompt=True) == expected["prompt"]
    assert tokenizer.special_ids["<|im_end|>"] in template.stop_ids
    tokenizers.save(tokenizer, tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").hash == tokenizer.hash


def test_berts_tokenizer_is_read_and_written(tmp_path):
    """WordPiece: [CLS] and [SEP] as its post-processor puts them, for which it has no other names."""
    source = copied(tmp_path, "bert")
    expected = json.loads((source / "expected.json").read_text())
    tokenizer = hugging_face.read(source).tokenizer()
    assert [tokenizer.piece(id) for id in (tokenizer.bos_id, tokenizer.eos_id)] == ["[CLS]", "[SEP]"]
    folder = epath.Path(tmp_path / "written")
    folder.mkdir()
    exchange.write(tokenizer, None, folder, 40, encoder=True)
    for made in (tokenizer, exchange.read_tokenizer(folder, tokenizer.vocab_size, Generation({}, (), None, None))):
        for text, ids in expected["texts"].items():
            assert [made.bos_id, *made.encode(text), made.eos_id] == ids
            assert made.decode(ids) == expected["decoded"][text]
        assert made.special_ids["[MASK]"] not in made.encode("a [MASK] b")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert [told[f"{kind}_token"] for kind in ("cls", "sep", "mask", "unk")] == ["[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    # A space before each word, none inside: what decoding gives, and the one before the text.
    text = "the cat sees a red dog"
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text) + 1


def test_berts_checkpoints_have_old_names_copies_and_another_head(tmp_path):
    """bert-base-uncased as it was published: gamma and beta, and what only pretraining's second task reads."""
    source = copied(tmp_path, "bert")
    before = hugging_face.read(source, "float32")
    definition = for_inference(before.config)[1]
    expected = before.load_params(definition)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = tensors(source)
    for new, name in old.items():
        stored = {key.replace(new, name): value for key, value in stored.items()}
    stored |= {
        "bert.pooler.dense.weight": np.ones((15, 15), np.float32),
        "cls.seq_relationship.weight": np.ones((2, 15), np.float32),
        "bert.embeddings.position_ids": np.arange(40)[None],
        "cls.predictions.decoder.weight": stored["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": stored["cls.predictions.bias"],
    }
    safetensors.numpy.save_file(stored, source / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hugging_face.read(source, "float32").load_params(definition), expected)
    stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"] + 1
    safetensors.numpy.save_file(stored, source / "model.safetensors")
    with pytest.raises(UserError, match="cls.predictions.decoder.bias differs from cls.predictions.bias"):
        hugging_face.read(source, "float32").load_params(definition)


TEXTS = ["the cat sees a red dog", "river", "", "a bird hears the small red house and the river and the tree"]


def test_an_encoder_gives_a_vector_for_each_text(tmp_path):
    """Means over real tokens: neither padding nor the other texts change them; as transformers has them."""
    source = copied(tmp_path, "bare-bert")
    lm = jaxlm.load(source)
    expected = safetensors.numpy.load_file(source / "expected.safetensors")
    rows = [row[:length] for row, length in zip(expected["ids"], expected["lengths"], strict=True)]
    for pooling, name in (("mean", "mean"), ("pooler", "pooled")):
        got = lm._each(rows, functools.partial(embeddings, pooling=pooling), lm.config.width)
        np.testing.assert_allclose(got, expected[name], atol=1e-5)
    together = lm.embed(TEXTS)
    assert (together.shape, together.dtype) == ((4, 12), np.float32)
    for pooling in ("mean", "first", "pooler"):
        alone = np.concatenate([lm.embed([text], pooling) for text in TEXTS])
        np.testing.assert_allclose(alone, lm.embed(TEXTS, pooling), atol=1e-5)
    np.testing.assert_array_equal(jaxlm.load(imported(tmp_path, source)).embed(TEXTS), together)
    assert lm.embed([]).shape == (0, 12)
    with pytest.raises(UserError, match="got a single one"):
        lm.embed("the cat")
    with pytest.raises(UserError, match=r"texts\[1\]: has \d+ tokens, the context is 40"):
        lm.embed(["the cat", "the cat " * 30])
    with pytest.raises(UserError, match="pooling: the model has no 'max'"):
        lm.embed(["the cat"], "max")


def sentences(folder, kinds=("Transformer", "Pooling", "Normalize"), **pooling):
    """Makes it a sentence-transformers directory."""
    listed = [
        {"idx": number, "path": f"{number}_{kind}" if number else "", "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 12} | pooling))


def test_sentence_transformers_say_how_vectors_are_made(tmp_path):
    """The pooling that the directory names is what holds, there and in the model directory made of it."""
    source = copied(tmp_path, "bare-bert")
    lm = jaxlm.load(source)
    np.testing.assert_array_equal(lm.embed(TEXTS), lm.embed(TEXTS, "mean"))
    for pooling, flags in (
        ("first", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("mean", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}),
        ("first", {"pooling_mode": "cls"}),
    ):
        sentences(source, **flags)
        np.testing.assert_array_equal(jaxlm.load(source).embed(TEXTS), lm.embed(TEXTS, pooling))
    np.testing.assert_array_equal(jaxlm.load(imported(tmp_path, source)).embed(TEXTS), lm.embed(TEXTS, "first"))
    sentences(source, pooling_mode_max_tokens=True)
    with pytest.raises(UserError, match="1_Pooling/config.json: pooling by max_tokens is not understood"):
        jaxlm.load(source)
    sentences(source, kinds=("Transformer", "Pooling", "Dense"), pooling_mode_cls_token=True)
    with pytest.raises(UserError, match=r"modules.json: Dense not understood; without modules.json"):
        jaxlm.load(source)


def test_what_an_encoder_cannot_do_is_refused_by_name(tmp_path):
    lm = jaxlm.load(copied(tmp_path, "bert"))
    assert lm.logits([[2, 4, 3]]).shape == (1, 3, 71)
    for method, given in (("generate", ["a"]), ("score", ["a"]), ("chat", [{"role": "user", "content": "a"}])):
        with pytest.raises(UserError, match=f"{method}: the model is an encoder, which reads texts both ways"):
            getattr(lm, method)(given)
    with pytest.raises(UserError, match="stream: the model is an encoder"):
        next(lm.stream("a"))
    with pytest.raises(UserError, match="the model is an encoder, which writes no text"):
        lm.sampler.generate(lm.params, [[2]], SamplingConfig(max_tokens=2))
    with pytest.raises(UserError, match="rewards: the model is a language model"):
        lm.rewards([])
    with pytest.raises(UserError, match="pooling: the model has no 'pooler'"):
        lm.embed(["a"], "pooler")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="logits: the model is a bare encoder without an output head"):
        jaxlm.load(copied(tmp_path / "bare", "bare-bert")).logits([[2, 3]])
    with pytest.raises(UserError, match="embed: the model is a decoder"):
        jaxlm.load(our_model(tmp_path / "ours", OURS)).embed(["a"])


@pytest.mark.parametrize("stage", ["sft", "reward", "rl", "preference", "evaluate", "sample"])
def test_stages_that_write_refuse_an_encoder(stage, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    folder = imported(tmp_path, copied(tmp_path, "bert"))
    config = tmp_path / "config.py"
    config.write_text(STAGE_CONFIGS[stage].format(model=folder, data=tmp_path / "rows.jsonl"))
    assert main([stage, f"--config={config}", f"--workdir={tmp_path}/run"]) == 2
    assert "is an encoder" in capsys.readouterr().err


SOURCE = "RankingSource(name='x', path='{data}')"
STAGE_CONFIGS = {
    "sft": (
        "from jaxlm.stages.config import *\nfrom jaxlm.data.config import *\n"
        "def get_config(): return SFTConfig(model='{model}', sources=(ChatSource(name='x', path='{data}'),))\n"
    ),
    "reward": (
        "from jaxlm.reward.config import *\n"
        f"def get_config(): return RewardConfig(model='{{model}}', sources=({SOURCE},))\n"
    ),
    "preference": (
        "from jaxlm.preference.config import *\nfrom jaxlm.reward.config import *\n"
        f"def get_config(): return PreferenceConfig(model='{{model}}', sources=({SOURCE},), dpo=DPOConfig())\n"
    ),
    "rl": (
        "from jaxlm.rl.config import *\nfrom jaxlm.data.config import *\nfrom jaxlm.feedback.config import *\n"
        "def get_config(): return RLConfig(model='{model}', sources=(ChatSource(name='x', path='{data}'),), "
        "grpo=GRPOConfig(), samples=2, verifiers=(VerifierConfig(kind='exact'),))\n"
    ),
    "evaluate": (
        "from jaxlm.evaluate.config import *\n"
        "def get_config(): return EvaluateConfig(model='{model}', texts=('{data}',))\n"
    ),
    "sample": (
        "from jaxlm.sample.config import *\ndef get_config(): return SampleConfig(model='{model}', prompts=('a',))\n"
    ),
}


def sentencepiece_tokenizer(algorithm):
    texts = [path.read_text() for path in sorted((TOOL.parent.parent.parent / "jaxlm/base").glob("*.py"))]
    config = TokenizerConfig(documents="texts", vocab_size=600, algorithm=algorithm)
    return SentencePieceTokenizer(train.train(texts, config)), texts


def test_our_own_tokenizers_are_written_for_others(tmp_path):
    """tokenizer.json makes the same tokens of every text, with BOS in front as documents are packed."""
    trained, texts = sentencepiece_tokenizer("bpe")
    for number, tokenizer in enumerate((ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_end|>")), trained)):
        folder = tmp_path / str(number)
        folder.mkdir()
        exchange.write(tokenizer, None, epath.Path(folder), 64)
        again = exchange.read_tokenizer(epath.Path(folder), tokenizer.vocab_size, Generation({}, (), None, None))
        assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert again.special_ids == tokenizer.special_ids
        for text in texts:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == text
        np.testing.assert_array_equal(again.token_bytes(), tokenizer.token_bytes())


@functools.cache
def numbers(config):
    return jax.jit(functools.partial(initialize, define_model(config), 0))()


BYTES = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))


def our_model(folder, config, facts=None, tokenizer=BYTES, chats=True):
    tokenizers.save(tokenizer, folder / "tokenizer")
    params = numbers(config)
    source = (Path(train.__file__).parent / "templates/chatml.jinja").read_text()
    chat = ChatTemplate(source, tokenizer) if chats else None
    written = {"inputs": {}, "config": {}, "facts": {"row_length": 32} | (facts or {})}
    model_directory.write(folder / "model", params, config, folder / "tokenizer", chat_template=chat, **written)
    return folder


OURS = ModelConfig(vocab_size=264, layers=2, width=16, heads=2, kv_heads=1, qk_norm=True, compute="float32").complete()


def test_a_model_of_ours_goes_out_and_comes_back(tmp_path):
    folder = our_model(tmp_path, OURS, facts={"gate": {"passed": True}})
    assert main(["export", f"--model={folder}", f"--output={tmp_path}/output"]) == 0
    first, again = jaxlm.load(folder), jaxlm.load(tmp_path / "output")
    assert first.config == again.config
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    text = "A text, with ümlauts."
    assert first.tokenizer.encode(text) == again.tokenizer.encode(text)
    assert first.sampler.ends[0] == again.sampler.ends[0]
    assert set(first.sampler.ends) == set(again.sampler.ends)
    messages = [{"role": "user", "content": "Hello"}]
    assert first.encode(messages, "") == again.encode(messages, "")
    values = json.loads((tmp_path / "output/config.json").read_text())
    assert values["architectures"] == ["Qwen3ForCausalLM"]
    assert values["max_position_embeddings"] == 32
    assert values["eos_token_id"] == [258, 260]


def test_a_reward_model_keeps_its_bias(tmp_path):
    config = dataclasses.replace(OURS, criteria=("helpful",))
    folder = our_model(tmp_path, config)
    params = model_directory.read(folder / "model").load_params(define_model(config))
    params["score_bias"] = params["score_bias"] + 0.25
    written = {"inputs": {}, "config": {}, "facts": {}}
    model_directory.write(folder / "model", params, config, folder / "tokenizer", **written)
    export.main(ExportConfig(model=str(folder), output=f"{tmp_path}/output", without_verdict=True))
    values = json.loads((tmp_path / "output/config.json").read_text())
    assert values["architectures"] == ["Qwen3ForSequenceClassification"]
    assert values["id2label"] == {"0": "helpful"}
    assert values["score_bias"] == [0.25]
    read = hugging_face.read(tmp_path / "output")
    assert read.config.criteria == ("helpful",)
    jax.tree.map(np.testing.assert_array_equal, read.load_params(define_model(read.config)), params)


def test_what_the_gate_has_not_passed_is_not_exported(tmp_path, capsys):
    reasons = ["safe: safety.refusal is 0.300 (0.181 to 0.454); at least 0.8 is asked of its worse end"]
    refused = {"no verdict": None, "refused": {"passed": False, "reasons": reasons}, "strange": "yes"}
    for name, verdict in refused.items():
        folder = our_model(tmp_path / name, OURS, facts={"gate": verdict} if verdict else {})
        with pytest.raises(Refused, match="gate"):
            export.main(ExportConfig(model=str(folder), output=f"{tmp_path}/output"))
        assert main(["export", f"--model={folder}", f"--output={tmp_path}/output"]) == 3
    said = capsys.readouterr().err
    assert "has no verdict of the gate" in said
    assert reasons[0] in said, "why it was refused, not only that it was"
    assert not (tmp_path / "output").exists()


def test_the_command_line(tmp_path, capsys):
    source = copied(tmp_path)
    assert main(["import", f"--source={source}", f"--workdir={tmp_path}/run"]) == 0
    assert manifest.read(tmp_path / "run/model").facts["hugging_face"]["model_type"] == "llama"
    assert main(["import", f"--source={tmp_path}/nowhere", f"--workdir={tmp_path}/other"]) == 2
    assert "nowhere is no Hugging Face directory" in capsys.readouterr().err
    assert main(["import", f"--source={source}"]) == 2
    assert "give --workdir=DIR" in capsys.readouterr().err
    assert main(["export", f"--model={source}", f"--output={tmp_path}/out"]) == 2
    assert "python -m jaxlm import" in capsys.readouterr().err
    assert main(["export", f"--modle={source}"]) == 2
    config = make_config("export", *parse_arguments("export", ["x", "--dtype=bfloat16"]))
    assert isinstance(config, ExportConfig)
    assert (config.model, config.dtype) == ("x", "bfloat16")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(change):
    def damage(folder):
        stored = safetensors.numpy.load_file(folder / "model.safetensors")
        change(stored)
        safetensors.numpy.save_file(stored, folder / "model.safetensors")

    return damage


def absurd(folder):
    header = {"lm_head.weight": {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}}
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * 64)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map):
    def damage(folder):
        (folder / hugging_face.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def edit(name, **changes):
    def damage(folder):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        kept = {key: value for key, value in (values | changes).items() if value != "gone"}
        (folder / name).write_text(json.dumps(kept))

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


HEAD = "lm_head.weight"
DAMAGED = {
    "cut off": (cut, "model.safetensors: is not a sound safetensors file"),
    "a tensor is missing": (rewrite(lambda t: t.pop("model.norm.weight")), r"missing: model.norm.weight \[16\]"),
    "a tensor has another name": (
        rewrite(lambda t: t.update({"model.layers.9.x": t.pop("model.norm.weight")})),
        r"(?s)missing: model.norm.weight.*unknown: model.layers.9.x \[16\]",
    ),
    "turned": (
        rewrite(lambda t: t.update({HEAD: t[HEAD].T.copy()})),
        r"lm_head.weight: is F32\[16, 71\], but \[71, 16\]",
    ),
    "float64": (rewrite(lambda t: t.update({HEAD: t[HEAD].astype(np.float64)})), "lm_head.weight: is F64"),
    "int8": (rewrite(lambda t: t.update({HEAD: t[HEAD].astype(np.int8)})), "lm_head.weight: is I8"),
    "float8": (
        rewrite(lambda t: t.update({HEAD: t[HEAD].astype(ml_dtypes.float8_e4m3fn)})),
        "lm_head.weight: is F8_E4M3",
    ),
    "not a number": (rewrite(lambda t: t.update({HEAD: t[HEAD] * np.float32(np.nan)})), "not finite: head"),
    "a size past all memory": (absurd, "is not a sound safetensors file"),
    "a pickle": (pickled, "pytorch_model.bin: is a pickle"),
    "no weights": (without("model.safetensors"), "holds neither model.safetensors nor"),
    "a shard is missing": (
        index({HEAD: "model-00007-of-00009.safetensors"}),
        "model-00007-of-00009.safetensors: is missing",
    ),
    "a shard elsewhere": (index({HEAD: "../model.safetensors"}), "is no safetensors file beside it"),
    "a shard that is no safetensors": (index({HEAD: "model.bin"}), "'model.bin', which is no safetensors file"),
    "an index of nothing": (index({}), "has no weight_map"),
    "no JSON": (text("config.json", "{"), "config.json: is not valid JSON"),
    "tied, but two tables": (edit("config.json", tie_word_embeddings=True), "lm_head.weight differs from model.embed"),
    "no tokenizer": (without("tokenizer.json"), "holds neither tokenizer.json nor tokenizer.model"),
    "a tokenizer that is none": (
        text("tokenizer.json", '{"model": {"type": "Guess"}}'),
        "tokenizer.json: cannot be read",
    ),
    "no end of text": (
        lambda folder: [
            edit("tokenizer_config.json", eos_token="gone")(folder),
            edit("config.json", eos_token_id="gone")(folder),
            (folder / "generation_config.json").unlink(),
        ],
        "names no eos_token",
    ),
    "a template that fails": (text("chat_template.jinja", "{{ messages[7].content.x }}"), "chat_template=none"),
    "a template of unknown tokens": (text("chat_template.jinja", "<|user|>{{ messages[0].content }}"), r"<\|user\|>"),
    "stops that are no ids": (edit("generation_config.json", eos_token_id="</s>"), "eos_token_id is '</s>'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_refused(case, tmp_path):
    damage, said = DAMAGED[case]
    source = copied(tmp_path)
    damage(source)
    with pytest.raises((UserError, Refused), match=said) as refused:
        imported(tmp_path, source)
    assert len(str(refused.value)) < 1500
    assert not (tmp_path / "imported/manifest.json").exists()


def test_a_tokenizer_larger_than_the_model_is_cut_or_refused(tmp_path):
    """Tokens without a row are left out where they were added, and refused where they are the tokenizer's own."""
    source = copied(tmp_path)
    values = json.loads((source / "tokenizer.json").read_text())
    extra = {"id": 71, "content": "<image>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append(extra | {"normalized": False})
    (source / "tokenizer.json").write_text(json.dumps(values))
    assert hugging_face.read(source).tokenizer().vocab_size <= 71
    values["model"]["vocab"] |= {"zz": 100}
    (source / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="has 101 tokens, the model only 71"):
        hugging_face.read(source).tokenizer()


def test_export_goes_nowhere_where_something_else_is(tmp_path):
    folder = our_model(tmp_path, OURS)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="holds something else"):
        export.main(ExportConfig(model=str(folder), output=f"{tmp_path}/output", without_verdict=True))
    with pytest.raises(UserError, match="has numbers that F16 has not"):
        params = dict(numbers(OURS))
        params["embedding"] = params["embedding"] + 1e5
        written = {"inputs": {}, "config": {}, "facts": {}}
        model_directory.write(folder / "model", params, OURS, folder / "tokenizer", **written)
        config = ExportConfig(model=str(folder), output=f"{tmp_path}/new", dtype="float16", without_verdict=True)
        export.main(config)
    assert not (tmp_path / "new/manifest.json").exists()


OURS_LIVE = ("ours", "ours, sentencepiece", "ours, a reward model", "ours, an encoder")
ENCODER = ModelConfig(
    vocab_size=264,
    layers=2,
    width=18,
    heads=6,
    feed_forward=20,
    causal=False,
    norm="layer",
    norm_place="sum",
    biases=("qkv", "output", "mlp"),
    gated_mlp=False,
    activation="gelu_exact",
    learned_positions=40,
    token_types=2,
    head="transform",
    tied_embeddings=True,
    compute="float32",
).complete()
ROWS = np.random.default_rng(0).integers(3, 64, (2, 24)).tolist()


def exported(folder, name):
    """A model directory, and in folder/output what it was exported as."""
    folder.mkdir()
    if name in ALL:
        # transformers 5 gives qwen2 models Qwen2's own way to cut text, whatever tokenizer they have.
        tokenizer = "byte-level" if name.startswith("qwen2") else TOKENIZERS[len(name) % 2]
        tokenizer = "wordpiece" if name in ENCODERS else tokenizer
        made = imported(folder, copied(folder, name, tokenizer), compute="float32")
    else:
        config = dataclasses.replace(OURS, criteria=("overall",)) if "reward" in name else OURS
        config = ENCODER if "encoder" in name else config
        tokenizer = sentencepiece_tokenizer("bpe")[0] if "sentencepiece" in name else BYTES
        tokenizer = ByteTokenizer(("<pad>", "<s>", "</s>", "[MASK]")) if "encoder" in name else tokenizer
        config = dataclasses.replace(config, vocab_size=600)
        made = our_model(folder, config, tokenizer=tokenizer, chats="encoder" not in name)
    export.main(ExportConfig(model=str(made), output=f"{folder}/output", without_verdict=True))
    return made


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Name → (model directory, what transformers found in its export), all of them in one process of its own."""
    root = tmp_path_factory.mktemp("live")
    made = {name: exported(root / str(number), name) for number, name in enumerate([*ALL, *OURS_LIVE])}
    outputs = {name: f"{root}/{number}/output" for number, name in enumerate(made)}
    command = [PYTHON, str(TOOL), "check", *outputs.values()]
    ran = subprocess.run(command, input=json.dumps(ROWS), capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout.splitlines()[-1])
    return {name: (folder, said[outputs[name]]) for name, folder in made.items()}


# Where JAXLM_TRANSFORMERS_PYTHON or JAXLM_PARITY_PYTHON names a Python that has torch and transformers.
if PYTHON:

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [*ALL, *OURS_LIVE])
    def test_transformers_loads_what_was_exported(name, live):
        """Live: nothing missing, nothing left over, no warning; the same logits, tokens, chat text and stops."""
        folder, said = live[name]
        lm = jaxlm.load(folder)
        assert said["loading"] == {}
        assert said["warnings"] == []
        last = [] if lm.config.causal else [lm.tokenizer.eos_id]
        assert [*lm.sampler.encode("the cat sees a dog"), *last] == said["ids"]
        if lm.chat_template:
            assert lm.chat_template.render([{"role": "user", "content": "the cat sees a dog"}]) == said["chat"]
        if lm.config.criteria:
            got = last_scores(lm.definition, lm.params, *padded(ROWS))[: len(ROWS)]
        elif lm.config.head == "pooler":
            rows = [x[: len(ROWS)] for x in padded(ROWS)]
            hidden = apply(lm.definition, lm.params, lambda m: m(*map(jnp.asarray, rows))[0])
            got = hidden[:, : len(ROWS[0])]
        elif not lm.config.causal:
            got = lm.logits(ROWS)
            assert said["mask"] == "[MASK]"
        else:
            got = lm.logits(ROWS)
            ends = said["eos"] if isinstance(said["eos"], list) else [said["eos"]]
            assert set(ends) == set(lm.sampler.ends)
        np.testing.assert_allclose(got, np.array(said["logits"]), atol=1e-4, rtol=0)
