"""Whatever a file or a command line says: it is understood, or refused with a message; nothing else, and at no cost."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath
from harness import TEXTS, damaged_bytes, damaged_json, outcome, quick, values
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.base import config as configs
from jaxlm.base import files, manifest
from jaxlm.base.errors import UserError
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.stages.config import PretrainConfig
from jaxlm.text import readers
from jaxlm.text.config import SourceConfig
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import ChatTemplate, load
from jaxlm.train import model_directory, step_folder

PRETRAIN = PretrainConfig()
FIELDS = [field for field, *_ in configs.describe(PretrainConfig)]
TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
TEMPLATES = {name: load(name, TOKENIZER) for name in ("chatml",)}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello <|im_end|>"},
    {"role": "assistant", "content": "hi"},
]


# Config: the command line and a kept config.json


@quick
@given(
    st.dictionaries(
        st.sampled_from(FIELDS) | st.text(max_size=20) | st.sampled_from(["data.0", "data.x.weight", "a..b", "."]),
        st.text(max_size=20)
        | st.sampled_from([*TEXTS, "1e999", "nan", "-0", "[1, 2", '["a"]', "1,2,3", "none", "1_0"]),
        max_size=3,
    )
)
def test_overrides(changes):
    made = outcome(configs.override, PRETRAIN, changes)
    if made is not None:
        configs.check_types(made)


@quick
@given(damaged_json(configs.to_dict(PRETRAIN)))
def test_kept_configs(tree):
    made = outcome(configs.from_dict, PretrainConfig, tree) if isinstance(tree, dict) else None
    if made is not None:
        assert configs.from_dict(PretrainConfig, configs.to_dict(made)) == made


# Chat templates and conversations


@quick
@given(damaged_json(MESSAGES))
def test_conversations(messages):
    encoded = outcome(TEMPLATES["chatml"].encode, messages)
    if encoded is not None:
        said = sum(message["role"] == "assistant" for message in messages)
        stops = TOKENIZER.id_of("<|im_end|>") if hasattr(TOKENIZER, "id_of") else None
        assert len(encoded.ids) > 0
        if stops is not None:
            assert int((encoded.ids == stops).sum()) == len(messages), "a message's words became a special token"
        assert said >= 0


@quick
@given(damaged_bytes(TEMPLATES["chatml"].source.encode()))
def test_templates(source):
    text = source.decode(errors="replace")
    template = outcome(ChatTemplate, text, TOKENIZER, "template.jinja")
    if template is not None:
        outcome(template.encode, MESSAGES)


# JSONL, plain and compressed


def read_all(path: Path) -> list[readers.Record]:
    return list(readers.read(SourceConfig(name="fuzz", path=str(path)), max_bytes=1000))


LINES = b'{"text": "one"}\n{"text": 2}\n\n{"messages": []}\n{"text": "\\ud83d"}\n'


@quick
@given(
    content=damaged_bytes(LINES)
    | st.binary(max_size=200)
    | st.lists(values, max_size=3).map(lambda x: json.dumps(x).encode())
)
def test_jsonl(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    found = outcome(read_all, tmp_path / "a.jsonl") or []
    assert len(found) <= content.count(b"\n") + 1
    for record in found:
        assert isinstance(record.outcome, str) != bool(record.outcome and record.raw) or record.raw == ""


@quick
@given(content=damaged_bytes(gzip.compress(LINES, mtime=0)))
def test_compressed_jsonl(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    outcome(read_all, tmp_path / "a.jsonl.gz")


# Model directories: manifest, index, safetensors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizers.save(TOKENIZER, folder / "tokenizer")
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=8, heads=1).complete()
    params = jax.jit(lambda: initialize(define_model(config), 0))()
    made: Any = dict(inputs={}, config={}, facts={"row_length": 64})
    model_directory.write(folder / "model", params, config, folder / "tokenizer", **made)
    return folder / "model"


def opened(folder: Path, *, verify: bool = False) -> Any:
    found = model_directory.read(folder, verify=verify)
    return found.load_params(define_model(found.config))


def replaced(model: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    """A copy of the model in which one file says something else."""
    for part in files.walk(model):
        target = tmp_path / "copy" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if part == name else (model / part).read_bytes())
    return tmp_path / "copy"


SHARD = "params/model-00001.safetensors"


@quick
@given(data=st.data())
def test_safetensors(model, tmp_path, data):
    content = data.draw(damaged_bytes((model / SHARD).read_bytes()))
    outcome(opened, replaced(model, tmp_path, SHARD, content))


@quick
@given(data=st.data())
def test_safetensors_headers(model, tmp_path, data):
    """The header is sound JSON of other sizes, types and offsets."""
    content = (model / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(data.draw(damaged_json(json.loads(content[8 : 8 + length])))).encode(errors="replace")
    outcome(opened, replaced(model, tmp_path, SHARD, struct.pack("<Q", len(header)) + header + content[8 + length :]))


@pytest.mark.parametrize(
    "shard",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 10**9) + b"{",
        b'\x5b\x00\x00\x00\x00\x00\x00\x00{"embedding":{"dtype":"F32","shape":[1099511627776,64],"data_offsets":[0,281474976710656]}}',
        b'\x59\x00\x00\x00\x00\x00\x00\x00{"embedding":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(model, tmp_path, shard, peak_growth):
    folder = replaced(model, tmp_path, SHARD, shard)
    with pytest.raises(UserError, match="is not a sound safetensors file|do not fit its config"):
        opened(folder)
    assert peak_growth() < 2**26
    with pytest.raises(UserError, match="differs from the manifest's sha256"):
        opened(folder, verify=True)


@quick
@given(data=st.data())
def test_model_manifests_indices_and_configs(model, tmp_path, data):
    name = data.draw(st.sampled_from(["manifest.json", f"params/{model_directory.INDEX}", "config.json"]))
    tree = data.draw(damaged_json(json.loads((model / name).read_text())))
    folder = replaced(model, tmp_path, name, json.dumps(tree).encode(errors="replace"))
    outcome(model_directory.read if name == "config.json" else opened, folder)
    found = outcome(manifest.read, folder, "model")
    if found is not None:
        outcome(manifest.verify, folder, found)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "~/x", "..\\x"])
def test_a_manifest_cannot_lead_out_of_its_folder(model, tmp_path, name):
    tree = json.loads((model / "manifest.json").read_text())
    tree["files"][name] = {"bytes": 1, "sha256": "0"}
    folder = replaced(model, tmp_path, "manifest.json", json.dumps(tree).encode())
    (tmp_path / "secret").write_text("x")
    with pytest.raises(UserError, match="leads out of its folder"):
        manifest.verify(folder, manifest.read(folder))
    index = {"metadata": {}, "weight_map": {"embedding": name}}
    folder = replaced(model, tmp_path / "index", f"params/{model_directory.INDEX}", json.dumps(index).encode())
    with pytest.raises(UserError, match="which the manifest does not list"):
        opened(folder)


# Checkpoints' manifests


@quick
@given(data=st.data(), forged=st.booleans())
def test_checkpoint_manifests(tmp_path, data, forged):
    folder = epath.Path(tmp_path) / "7"
    step_folder.begin(folder)
    (folder / "state").mkdir()
    (folder / "state" / "data").write_bytes(b"x")
    step_folder.commit(
        folder, step_folder.StepManifest(step=7, arrays={}, layout={}, identity={}, metric=None, extra={"figures": []})
    )
    tree = data.draw(damaged_json(json.loads((folder / "manifest.json").read_text())))
    if forged and isinstance(tree, dict):
        tree.pop("hash", None)
        tree["hash"] = files.hash_json(tree) if _plain(tree) else ""
    (folder / "manifest.json").write_bytes(json.dumps(tree).encode(errors="replace"))
    outcome(step_folder.read_and_verify, folder)


def _plain(tree: Any) -> bool:
    try:
        return bool(files.hash_json(tree))
    except (UnicodeEncodeError, ValueError):
        return False
