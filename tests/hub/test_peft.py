"""Adapters of Hugging Face's peft, in and out: its logits, from stored fixtures (make_adapter_fixtures.py)."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxlm
from jaxlm.base.errors import UserError
from jaxlm.hub import families, peft, peft_experts
from jaxlm.hub.config import ImportConfig
from jaxlm.model import lora
from jaxlm.model.config import LoRAConfig, adapted
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import apply, initialize
from jaxlm.stages import import_
from jaxlm.train import model_directory

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
NAMES = {"lora": "llama", "rslora": "llama", "dora": "llama"}
NAMES |= {"fused": "phi3", "conv": "gpt2", "by-head": "pythia", "latent": "deepseek-v2"}
NAMES |= {"experts": "mixtral", "experts-in-turn": "gpt-oss", "experts-down": "deepseek-v2"}
NAMES |= {"parameters": "deepseek-v2", "some-layers": "llama", "some-layers-dora": "llama"}
NAMES |= {"router": "gpt-oss", "all-mixtral": "mixtral", "all-qwen3": "qwen3-moe", "all-deepseek": "deepseek-v3"}
TOOL = HERE / "make_adapter_fixtures.py"
PYTHON = os.environ.get("JAXLM_TRANSFORMERS_PYTHON", "")


def with_tokenizer(name: str, root: Path) -> Path:
    """A base of adapters, with a tokenizer to load it by."""
    folder = root / name
    shutil.copytree(HERE / f"fixtures/{name}", folder)
    shutil.copytree(HERE / "fixtures/tokenizer-byte-level", folder, dirs_exist_ok=True)
    (folder / "expected.json").unlink()
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name, tmp_path):
    base = with_tokenizer(NAMES[name], tmp_path)
    expected = safetensors.numpy.load_file(ADAPTERS / name / "expected.safetensors")
    beside = jaxlm.load(base, adapter=ADAPTERS / name, compute="float32")
    np.testing.assert_allclose(beside.logits(expected["ids"]), expected["logits"], atol=1e-4)
    import_.main(
        ImportConfig(source=str(base), adapter=str(ADAPTERS / name), workdir=f"{tmp_path}/run", compute="float32")
    )
    merged = jaxlm.load(tmp_path / "run")
    np.testing.assert_allclose(merged.logits(expected["ids"]), expected["logits"], atol=1e-4)
    assert np.abs(jaxlm.load(base).logits(expected["ids"]) - expected["logits"]).max() > 0.03


def imported(base, workdir) -> model_directory.ModelDirectory:
    import_.main(ImportConfig(source=str(base), workdir=str(workdir), compute="float32"))
    return model_directory.read(workdir / "model")


def numbers(directory, config):
    """A state's adapters of an imported model, none of them as it begins."""
    trained = lora.trained(define_model(adapted(directory.config, dataclasses.replace(config, dropout=0.0))))
    noise = lambda path, x: x + 0.2 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
    return trained, jax.tree_util.tree_map_with_path(noise, initialize(trained, 3))


@pytest.mark.parametrize("kind", [LoRAConfig(rank=3, targets=("query", "up")), LoRAConfig(rank=2, dora=True)])
def test_written_and_read_is_the_same(kind, base, tmp_path):
    directory = imported(base, tmp_path / "run")
    trained, params = numbers(directory, kind)
    assert peft.write(tmp_path / "adapter", params, trained, directory, kind)
    found = peft.read(tmp_path / "adapter", families.BY_TYPE["llama"], directory.config)
    assert (found.lora.rank, found.lora.scale, found.lora.dora) == (kind.rank, kind.scale, kind.dora)
    told = dict(model_directory.host_tensors(trained, params))
    back = {f"{name}_lora_{part}": x for name, parts in found.tensors.items() for part, x in parts.items()}
    assert back.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_array_equal(back[name], value)


EXPERTS = {
    "mixtral": LoRAConfig(rank=3, targets=("layers/experts/*", "query")),
    "gpt-oss": LoRAConfig(rank=2, rank_stabilised=True),
    "qwen3-moe": LoRAConfig(rank=2, targets=("layers/experts/up", "layers/experts/down")),
    "deepseek-v3": LoRAConfig(rank=2),
    "deepseek-v2": LoRAConfig(rank=2, dropout=0.1, targets=("layers/experts/shared/*", "layers/mlp/up", "output")),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_of_experts_are_written_and_read_as_they_are(name, tmp_path):
    kind, directory = EXPERTS[name], imported(with_tokenizer(name, tmp_path), tmp_path / "run")
    trained, params = numbers(directory, kind)
    assert peft.write(tmp_path / "adapter", params, trained, directory, kind)
    told = dict(model_directory.host_tensors(trained, params))
    found = peft.read(tmp_path / "adapter", peft.family_of(directory), directory.config)
    assert any(".experts." in whose for whose in found.tensors)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert not peft_experts.OLD_NAMES & {*config["target_modules"]}, "peft takes these for the experts'"
    assert config["lora_dropout"] == 0, "peft refuses any where parameters are targets"
    assert {name.partition("_lora_")[0] for name in told} <= found.tensors.keys()
    for whose, parts in found.tensors.items():
        mine = [told.get(f"{whose}_lora_{part}") for part in "ab"]
        change = 0.0 if mine[0] is None else kind.scale * mine[0] @ mine[1]
        np.testing.assert_allclose(found.lora.scale * parts["a"] @ parts["b"], change, atol=1e-6)


UNSAID = {
    "experts": ("deepseek-v3", ("layers/experts/down",), "peft has no DoRA beside mlp.experts.down_proj"),
    "shared": ("deepseek-v3", ("layers/experts/shared/up",), "peft has no DoRA beside mlp.shared_experts.up_proj"),
    "part": ("phi3", ("query",), "peft has no DoRA beside a part of model.layers.0.self_attn.qkv_proj.weight alone"),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_peft_has_no_form_for_is_told_before_the_run_and_not_written(case, tmp_path, caplog):
    name, targets, message = UNSAID[case]
    directory = imported(with_tokenizer(name, tmp_path), tmp_path / "run")
    kind = LoRAConfig(rank=2, targets=targets, dora=True)
    trained, params = numbers(directory, kind)
    peft.warn_unsaid(trained, directory, kind)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(": ")[2].startswith(message) for line in told] == [True]
    assert not peft.write(tmp_path / "adapter", params, trained, directory, kind)
    assert not (tmp_path / "adapter").exists()
    plain = dataclasses.replace(kind, dora=False)
    caplog.clear()
    peft.warn_unsaid(numbers(directory, plain)[0], directory, plain)
    assert not caplog.records


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> model_directory.ModelDirectory:
    root = tmp_path_factory.mktemp("mixture")
    return imported(with_tokenizer("mixtral", root), root / "run")


def test_targets_that_are_no_experts_matrices_are_refused(mixture, tmp_path):
    other = edited(tmp_path, of="experts", target_parameters=["mlp.router"])
    with pytest.raises(UserError, match="target_parameters='mlp.router' is not understood; matrices of"):
        peft.read(other, peft.family_of(mixture), mixture.config)


def test_parameters_that_lie_the_other_way_round_are_refused(tmp_path):
    """peft takes every parameter for [out, in], and GPT-2's are [in, out]: its A and B would have changed places."""
    base = with_tokenizer("gpt2", tmp_path)
    with pytest.raises(
        UserError, match=r"target_parameters='mlp.c_proj.weight' lies \[in, out\], which peft takes for"
    ):
        jaxlm.load(base, adapter=edited(tmp_path, of="conv", use_dora=False, target_parameters=["mlp.c_proj.weight"]))


def _old_names(tensors):
    for name in [name for name in tensors if ".mlp.gate." in name]:
        tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)


WHOLE_NAMES = [
    f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")
]
SAME = {
    "ranks that peft converted": ("experts", None, {"rank_pattern": {r".*\.gate_up_proj": 3}}),
    "whole names": ("experts", None, {"target_parameters": WHOLE_NAMES}),
    "a router of old": ("all-mixtral", _old_names, {"target_parameters": ["gate_up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", SAME)
def test_other_words_for_the_same_are_read_as_the_same(case, mixture, tmp_path):
    of, change, values = SAME[case]
    plain, made = (
        peft.read(at, peft.family_of(mixture), mixture.config)
        for at in (ADAPTERS / of, edited(tmp_path, change, of=of, **values))
    )
    assert made.lora == plain.lora
    assert made.tensors.keys() == plain.tensors.keys()
    for name, parts in plain.tensors.items():
        for part, value in parts.items():
            np.testing.assert_array_equal(made.tensors[name][part], value)


def by_expert(folder, kind, mixture) -> dict[str, np.ndarray]:
    """An adapter of Mixtral as transformers 4 had it, A and B beside the matrices of each expert; what is ours."""
    trained, params = numbers(mixture, kind)
    told = dict(model_directory.host_tensors(trained, params))
    theirs = {}
    for name, value in told.items():
        _, layer, _, whose, _, part = name.replace("_lora_", ".lora.").split(".")
        for expert, own in enumerate(value):
            module = f"block_sparse_moe.experts.{expert}.{dict(gate='w1', up='w3', down='w2')[whose]}"
            key = f"{peft.PREFIX}model.layers.{layer}.{module}.{peft.PARTS[part]}"
            theirs[key] = np.ascontiguousarray(own.T)
    folder.mkdir()
    safetensors.numpy.save_file(theirs, folder / peft.TENSORS, {"format": "pt"})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": kind.rank, "lora_alpha": kind.alpha, "bias": "none"}
    values |= {"target_modules": ["w1", "w2", "w3"], "use_dora": kind.dora}
    (folder / peft.CONFIG).write_text(json.dumps(values))
    return told


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_beside_each_expert_are_read_as_those_of_all(dora, mixture, tmp_path):
    told = by_expert(tmp_path / "adapter", LoRAConfig(rank=2, targets=("layers/experts/*",), dora=dora), mixture)
    found = peft.read(tmp_path / "adapter", peft.family_of(mixture), mixture.config)
    assert found.lora.targets == ("layers/experts/down", "layers/experts/gate", "layers/experts/up")
    back = {f"{name}_lora_{part}": x for name, parts in found.tensors.items() for part, x in parts.items()}
    assert back.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_array_equal(back[name], value)


def test_adapters_beside_some_experts_are_refused(mixture, tmp_path):
    by_expert(tmp_path / "adapter", LoRAConfig(rank=2, targets=("layers/experts/*",)), mixture)
    file = tmp_path / "adapter" / peft.TENSORS
    held = {name: x for name, x in safetensors.numpy.load_file(file).items() if ".experts.3." not in name}
    safetensors.numpy.save_file(held, file)
    with pytest.raises(UserError, match=r"layers.0.experts.gate has adapters in 3 of 4 experts; all are needed"):
        peft.read(tmp_path / "adapter", peft.family_of(mixture), mixture.config)


# Where JAXLM_TRANSFORMERS_PYTHON names a Python that has torch, transformers and peft.
if PYTHON:

    @pytest.mark.slow
    def test_peft_reads_what_was_written(base, tmp_path):
        for number, kind in enumerate((LoRAConfig(rank=3, rank_stabilised=True), LoRAConfig(rank=2, dora=True))):
            directory = imported(base, tmp_path / f"run{number}")
            trained, params = numbers(directory, kind)
            folder = tmp_path / f"adapter{number}"
            assert peft.write(folder, params, trained, directory, kind)
            ids = np.arange(22, dtype=np.int32).reshape(2, 11) + 3
            safetensors.numpy.save_file({"ids": ids}, folder / "ids.safetensors")
            subprocess.run([PYTHON, TOOL, "check", base, folder], check=True)
            expected = safetensors.numpy.load_file(folder / "logits.safetensors")["logits"]
            np.testing.assert_allclose(jaxlm.load(base, adapter=folder).logits(ids), expected, atol=1e-4)

    @pytest.mark.slow
    def test_peft_reads_adapters_beside_each_expert_as_we_do(mixture, tmp_path):
        base, folder = with_tokenizer("mixtral", tmp_path), tmp_path / "adapter"
        by_expert(folder, LoRAConfig(rank=2, alpha=2.0, targets=("layers/experts/*",)), mixture)
        ids = np.arange(22, dtype=np.int32).reshape(2, 11) + 3
        safetensors.numpy.save_file({"ids": ids}, folder / "ids.safetensors")
        subprocess.run([PYTHON, TOOL, "check", base, folder], check=True)
        expected = safetensors.numpy.load_file(folder / "logits.safetensors")["logits"]
        np.testing.assert_allclose(jaxlm.load(base, adapter=folder, compute="float32").logits(ids), expected, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EXPERTS)
    def test_peft_reads_what_was_written_of_experts(name, tmp_path):
        base, kind = with_tokenizer(name, tmp_path), EXPERTS[name]
        directory = imported(base, tmp_path / "run")
        trained, params = numbers(directory, kind)
        folder = tmp_path / "adapter"
        assert peft.write(folder, params, trained, directory, kind)
        ids = np.arange(22, dtype=np.int32).reshape(2, 11) + 3
        safetensors.numpy.save_file({"ids": ids}, folder / "ids.safetensors")
        subprocess.run([PYTHON, TOOL, "check", base, folder], check=True)
        expected = safetensors.numpy.load_file(folder / "logits.safetensors")["logits"]
        beside = jaxlm.load(base, adapter=folder, compute="float32").logits(ids)
        np.testing.assert_allclose(beside, expected, atol=1e-4)
        assert np.abs(jaxlm.load(base, compute="float32").logits(ids) - expected).max() > 0.03


def merge_adapter():
    spec = importlib.util.spec_from_file_location("merge_adapter", HERE.parent.parent / "tools/merge_adapter.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_tool_merges_into_a_model_directory_of_ours(base, tmp_path):
    tool = merge_adapter()
    imported(base, tmp_path / "run")
    given = [str(tmp_path / "run"), str(ADAPTERS / "dora"), str(tmp_path / "merged")]
    assert tool.main(given) == 0
    expected = safetensors.numpy.load_file(ADAPTERS / "dora/expected.safetensors")
    np.testing.assert_allclose(jaxlm.load(given[2]).logits(expected["ids"]), expected["logits"], atol=1e-4)
    assert tool.main(given) == 2, "nothing is overwritten"


def test_the_chat_template_beside_an_adapter_is_the_one_it_was_trained_with(base, tmp_path):
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    shutil.copytree(ADAPTERS / "dora", adapter)
    (adapter / "chat_template.jinja").write_text(own)
    imported(base, run)
    given = {"source": str(base), "adapter": str(adapter), "compute": "float32"}
    import_.main(ImportConfig(workdir=f"{tmp_path}/imported", **given))
    import_.main(ImportConfig(workdir=f"{tmp_path}/none", chat_template="none", **given))
    assert merge_adapter().main([str(run), str(adapter), f"{tmp_path}/merged"]) == 0
    for found in (jaxlm.load(run, adapter=adapter), *(jaxlm.load(tmp_path / name) for name in ("imported", "merged"))):
        assert found.chat_template.source == own
    assert jaxlm.load(tmp_path / "none").chat_template is None


def edited(tmp_path, change=None, of="dora", **values):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / of, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if change:
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"
REFUSED = {
    "another kind": ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
    "ranks of their own": ({"rank_pattern": {"q_.*": 4}}, None, r"rank_pattern=\{'q_.\*': 4\} is not understood"),
    "a rank that is none": (
        {"rank_pattern": {"q_proj": 4}},
        None,
        r"lora_A.weight is float32\[2, 16\], but \[4, 16\] is",
    ),
    "no pattern": ({"alpha_pattern": [1]}, None, "alpha_pattern is no object"),
    "biases": ({"bias": "all"}, None, "bias='all' is not understood"),
    "a changed base": ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa', which changes the base"),
    "rank 0": ({"r": 0}, None, "rank: got 0; 1 or more is needed"),
    "another rank": ({"r": 3}, None, r"lora_A.weight is float32\[2, 16\], but \[3, 16\] is needed"),
    "no magnitude": (
        {},
        lambda t: t.pop(f"{QUERY}.lora_magnitude_vector"),
        "layers.1.self_attn.q_proj has only lora_A",
    ),
    "an unknown tensor": ({}, lambda t: t.update(x=np.zeros(3)), "is not understood for a llama base: x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case, base, tmp_path):
    values, change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        jaxlm.load(base, adapter=edited(tmp_path, change, **values))


def test_a_folder_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        jaxlm.load(base, adapter=tmp_path)


FUSED = [("phi3", False), ("phi3", True), ("gpt2", True), ("pythia", False), ("deepseek-v2", False)]


@pytest.mark.parametrize(("name", "dora"), FUSED)
def test_matrices_that_lie_in_one_share_an_adapter_there(name, dora, tmp_path):
    base = with_tokenizer(name, tmp_path)
    directory = imported(base, tmp_path / "run")
    targets = ("layers/attention/*", "layers/mlp/*") if dora else ("query", "value", "up")
    if name == "deepseek-v2":
        targets = ("key", "value", "shared_key", "output", "layers/mlp/gate", "layers/experts/shared/down")
    kind = LoRAConfig(rank=2, alpha=3.0, dora=dora, targets=targets)
    trained, params = numbers(directory, kind)
    folder = tmp_path / "adapter"
    assert peft.write(folder, params, trained, directory, kind)
    plain = directory.load_params(define_model(directory.config))
    ids = np.arange(22, dtype=np.int32).reshape(2, 11) + 3
    ones, places = np.ones_like(ids), np.broadcast_to(np.arange(11, dtype=np.int32), ids.shape)
    whole = define_model(adapted(directory.config, kind))
    given = tuple(map(jnp.asarray, (ids, ones, places)))
    expected = apply(whole, lora.joined(plain, params), lambda m: m.logits(m(*given)[0]))
    beside = jaxlm.load(base, adapter=folder, compute="float32")
    np.testing.assert_allclose(beside.logits(ids), expected, atol=1e-4)
    if PYTHON:
        safetensors.numpy.save_file({"ids": ids}, folder / "ids.safetensors")
        subprocess.run([PYTHON, TOOL, "check", base, folder], check=True)
        theirs = safetensors.numpy.load_file(folder / "logits.safetensors")["logits"]
        np.testing.assert_allclose(theirs, expected, atol=1e-4)
