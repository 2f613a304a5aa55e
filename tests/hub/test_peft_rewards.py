"""Reward models' adapters in peft's format: its own rewards, from stored fixtures (make_adapter_fixtures.py)."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_peft import ADAPTERS, PYTHON, TOOL, imported, merge_adapter, numbers, with_tokenizer

import jaxlm
from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import UserError
from jaxlm.hub import families, forward, peft, peft_head
from jaxlm.hub.config import ImportConfig
from jaxlm.model import lora
from jaxlm.model.config import LoRAConfig, adapted
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import apply
from jaxlm.stages import import_
from jaxlm.train import model_directory

NAMES = {"reward": "llama", "reward-conv": "gpt2"}
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a dog"}]
IDS = np.arange(22, dtype=np.int32).reshape(2, 11) + 3


def rewards(lm, ids) -> np.ndarray:
    """[rows, criteria], after the last token of each."""
    return np.asarray(forward.last_scores(lm.definition, lm.params, *forward.padded(ids)))[: len(ids)]


def merge(*given) -> int:
    return merge_adapter().main([str(path) for path in given])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory) -> Path:
    """The run's folder of its import."""
    folder = tmp_path_factory.mktemp("ours")
    imported(base, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_of_peft(name, tmp_path):
    base, adapter = with_tokenizer(NAMES[name], tmp_path), ADAPTERS / name
    expected = safetensors.numpy.load_file(adapter / "expected.safetensors")
    beside = jaxlm.load(base, adapter=adapter, compute="float32")
    assert beside.config.criteria == ("overall",)
    np.testing.assert_allclose(rewards(beside, expected["ids"]), expected["logits"], atol=1e-4)
    run = tmp_path / "run"
    import_.main(ImportConfig(source=str(base), adapter=str(adapter), workdir=str(run), compute="float32"))
    directory = model_directory.read(run / "model")
    definition = define_model(directory.config)
    assert directory.manifest.facts["parameters"] == definition.parameter_count()
    np.testing.assert_array_equal(directory.load_params(definition)["score_bias"], [0.0])
    imported(base, tmp_path / "plain")
    assert merge(tmp_path / "plain", adapter, tmp_path / "merged") == 0
    for folder in (run, tmp_path / "merged"):
        merged = jaxlm.load(folder)
        assert merged.config.criteria == ("overall",)
        np.testing.assert_allclose(rewards(merged, expected["ids"]), expected["logits"], atol=1e-4)
        np.testing.assert_allclose(merged.reward([CHAT]), beside.reward([CHAT]), atol=1e-5)


def test_on_a_mesh_rewards_are_the_same(base):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    adapter = ADAPTERS / "reward"
    alone, spread = (jaxlm.load(base, adapter=adapter, compute="float32", mesh=where) for where in (None, mesh))
    assert len(spread.params["score"].sharding.device_set) == 2
    np.testing.assert_allclose(spread.reward([CHAT]), alone.reward([CHAT]), atol=1e-5)


def test_what_rewards_says_nothing_and_what_speaks_does_not_reward(base):
    judge, speaker = (jaxlm.load(base, adapter=ADAPTERS / name) for name in ("reward", "lora"))
    with pytest.raises(UserError, match="chat: the model is a reward model"):
        judge.chat(CHAT[:1])
    with pytest.raises(UserError, match="reward: the model is a language model"):
        speaker.reward([CHAT])


def of_criteria(directory, *criteria) -> model_directory.ModelDirectory:
    """The base as it lies under a reward model of these criteria."""
    return dataclasses.replace(directory, config=dataclasses.replace(directory.config, criteria=criteria))


KINDS = [LoRAConfig(rank=3, targets=("query", "up")), LoRAConfig(rank=2, dora=True)]


@pytest.mark.parametrize("criteria", [("helpful",), ("overall", "short")])
@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora"])
def test_what_was_written_gives_the_same_rewards(kind, criteria, base, ours, tmp_path):
    plain = model_directory.read(ours / "model")
    beside = of_criteria(plain, *criteria)
    trained, params = numbers(beside, kind)
    params["score_bias"] = params["score_bias"] - 0.1
    assert peft.write(tmp_path, params, trained, beside, kind)
    read = peft.read(tmp_path, families.BY_TYPE["llama"], plain.config)
    assert read.head is not None
    assert (read.head.criteria, read.shape(plain.config)) == (criteria, beside.config)
    np.testing.assert_array_equal(read.head.score, params["score"])
    np.testing.assert_array_equal(read.head.bias, params["score_bias"])
    whole = define_model(adapted(beside.config, kind))
    trunk = {name: x for name, x in plain.load_params(define_model(plain.config)).items() if name != "head"}
    places = np.broadcast_to(np.arange(11, dtype=np.int32), IDS.shape)
    given = tuple(map(jnp.asarray, (IDS, np.ones_like(IDS), places)))
    expected = apply(whole, lora.joined(trunk, params), lambda m: m.scores(m(*given)[0]))[:, -1]
    lm = jaxlm.load(base, adapter=tmp_path, compute="float32")
    np.testing.assert_allclose(rewards(lm, IDS), expected, atol=1e-5)
    assert merge(ours, tmp_path, tmp_path / "merged") == 0
    np.testing.assert_allclose(rewards(jaxlm.load(tmp_path / "merged"), IDS), expected, atol=1e-5)
    if PYTHON:  # whose classes add no bias
        safetensors.numpy.save_file({"ids": IDS}, tmp_path / "ids.safetensors")
        subprocess.run([PYTHON, TOOL, "check", base, tmp_path], check=True)
        theirs = safetensors.numpy.load_file(tmp_path / "logits.safetensors")["logits"]
        np.testing.assert_allclose(theirs + read.head.bias, expected, atol=1e-4)


def test_what_no_family_can_say_is_not_written(ours, tmp_path):
    """This name stands for none there, and would come back as "overall": `export` refuses it too."""
    beside = of_criteria(model_directory.read(ours / "model"), "LABEL_0")
    trained, params = numbers(beside, KINDS[0])
    assert not peft.write(tmp_path / "adapter", params, trained, beside, KINDS[0])
    assert not (tmp_path / "adapter").exists()


def test_over_a_reward_model_the_head_is_the_adapters(ours, tmp_path):
    adapter, judge = ADAPTERS / "reward", tmp_path / "judge"
    assert merge(ours, adapter, judge) == 0
    again = jaxlm.load(judge, adapter=edited(tmp_path / "new", lambda t: t.update({HEAD: 2 * t[HEAD]})))
    np.testing.assert_array_equal(again.params["score"], 2 * jaxlm.load(judge).params["score"])
    # Without one, the model's own goes on, as with peft; and so beneath an adapter of another task.
    without = edited(tmp_path / "without", lambda t: t.pop(HEAD), modules_to_save=None)
    for kept in (without, ADAPTERS / "lora"):
        found = jaxlm.load(judge, adapter=kept)
        np.testing.assert_array_equal(found.params["score"], jaxlm.load(judge).params["score"])
    with pytest.raises(UserError, match=r"scores \('helpful',\), but its base is a reward model that scores \('over"):
        jaxlm.load(judge, adapter=edited(tmp_path / "other", metadata={"criteria": '["helpful"]'}))


HEAD = peft_head.NAME


def edited(folder, change=None, metadata=None, **values) -> Path:
    shutil.copytree(ADAPTERS / "reward", folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    if change:
        change(tensors)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata)
    return folder


NUMBER = np.zeros(16, np.float32)
REFUSED = {
    "no head": ({}, lambda t: t.pop(HEAD), None, "has no base_model.model.score.weight, and task_type is SEQ_CLS"),
    "a head of another width": (
        {},
        lambda t: t.update({HEAD: t[HEAD][:, :-1].copy()}),
        None,
        r"score.weight is float32\[1, 15\], but \[labels, 16\] is needed",
    ),
    "a module more": (
        {"modules_to_save": ["score", "embed_tokens"]},
        None,
        None,
        r"modules_to_save=\['score', 'embed_tokens'\] is not understood",
    ),
    "a score of every token": (
        {"task_type": "TOKEN_CLS"},
        None,
        None,
        r"modules_to_save=\['classifier', 'score'\] is not understood",
    ),
    "a head of no task": (
        {"task_type": "CAUSAL_LM", "modules_to_save": None},
        None,
        None,
        "is not understood for a llama base: base_model.model.score.weight",
    ),
    "a head of two layers": (
        {},
        lambda t: t.update({HEAD.replace("weight", "out_proj.weight"): NUMBER}),
        None,
        "is not understood for a llama base: base_model.model.score.out_proj.weight",
    ),
    "a bias of other labels": ({}, None, {"score_bias": "[0.5, 1.0]"}, r"has 1 labels, but .* a bias of \[0.5, 1.0\]"),
    "a bias that is none": ({}, None, {"score_bias": "half"}, "in its metadata is no list: {'score_bias': 'half'}"),
    "a bias of words": ({}, None, {"score_bias": '{"half": 0.5}'}, "in its metadata is no list"),
    "more names than labels": ({}, None, {"criteria": '["a", "b"]'}, r"has 1 labels, but criteria \('a', 'b'\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case, base, tmp_path):
    values, change, metadata, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        jaxlm.load(base, adapter=edited(tmp_path / "adapter", change, metadata, **values))


def test_labels_without_names_are_numbered(base, tmp_path):
    two = edited(tmp_path / "two", lambda t: t.update({HEAD: np.concatenate([t[HEAD], -t[HEAD]])}))
    lm = jaxlm.load(base, adapter=two)
    assert lm.config.criteria == ("LABEL_0", "LABEL_1")
    np.testing.assert_allclose(rewards(lm, IDS).sum(axis=1), 0, atol=1e-6)
