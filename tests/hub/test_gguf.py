"""GGUF: logits and tokens as others read the same files (make_gguf_fixtures.py); out and in; what is refused."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxlm
from jaxlm.__main__ import main
from jaxlm.base import manifest
from jaxlm.base.errors import UserError
from jaxlm.hub import gguf as reading
from jaxlm.hub import gguf_export, gguf_tokenizers, hugging_face
from jaxlm.hub.config import ExportConfig, ImportConfig
from jaxlm.hub.fields import alike
from jaxlm.hub.gguf_fields import Header, config_values, header_values, llama3_factors, require_readable
from jaxlm.model.transformer import for_inference
from jaxlm.stages import export, import_
from jaxlm.tokenizer import chat, train
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.tokenizer.sentencepiece import SentencePieceTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FILES = FIXTURES / "gguf"
CASES = sorted(path.stem for path in FILES.glob("*.gguf"))
TOOL = Path(__file__).parent / "make_gguf_fixtures.py"
PYTHON = os.environ.get("JAXLM_TRANSFORMERS_PYTHON", "")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_others(name):
    """transformers' logits of the same file; tokens of sentencepiece or tokenizers, from which the vocabulary came."""
    lm = jaxlm.load(FILES / f"{name}.gguf", compute="float32")
    expected = safetensors.numpy.load_file(FILES / f"{name}.safetensors")
    # Gemma 3's seven layers with heads of 256 numbers differ by 6e-5, the others by 8e-6 at the most.
    np.testing.assert_allclose(lm.logits(expected["ids"]), expected["logits"], atol=1e-4, rtol=0)
    for text, ids in json.loads((FILES / f"{name}.json").read_text()).items():
        assert lm.tokenizer.encode(text) == ids, text
        assert lm.tokenizer.decode(ids) == text
    assert lm.chat_template is not None
    assert lm.context_tokens == (1024 if name == "gpt2" else 64)
    assert (lm.tokenizer.bos_id is None) == (lm.tokenizer.special_ids.keys() >= {"<|endoftext|>"})


# Dequantising, number by number, after the layouts in ggml (ggml-quants.h and dequantize_row_*)


def half(data):
    return float(np.frombuffer(bytes(data), np.float16)[0])


def q8_0(block):
    return [half(block[:2]) * np.int8(np.uint8(b)) for b in block[2:34]]


def q4_0(block):
    low, high = [b & 15 for b in block[2:18]], [b >> 4 for b in block[2:18]]
    return [half(block[:2]) * (int(q) - 8) for q in low + high]


def q4_1(block):
    low, high = [b & 15 for b in block[4:20]], [b >> 4 for b in block[4:20]]
    return [half(block[:2]) * int(q) + half(block[2:4]) for q in low + high]


def q4_k(block):
    d, least, scales, quants = half(block[:2]), half(block[2:4]), [int(b) for b in block[4:16]], block[16:144]
    made = []
    for part in range(8):
        if part < 4:
            scale, minimum = scales[part] & 63, scales[part + 4] & 63
        else:
            scale = (scales[part + 4] & 15) | (scales[part - 4] >> 6 << 4)
            minimum = (scales[part + 4] >> 4) | (scales[part] >> 6 << 4)
        bytes_ = quants[part // 2 * 32 : part // 2 * 32 + 32]
        made += [d * scale * (int(b) >> 4 if part % 2 else int(b) & 15) - least * minimum for b in bytes_]
    return made


def q6_k(block):
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:210])
    made = np.zeros(256)
    for begin in (0, 128):
        for i in range(32):
            a, b, h = (int(x) for x in (low[begin // 2 + i], low[begin // 2 + i + 32], high[begin // 4 + i]))
            for k, nibble in enumerate((a & 15, b & 15, a >> 4, b >> 4)):
                q = (nibble | (h >> 2 * k & 3) << 4) - 32
                made[begin + 32 * k + i] = d * int(scales[begin // 16 + 2 * k + i // 16]) * q
    return made


BY_HAND = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q4_K": q4_k, "Q6_K": q6_k}


def random_blocks(kind, rows, blocks):
    """Bytes of any value, but scales of about 1e-2."""
    random = np.random.default_rng(0)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        data[..., at : at + 2] = random.normal(0, 1e-2, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.fixture
def stored(tmp_path):
    """Kind of quantisation → a tensor of 3 rows of such blocks in a file, and its bytes."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    data = {kind: random_blocks(kind, 3, 2) for kind in reading.QUANTIZED if kind in BY_HAND}
    for kind, blocks in data.items():
        writer.add_tensor(kind, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    for kind in ("F32", "F16", "BF16"):
        values = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
        data[kind] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, data[kind], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    return {t.name: (reading.StoredTensor(t, None), data[t.name]) for t in tensors}


@pytest.mark.parametrize("kind", [*BY_HAND, "F32", "F16", "BF16"])
def test_dequantised_numbers(stored, kind):
    tensor, data = stored[kind]
    got = tensor[:]
    np.testing.assert_array_equal(got, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert got.dtype == np.float32
    assert list(got.shape) == tensor.get_shape()
    if kind in BY_HAND:
        blocks = data.reshape(3, 2, -1)
        by_hand = [np.concatenate([BY_HAND[kind](block) for block in row]) for row in blocks]
        # Products of a few float32 numbers: each rounds once or twice.
        np.testing.assert_allclose(got, by_hand, rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(got, np.arange(12, dtype=np.float32).reshape(3, 4) / 8)
    np.testing.assert_array_equal(tensor[1:, 1:3], got[1:, 1:3])  # no more rows than are asked for


def test_blocks_checked_by_hand():
    """Q8_0: the scale .5, then -2, 3, 0, …; Q4_0: nibbles 0 and 15 of the first byte are numbers 0 and 16."""
    block = np.zeros(34, np.uint8)
    block[:4] = [*np.array(0.5, np.float16).tobytes(), 254, 3]
    read = gguf.quants.dequantize(block[None], gguf.GGMLQuantizationType.Q8_0)[0]
    assert read[:3].tolist() == [-1.0, 1.5, 0.0]
    block = np.full(18, 8 | 8 << 4, np.uint8)
    block[:3] = [*np.array(0.25, np.float16).tobytes(), 0 | 15 << 4]
    read = gguf.quants.dequantize(block[None], gguf.GGMLQuantizationType.Q4_0)[0]
    assert (read[0], read[1], read[16], read[17]) == (-2.0, 0.0, 1.75, 0.0)


# Out and in


def imported(tmp_path, source):
    import_.main(ImportConfig(source=str(source), workdir=str(tmp_path / "in")))
    return tmp_path / "in"


def exported(tmp_path, model, **fields):
    config = ExportConfig(model=str(model), output=str(tmp_path / "out"), format="gguf", without_verdict=True, **fields)
    return export.main(config), tmp_path / "out/model.gguf"


def read_file(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2"])
def test_what_was_read_is_written_as_llama_cpp_does(tmp_path, name):
    """Bit for bit the tensors of the fixture's converter, which is not ours: transformers gives them the same logits.

    A test for CI's machines, which have no torch: this file is one that transformers has read.
    """
    source = FILES / f"{name}.gguf"
    dtype = {"qwen2": "float32"}.get(name, "float16")
    _, path = exported(tmp_path, imported(tmp_path, source), dtype=dtype)
    fields, tensors = read_file(source)
    again, written = read_file(path)
    assert written.keys() == tensors.keys()
    for tensor, (kind, shape, data) in tensors.items():
        if tensor == "position_embd.weight":  # the fixture has it in half the bytes
            data = np.frombuffer(data, np.float16).astype(np.float32).tobytes()
            kind = "F32"
        assert (written[tensor][0], written[tensor][1]) == (kind, shape), tensor
        assert written[tensor][2] == data, tensor
    inexact = ("tokenizer.ggml.scores", f"{name}.vocab_size", "tokenizer.ggml.bos_token_id")
    assert {key: again[key] for key in fields if key not in inexact and key in again} == {
        key: value for key, value in fields.items() if key not in inexact and key in again
    }
    lost = fields.keys() - again.keys() - {f"{name}.vocab_size", "tokenizer.ggml.bos_token_id"}
    assert lost == set()


# Families of which transformers reads no GGUF, or which say more than it reads; test_families.py has their logits.
FAMILIES = ["llama", "llama-3", "llama-biases", "llama-yarn", "mistral-whole", "qwen3", "gemma", "gemma2", "olmo2"]
FAMILIES += ["phi3-partial", "smollm3", "mixtral", "gpt2-untied"]


def directory_of(tmp_path, name):
    """A family's fixture as a model directory of ours, with a tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in (*(FIXTURES / name).iterdir(), *(FIXTURES / "tokenizer-byte-level").iterdir()):
        shutil.copy(path, folder / path.name)
    values = json.loads((folder / "config.json").read_text())
    if name == "gemma2":  # llama.cpp scales queries by the size of a head
        values["query_pre_attn_scalar"] = values["head_dim"]
    if name == "llama-yarn":  # and always rounds where its ramp begins and ends
        values["rope_parameters"] = values["rope_parameters"] | {"truncate": True}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        # Tokens of a fixture are cut in no way that llama.cpp has a name for: a single split at spaces.
        patch.setattr(gguf_export.gguf_tokenizers, "_name_of_pre", lambda values, pairs: "gpt-2")
        exported(tmp_path, imported(tmp_path, folder), dtype="float32")
    return hugging_face.read(folder, "float32"), tmp_path / "out/model.gguf"


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_come_back(tmp_path, name):
    """Every weight of the Hugging Face directory, exactly (norms that hold a 1: to a float32's last bit)."""
    theirs, path = directory_of(tmp_path, name)
    ours = reading.read(path, "float32")
    assert alike(ours.config, theirs.config) == []
    definition = for_inference(theirs.config)[1]
    before, after = theirs.load_params(definition), ours.load_params(definition)
    tolerance = 1.2e-7 if name.startswith("gemma") else 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=0), before, after)
    assert (ours.tokenizer().encode("the cat"), ours.tokenizer().eos_id) == (
        theirs.tokenizer().encode("the cat"),
        theirs.tokenizer().eos_id,
    )
    assert ours.generation().eos_ids[0] == theirs.generation().eos_ids[0]


def test_llama_3_factors():
    """Of Llama 3.2 1B, against its formula by hand at three frequencies: fast, between, slow."""
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    factors = llama3_factors(500_000.0, 64, scaling)
    assert (factors[0], factors[-1]) == (1.0, 32.0)
    wave = 2 * np.pi * 500_000 ** (2 * 16 / 64)  # 4442.9 positions: between 8192 / 4 and 8192
    smooth = (8192 / wave - 1) / 3
    np.testing.assert_allclose(factors[16], 1 / ((1 - smooth) / 32 + smooth), rtol=1e-6)
    shapes = {"token_embd.weight": (71, 2048), "output.weight": (71, 2048)}
    values = {"general.architecture": "llama", "llama.embedding_length": 2048, "llama.attention.head_count": 32}
    values |= {"llama.rope.freq_base": 500_000.0}
    read = config_values(Header(values, "x"), shapes, factors)["rope_scaling"]
    assert read == scaling | {"rope_type": "llama3"}
    with pytest.raises(UserError, match="rope_freqs.weight is not understood"):
        config_values(Header(values, "x"), shapes, factors[::-1].copy())


def test_q8_0_out(tmp_path):
    """Matrices as gguf quantises them, vectors exact; the logits are near."""
    folder = imported(tmp_path, FILES / "llama.gguf")
    summary, path = exported(tmp_path, folder, quantization="q8_0")
    _, tensors = read_file(path)
    _, before = read_file(FILES / "llama.gguf")
    for name, (kind, shape, data) in tensors.items():
        if len(shape) == 1:
            assert (kind, shape, data) == before[name]
            continue
        assert kind == "Q8_0"
        values = np.frombuffer(before[name][2], np.float16).astype(np.float32).reshape(-1, 32)
        assert data == gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()
        again = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(-1, 34), gguf.GGMLQuantizationType.Q8_0)
        # Half a step of 127 to the largest, and half a step of the scale's 11 bits over up to 127 steps.
        bound = np.abs(values).max(axis=1, keepdims=True) * (1 / 254 + 2.0**-11)
        assert (np.abs(again - values) <= bound).all()
    assert "MB of Q8_0" in summary["figure"]
    assert manifest.read(tmp_path / "out").facts["dtype"] == "Q8_0"


# Where JAXLM_TRANSFORMERS_PYTHON names a Python that has torch, transformers and gguf.
if PYTHON:

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["float16", "q8_0"])
    def test_transformers_loads_what_was_written(tmp_path, kind):
        """Live: the same logits as ours, of each architecture that it reads."""
        fields = {"quantization": "q8_0"} if kind == "q8_0" else {"dtype": kind}
        folders = {name: tmp_path / name for name in CASES}
        models = {name: imported(folder, FILES / f"{name}.gguf") for name, folder in folders.items()}
        paths = [exported(folder, models[name], **fields)[1] for name, folder in folders.items()]
        rows = [[5, 9, 17, 200, 31, 44, 8, 77], [100, 3, 4, 250, 260, 6, 7, 8]]
        check = [PYTHON, str(TOOL), "check", *map(str, paths)]
        done = subprocess.run(check, input=json.dumps(rows), capture_output=True, text=True, check=True)
        for path, logits in json.loads(done.stdout.splitlines()[-1]).items():
            np.testing.assert_allclose(jaxlm.load(path, compute="float32").logits(rows), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
def test_our_own_tokenizers_go_out(tmp_path, kind):
    """The same tokens from the file, special ones too; unigram models are refused, since llama.cpp has them for T5."""
    special = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    if kind == "byte":
        tokenizer = ByteTokenizer(special)
    else:
        texts = [path.read_text() for path in sorted((TOOL.parent.parent.parent / "jaxlm/base").glob("*.py"))]
        config = TokenizerConfig(documents="x", algorithm=kind, vocab_size=600, special_tokens=special[3:])
        tokenizer = SentencePieceTokenizer(train.train(texts, config))
    template = chat.load("chatml", tokenizer)
    if kind == "unigram":
        with pytest.raises(UserError, match="is a Unigram model|cannot be written as tokenizer.json"):
            gguf_tokenizers.written(tokenizer, template, tokenizer.vocab_size)
        return
    said = gguf_tokenizers.written(tokenizer, template, tokenizer.vocab_size + 7)
    again = gguf_tokenizers.read(Header(said, "x"), tokenizer.vocab_size + 7)
    for text in ("the cat", "", "  naïve 你好 🙂\n\n", "</s><|im_end|>", "\u2581"):
        assert again.encode(text) == tokenizer.encode(text) or text == "\u2581", text
        assert again.decode(again.encode(text)) == text or text == "\u2581"
    assert (again.eos_id, again.bos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    assert again.special_ids == tokenizer.special_ids
    messages = [{"role": "user", "content": "the cat"}]
    read = gguf_tokenizers.read_template(Header(said, "x"), again)
    assert read is not None
    assert read.prompt(messages) == template.prompt(messages)
    assert said["tokenizer.ggml.eot_token_id"] == tokenizer.special_ids["<|im_end|>"]


def test_what_llama_cpp_has_not_is_refused(tmp_path):
    read = lambda name: hugging_face.read(FIXTURES / name).config
    for name, message in (
        ("qwen3-biases", "has no biases in qwen3 models"),
        ("reward-llama", "has no reward heads"),
        ("pythia", "no models as gpt_neox's"),
        ("mistral", "no models as mistral's"),
    ):
        with pytest.raises(UserError, match=message):
            header_values(read(name), "", 64)
    with pytest.raises(UserError, match="gemma2 models have another query_scalar"):
        theirs, header = read("gemma2"), header_values(read("gemma2"), "", 64)[1]
        shapes = {"token_embd.weight": (71, 16)}
        require_readable(header | {"general.architecture": "gemma2"}, shapes, theirs)


# What is refused


def changed(tmp_path, **fields):
    """The llama fixture with other fields, None for left out."""
    reader = gguf.GGUFReader(FILES / "llama.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", fields.pop("arch", "llama"))
    extra = fields.pop("tensor", None)
    values = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.") and n != "general.architecture"}
    named = {key.replace("__", "."): value for key, value in fields.items()}
    for name, field in values.items():
        if name not in named:
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for name, value in named.items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add.get(type(value), writer.add_float32)(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if extra:
        writer.add_tensor(extra, np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "mamba"}, "general.architecture 'mamba' is not understood.*llama, qwen2"),
        ({"llama__expert_shared_count": 2}, "llama.expert_shared_count not understood"),
        ({"llama__attention__sliding_window": 4}, "llama.attention.sliding_window not understood"),
        ({"llama__block_count": 10**9}, "block_count is more than its"),
        ({"llama__block_count": 1}, "unknown: blk.1.attn_k.weight"),
        ({"llama__block_count": None}, "num_hidden_layers is missing"),
        ({"llama__embedding_length": 48}, "dimension_count is 8; only 12|do not fit its header"),
        ({"llama__feed_forward_length": 10**9}, "do not fit its header"),
        ({"llama__attention__head_count": "two"}, "llama.attention.head_count is 'two', which is no int"),
        ({"llama__attention__head_count": 0}, "num_attention_heads 0; 1 or more"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count is 4; only 8"),
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type 'longrope' is not understood"),
        ({"llama__vocab_size": 5}, "llama.vocab_size is 5"),
        ({"tensor": "blk.0.odd.weight"}, "unknown: blk.0.odd.weight"),
        ({"split__count": 3}, "split.count is 3"),
        ({"general__type": "adapter"}, "general.type is 'adapter'"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model 't5' is not understood"),
        ({"tokenizer__ggml__model": "gpt2"}, "tokenizer.ggml.pre 'default' is not understood"),
        ({"tokenizer__ggml__tokens": ["a"]}, "do not fit each other"),
        ({"tokenizer__ggml__eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "eos is 1000000"),
        ({"tokenizer__ggml__add_eos_token": True}, "tokenizer.ggml.add_eos_token is True"),
        ({"tokenizer__ggml__scores": [0.0] * 330}, "do not tell how its tokens are joined"),
        ({"tokenizer__ggml__precompiled_charsmap": [1, 2]}, "precompiled_charsmap not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        directory = reading.read(changed(tmp_path, **fields))
        directory.load_params(for_inference(directory.config)[1])


def test_cut_off_and_foreign_files(tmp_path):
    content = (FILES / "llama.gguf").read_bytes()
    for end in (0, 3, 8, 20, 24, 100, 5000, len(content) // 2, len(content) - 64):
        (tmp_path / "x.gguf").write_bytes(content[:end])
        with pytest.raises(UserError, match="is no GGUF file|is not a sound GGUF file, damaged or cut off"):
            reading.read(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    with pytest.raises(UserError, match="is no GGUF file of version 2 or 3"):
        reading.read(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="damaged or cut off"):
        jaxlm.load(tmp_path / "missing.gguf")


@pytest.mark.parametrize("at", [8, 16, 24])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, at, peak_growth):
    """Tensors, keys, and the length of the first key's name."""
    content = bytearray((FILES / "llama.gguf").read_bytes())
    for size in (2**40, 2**62, 2**64 - 1):
        content[at : at + 8] = struct.pack("<Q", size)
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match="damaged or cut off"):
            reading.read(tmp_path / "x.gguf")
    assert peak_growth() < 2**26


def test_commands(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert main(["import", f"--source={FILES}/qwen3.gguf", f"--workdir={tmp_path}/in"]) == 0
    output = f"--workdir={tmp_path}/out"
    command = ["export", f"--model={tmp_path}/in", output, "--format=gguf", "--without_verdict=true"]
    assert main(command) == 0
    assert (tmp_path / "out/gguf/model.gguf").exists()
    expected = safetensors.numpy.load_file(FILES / "qwen3.safetensors")
    logits = jaxlm.load(tmp_path / "out/gguf/model.gguf").logits(expected["ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    assert main([*command[:-2], "--quantization=q8_0"]) == 2
    assert "quantization: is for GGUF files; set format=gguf" in capsys.readouterr().err
    assert main(["import", f"--source={tmp_path}/out", f"--workdir={tmp_path}/x"]) == 2
