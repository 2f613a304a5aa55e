"""A model directory gives back what was written, in any layout, on any mesh, and refuses what is not that."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxlm.base import manifest
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import Refused, UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.model import layout
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model, for_inference
from jaxlm.model.weights import initialize
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import model_directory

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_end|>"))
CONFIG = ModelConfig(
    vocab_size=264, layers=5, width=16, heads=4, kv_heads=2, qk_norm=True, pattern=("local", "global"), window=4
).complete()
SCANNED = define_model(CONFIG)
PARAMS = jax.jit(functools.partial(initialize, SCANNED, 0))()


def write(folder, params=PARAMS, config=CONFIG):
    tokenizers.save(TOKENIZER, folder.parent / "tokenizer")
    facts = {"row_length": 64}
    model_directory.write(folder, params, config, folder.parent / "tokenizer", inputs={}, config={}, facts=facts)
    return folder


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def test_round_trip_in_both_layouts(folder):
    found = model_directory.read(folder)
    assert found.config == CONFIG
    assert found.manifest.facts["row_length"] == 64
    assert found.tokenizer().hash == TOKENIZER.hash
    equal(found.load_params(SCANNED), PARAMS)
    unrolled, definition = for_inference(CONFIG)
    equal(
        found.load_params(definition),
        jax.tree.map(lambda x, like: x.astype(like.dtype), layout.unroll(PARAMS, CONFIG), definition.abstract()),
    )
    # Written unrolled, it is the same files.
    again = write(folder.parent / "again", layout.unroll(PARAMS, CONFIG), unrolled)
    params = "params/model-00001.safetensors"
    assert manifest.read(again).files[params] == manifest.read(folder).files[params]


def test_tensors_are_named_by_layer(folder):
    tensors = safetensors.numpy.load_file(folder / "params/model-00001.safetensors")
    np.testing.assert_array_equal(tensors["layers.3.attention.query"], PARAMS["stack"]["1"]["attention"]["query"][1])
    np.testing.assert_array_equal(tensors["layers.4.mlp.up"], PARAMS["tail"]["4"]["mlp"]["up"])
    assert {"embedding", "final_norm.scale", "head"} <= set(tensors)
    assert sum(tensor.size for tensor in tensors.values()) == SCANNED.parameter_count()


def test_sharded_parameters_are_written_and_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(model_directory, "SHARD_BYTES", 20_000)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    shardings = SCANNED.shardings(mesh)
    folder = write(tmp_path / "model", jax.device_put(PARAMS, shardings))
    assert len(list((folder / "params").glob("model-*.safetensors"))) > 3
    read = model_directory.read(folder)
    got = read.load_params(SCANNED, shardings)
    equal(got, PARAMS)
    jax.tree.map(lambda x, placed: x.sharding.is_equivalent_to(placed, x.ndim) or pytest.fail(str(x)), got, shardings)
    equal(read.load_params(SCANNED), PARAMS)


def test_a_rewritten_directory_holds_the_new_parameters(folder):
    changed = jax.tree.map(lambda x: x + 1, PARAMS)
    write(folder, changed)
    equal(model_directory.read(folder).load_params(SCANNED), changed)


@pytest.mark.parametrize(
    "file", ["params/model-00001.safetensors", "config.json", "params/model.safetensors.index.json"]
)
def test_a_flipped_byte_is_refused_by_file(folder, file):
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: its content differs"):
        model_directory.read(folder)


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    broken = PARAMS | {"embedding": PARAMS["embedding"].at[3, 1].set(jnp.nan)}
    with pytest.raises(Refused, match="not finite: embedding"):
        write(tmp_path / "model", broken)
    assert not (tmp_path / "model/manifest.json").exists()


def test_an_unfinished_or_newer_directory_is_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"format_version": 2}))
    with pytest.raises(UserError, match=r"config.json: has format_version 2, this jaxlm reads 1"):
        model_directory.read(folder, verify=False)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        model_directory.read(folder)


def test_tensors_that_do_not_fit_are_listed(folder):
    path = folder / "params/model-00001.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["layers.0.mlp.up"] = tensors["layers.0.mlp.up"].T.copy()
    tensors["final_norm.scale"] = tensors["final_norm.scale"].astype(np.float16)
    tensors["layers.9.mlp.up"] = tensors.pop("layers.1.mlp.up")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError) as refused:
        model_directory.read(folder, verify=False).load_params(SCANNED)
    for problem in (
        "final_norm.scale: is F16[16], but F32[16] is needed",
        "layers.0.mlp.up: is F32[128, 16], but F32[16, 128] is needed",
        "missing: layers.1.mlp.up [16, 128]",
        "unknown: layers.9.mlp.up [16, 128]",
    ):
        assert problem in str(refused.value)


def test_a_file_that_declares_absurd_sizes_is_refused(folder):
    header = json.dumps({"embedding": {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}}).encode()
    (folder / "params/model-00001.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(UserError, match="is not a sound safetensors file"):
        model_directory.read(folder, verify=False).load_params(SCANNED)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="has 260 tokens, the model only 200"):
        write(tmp_path / "model", config=ModelConfig(vocab_size=200, layers=1, width=8, heads=1).complete())
