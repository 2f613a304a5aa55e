"""All that reads what others wrote, each as a function of bytes: understood, or refused with a message.

A new reader becomes a line in `TARGETS` and a folder corpus/NAME with a sound file. `test_corpus.py` runs what lies
there, `explore.py` looks for more.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from harness import outcome

from jaxlm.base import config as configs
from jaxlm.base import manifest
from jaxlm.evaluate import tasks
from jaxlm.feedback import rankings
from jaxlm.hub import families, gguf, hugging_face, pooling
from jaxlm.hub.generation import Generation
from jaxlm.hub.tokenizers import read_tokenizer
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

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
MESSAGES = [{"role": "user", "content": "hello <|im_end|>"}, {"role": "assistant", "content": "hi"}]
SHARD = "params/model-00001.safetensors"


def as_json(content: bytes) -> Any:
    """The value that the bytes are; None where they are no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def overrides(content: bytes) -> None:
    """Lines FIELD=VALUE, as on a command line."""
    given = [line.partition("=")[::2] for line in content.decode(errors="replace").splitlines()]
    made = outcome(configs.override, PretrainConfig(), dict(given))
    if made is not None:
        configs.check_types(made)


def kept_config(content: bytes) -> None:
    tree = as_json(content)
    if isinstance(tree, dict):
        outcome(configs.from_dict, PretrainConfig, tree)


def chat_template(content: bytes) -> None:
    template = outcome(ChatTemplate, content.decode(errors="replace"), TOKENIZER, "template.jinja")
    if template is not None:
        outcome(template.encode, MESSAGES)


def conversation(content: bytes) -> None:
    outcome(load("chatml", TOKENIZER).encode, as_json(content))


def records(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        outcome(lambda: list(readers.read(SourceConfig(name="fuzz", path=str(path)), max_bytes=1000)))


def ranking(content: bytes) -> None:
    tree = as_json(content)
    if isinstance(tree, dict):
        outcome(rankings.parse, tree)


def task(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
        (Path(folder) / "task.toml").write_bytes(content)
        found = outcome(tasks.read, Path(folder) / "task.toml")
        if found is not None:
            outcome(found.text, found.examples[0])


@functools.cache
def model() -> Path:
    """A sound model directory, made once."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-fuzz-"))
    tokenizers.save(TOKENIZER, folder / "tokenizer")
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=8, heads=1).complete()
    params = jax.jit(lambda: initialize(define_model(config), 0))()
    made: Any = dict(inputs={}, config={}, facts={"row_length": 64})
    model_directory.write(folder / "model", params, config, folder / "tokenizer", **made)
    return folder / "model"


def model_file(name: str, content: bytes) -> None:
    """A model directory in which one file says this."""
    path = model() / name
    sound = path.read_bytes()

    def opened() -> None:
        found = model_directory.read(model(), verify=False)
        found.load_params(define_model(found.config))

    try:
        path.write_bytes(content)
        outcome(
            model_directory.read if name == "config.json" else opened, *([model()] if name == "config.json" else [])
        )
        found = outcome(manifest.read, model(), "model")
        if found is not None:
            outcome(manifest.verify, model(), found)
    finally:
        path.write_bytes(sound)


def checkpoint_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = epath.Path(root) / "7"
        step_folder.begin(folder)
        (folder / "state").mkdir()
        (folder / "manifest.json").write_bytes(content)
        outcome(step_folder.read_and_verify, folder)


def hugging_face_config(content: bytes) -> None:
    tree = as_json(content)
    found = outcome(families.family_of, tree, "config.json")
    if found is not None and isinstance(tree, dict):
        outcome(found.read, tree, "config.json")


def gguf_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "model.gguf"
        path.write_bytes(content)
        found = outcome(gguf.read, path)
        if found is not None:
            outcome(found.tokenizer)
            outcome(lambda: found.load_params(define_model(found.config)))


def sentence_modules(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "modules.json").write_bytes(content)
        (Path(root) / "1_Pooling").mkdir()
        (Path(root) / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        outcome(pooling.read, epath.Path(root))


def hugging_face_file(name: str, content: bytes) -> None:
    """A directory of Hugging Face with a config that is sound, and this file."""
    with tempfile.TemporaryDirectory() as root:
        folder = epath.Path(root)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        (folder / name).write_bytes(content)
        if name == "generation_config.json":
            outcome(lambda: Generation.read(folder, {}).sampling())
        elif name == "config.json":
            outcome(hugging_face.read, folder)
        else:
            generation = Generation({}, (2,), None, None)
            outcome(read_tokenizer, folder, 1000, generation)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "overrides": overrides,
    "kept_config": kept_config,
    "chat_template": chat_template,
    "conversation": conversation,
    "jsonl": functools.partial(records, "a.jsonl"),
    "jsonl_gz": functools.partial(records, "a.jsonl.gz"),
    "text": functools.partial(records, "a.txt"),
    "ranking": ranking,
    "task": task,
    "model_config": functools.partial(model_file, "config.json"),
    "model_manifest": functools.partial(model_file, "manifest.json"),
    "safetensors": functools.partial(model_file, SHARD),
    "safetensors_index": functools.partial(model_file, f"params/{model_directory.INDEX}"),
    "checkpoint_manifest": checkpoint_manifest,
    "hugging_face_config": hugging_face_config,
    "hugging_face_directory": functools.partial(hugging_face_file, "config.json"),
    "generation_config": functools.partial(hugging_face_file, "generation_config.json"),
    "tokenizer_json": functools.partial(hugging_face_file, "tokenizer.json"),
    "tokenizer_config": functools.partial(hugging_face_file, "tokenizer_config.json"),
    "gguf": gguf_file,
    "sentence_modules": sentence_modules,
}
