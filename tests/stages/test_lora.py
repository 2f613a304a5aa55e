"""Stages with adapters: only adapters learn, the base lies there once, and what is written is the merged model."""

import dataclasses

import jax
import numpy as np
import pytest
from stage_runs import Runner, arrays_of, assert_same_run, lines_of, pretrained, written

import jaxlm
from jaxlm.adapters.quantising import quantise
from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.data.config import ChatSource
from jaxlm.model import quantised
from jaxlm.model.config import ExpertsConfig, LoRAConfig
from jaxlm.model.transformer import define_model
from jaxlm.stages import sft
from jaxlm.stages.config import SFTConfig
from jaxlm.train import model_directory
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "owl": "hoo", "pig": "oink"}


CONFIG = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.model.config import LoRAConfig
from jaxlm.stages.config import SFTConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

def get_config():
    return SFTConfig(
        model=%(model)r,
        sources=(
            ChatSource(name="train", path=%(train)r),
            ChatSource(name="heldout", path=%(heldout)r, split="heldout"),
        ),
        row_length=64,
        batch_rows=8,
        steps=12,
        lora=LoRAConfig(rank=4, dora=True, dropout=0.2),
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3, ema=0.9),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=-1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=4, checkpoint=CheckpointConfig(every_steps=2)),
    )
"""
ALONE = MeshConfig(data=1)
DROPPED = LoRAConfig(rank=4, dora=True, dropout=0.25)


@pytest.fixture(scope="module")
def base(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=4, layers=2)


@pytest.fixture
def config(base, tmp_path) -> SFTConfig:
    train = [{"prompt": f"{animal}?", "completion": sound} for animal, sound in SOUNDS.items()] * 10
    return SFTConfig(
        workdir=str(tmp_path / "sft"),
        model=base,
        sources=(
            ChatSource(name="train", path=written(tmp_path / "train.jsonl", train)),
            ChatSource(name="heldout", path=written(tmp_path / "heldout.jsonl", [train[2]]), split="heldout"),
        ),
        row_length=64,
        batch_rows=8,
        steps=3,
        lora=LoRAConfig(rank=4),
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3, ema=0.9),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=3, checkpoint=CheckpointConfig(every_steps=2)),
    )


def params_of(folder):
    found = model_directory.read(folder)
    return found.load_params(define_model(found.config))


def test_only_adapters_are_kept_and_the_model_is_the_merged_one(config, base):
    sft.main(config)
    lines = [line for line in lines_of(config.workdir) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    kept = arrays_of(config.workdir, 3)
    params = {name: x for name, x in kept.items() if name.startswith("params/")}
    assert all("_lora_" in name for name in params)
    assert len(params) == 2 * 7  # A and B of seven matrices
    assert not any(x.shape[-2:] in ((32, 32), (288, 32)) for x in kept.values()), "a moment of the base"
    # The merged model, worked out from the average in the checkpoint.
    before, after = params_of(f"{base}/model"), params_of(f"{config.workdir}/model")
    for part, name in (("attention", "query"), ("mlp", "down")):
        a, b = (kept[f"ema/stack/0/{part}/{name}_lora_{x}"] for x in "ab")
        change = config.lora.scale * np.einsum("ldr,lrf->ldf", a, b)
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(
            after["stack"]["0"][part][name], before["stack"]["0"][part][name] + change, atol=1e-6
        )
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    beside = jaxlm.load(base, adapter=f"{config.workdir}/adapter")
    whole = jaxlm.load(config.workdir)
    np.testing.assert_allclose(beside.logits(ids), whole.logits(ids), atol=1e-5)
    assert jaxlm.load(base).chat_template is None
    assert beside.chat_template.source == whole.chat_template.source, "it speaks as it was taught to"
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after["stack"]["0"]["mlp_norm"]["scale"], before["stack"]["0"]["mlp_norm"]["scale"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compute", "nf4"])
def test_experts_have_adapters_of_their_own_and_the_model_is_the_merged_one(
    config, packed_rows, tmp_path, kind, caplog
):
    experts = ExpertsConfig(count=4, chosen=2, feed_forward=16, shared=1)
    base = pretrained(packed_rows, tmp_path / "base", steps=4, layers=2, experts=experts)
    sft.main(dataclasses.replace(config, model=base, lora=LoRAConfig(rank=4, dora=True, base=kind)))
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in told if "no adapter/ will be written, model/ will have all of it" in line]
    kept = arrays_of(config.workdir, 3)
    assert kept["params/stack/0/experts/up_lora_a"].shape == (2, 4, 32, 4)
    assert not any("router" in name for name in kept if name.startswith("params/"))
    before, after = (params_of(f"{folder}/model")["stack"]["0"]["experts"] for folder in (base, config.workdir))
    for name in ("gate", "up", "down"):
        a, b, magnitude = (kept[f"ema/stack/0/experts/{name}_lora_{part}"] for part in ("a", "b", "magnitude"))
        if kind != "compute":
            before[name] = np.asarray(quantised.dequantised(*quantise(before[name], kind)))
        whole = before[name] + LoRAConfig(rank=4).scale * np.einsum("ledr,lerf->ledf", a, b)
        whole *= (magnitude / np.linalg.norm(whole, axis=-2))[..., None, :]
        np.testing.assert_allclose(after[name], whole, atol=1e-5)
        assert np.abs(after[name] - before[name]).max(axis=(0, 2, 3)).min() > 1e-5, "each expert learned"
    np.testing.assert_array_equal(after["router"], before["router"])
    assert np.abs(np.asarray(after["shared"]["up"]) - before["shared"]["up"]).max() > 1e-5


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_model_over_a_quantised_base_is_the_one_that_was_trained(config, base, kind):
    config = dataclasses.replace(config, lora=LoRAConfig(rank=4, base=kind), optimizer=OptimizerConfig(epsilon=1e-3))
    sft.main(config)
    kept = arrays_of(config.workdir, 3)
    assert all("_lora_" in name for name in kept if name.startswith("params/"))
    before, after = params_of(f"{base}/model"), params_of(f"{config.workdir}/model")
    for part, name in (("attention", "query"), ("mlp", "down")):
        a, b = (kept[f"params/stack/0/{part}/{name}_lora_{x}"] for x in "ab")
        stored = quantised.dequantised(*quantise(before["stack"]["0"][part][name], kind))
        change = config.lora.scale * np.einsum("ldr,lrf->ldf", a, b)
        np.testing.assert_allclose(after["stack"]["0"][part][name], stored + change, atol=1e-6)
        assert np.abs(np.asarray(stored) - before["stack"]["0"][part][name]).max() > 1e-4
    np.testing.assert_array_equal(after["embedding"], before["embedding"])
    # What the run measured last is what the written model has.
    measured = [line["eval/loss"] for line in lines_of(config.workdir) if "eval/loss" in line][-1]
    model = model_directory.read(f"{config.workdir}/model")
    again = dataclasses.replace(config, workdir=f"{config.workdir}-again", model=config.workdir, lora=None)
    again = dataclasses.replace(again, schedule=ScheduleConfig(peak=1e-9, warmup_steps=0), steps=1)
    again = dataclasses.replace(again, optimizer=OptimizerConfig(weight_decay=0.0))
    sft.main(dataclasses.replace(again, loop=dataclasses.replace(config.loop, evaluate_every_steps=1)))
    told = [line["eval/loss"] for line in lines_of(again.workdir) if "eval/loss" in line][-1]
    assert model.config.width == 32
    assert told == pytest.approx(measured, abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_its_own_base_only(config, base, tmp_path, packed_rows):
    sft.main(dataclasses.replace(config, loop=dataclasses.replace(config.loop, stop_at_step=2)))
    other = pretrained(packed_rows, tmp_path / "other", steps=3, layers=2)
    with pytest.raises(UserError, match="other"):
        sft.main(dataclasses.replace(config, model=other))


@pytest.fixture
def program(config, base):
    """(program, what it trains, mesh) on as many devices as the mesh has."""

    def make(lora_config, mesh=ALONE, scan=True, compute="float32"):
        ready = dataclasses.replace(config, lora=lora_config, mesh=mesh)
        made = sharding.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor * mesh.data])
        model = model_directory.read(f"{base}/model")
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, compute=compute))
        tuned = sft.tune(ready, made, model, scan)
        return sft._build(ready, made, tuned), tuned, made

    return make


def rows(made):
    draw = np.random.default_rng(0)
    ids = draw.integers(1, 200, (8, 64)).astype(np.int32)
    given = {"ids": ids, "segment_ids": np.ones_like(ids), "loss_mask": ids % 3 > 0}
    given["positions"] = np.broadcast_to(np.arange(64, dtype=np.int32), ids.shape)
    return sharding.global_batch(made, given, 8)


def stepped(program, tuned, made, steps=2):
    with jax.set_mesh(made):
        state = program.initialize()
        for _ in range(steps):
            state, measured = program.step(state, rows(made) | program.base())
    return state, measured


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        LoRAConfig(rank=4),
        dataclasses.replace(DROPPED, base="int8"),
        dataclasses.replace(DROPPED, base="nf4"),
    ],
    ids=["lora", "dora over int8", "dora over nf4"],
)
def test_eight_devices_are_one(program, kind):
    one, measured = stepped(*program(kind))
    eight, measured8 = stepped(*program(kind, MeshConfig(data=2, fsdp=2, tensor=2)))
    for name in ("train/loss", "train/gradient_norm"):
        np.testing.assert_allclose(measured8[name].value(), measured[name].value(), rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, jax.device_get(eight.params), jax.device_get(one.params))


def test_the_base_is_read_once_never_given_away_and_has_no_moments(program):
    made, tuned, mesh = program(LoRAConfig(rank=4), MeshConfig(data=1, fsdp=2))
    before = jax.tree.map(np.array, made.base()["base"])
    state, _ = stepped(made, tuned, mesh, steps=3)
    assert made.base()["base"] is tuned.base()["base"]
    jax.tree.map(np.testing.assert_array_equal, made.base()["base"], before)
    weights = sum(x.size for x in jax.tree.leaves(before))
    adapters = sum(x.size for x in jax.tree.leaves(state.params))
    stored = sum(x.size for x in jax.tree.leaves(made.abstract_state))
    assert stored < 4 * adapters + 10 < weights  # adapters, two moments, average
    with jax.set_mesh(mesh):
        memory = made.step.lower(made.abstract_state, made.abstract_batch).compile().memory_analysis()
    assert memory.output_size_in_bytes < 4 * weights, "the base is no output of the step"


def test_no_gradient_of_the_base_is_computed(program):
    def products(kind):
        made, _, mesh = program(kind)
        with jax.set_mesh(mesh):
            return made.step.lower(made.abstract_state, made.abstract_batch).compile().cost_analysis()["flops"]

    assert products(LoRAConfig(rank=1)) < 0.8 * products(None)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_step_zero_is_the_base(program, compute):
    """Also where the base lies in bfloat16: its products are taken in that anyway."""
    _, alone = stepped(*program(None, compute=compute), steps=1)
    made, tuned, mesh = program(LoRAConfig(rank=4), compute=compute)
    assert {str(x.dtype) for x in jax.tree.leaves(made.abstract_batch["base"])} == {"float32", compute}
    assert {str(x.dtype) for x in jax.tree.leaves(made.abstract_state.params)} == {"float32"}
    _, with_adapters = stepped(made, tuned, mesh, steps=1)
    assert with_adapters["train/loss"].value() == alone["train/loss"].value()


@pytest.mark.slow
def test_stacked_is_unrolled(program):
    stacked, tuned, made = program(LoRAConfig(rank=4, dropout=0.5))
    flat = program(LoRAConfig(rank=4, dropout=0.5), scan=False)
    state, _ = stepped(stacked, tuned, made)
    other, _ = stepped(*flat)
    from jaxlm.model import layout

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, layout.unroll(state.params, tuned.config), other.params)


def test_targets_are_checked_before_anything_is_read(config):
    with pytest.raises(ConfigError, match="lora.targets: 'qeury' is no matrix"):
        sft.main(dataclasses.replace(config, lora=LoRAConfig(targets=("qeury",))))


@pytest.mark.slow
def test_killed_is_never_killed(config, tmp_path):
    train, heldout = (source.path for source in config.sources)
    runner = Runner(tmp_path, "sft", CONFIG % {"model": config.model, "train": train, "heldout": heldout})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runner.run(whole)
    runner.kill(killed, 3, seed=1, lines=(-2, 5))
    runner.run(killed)
    assert_same_run(killed, whole, 12, kinds=("params/", "optimizer/", "ema/", "step"))
    for file in ("adapter/adapter_model.safetensors", "model/params/model-00001.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
