"""Out of memory has an answer: what needs how much, and what would fit."""

import jax
import pytest

from jaxlm import __main__ as command
from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig, override
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.plan import memory
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import OptimizerConfig, ScheduleConfig


@pytest.fixture
def config(packed_rows, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        workdir=str(tmp_path),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=512, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=32,
        steps=12,
        optimizer=OptimizerConfig(ema=0.9),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=4),
    )


def test_parts_are_those_of_one_device(config):
    config = pretrain.complete(config)
    program = pretrain.build(config, sharding.make_mesh(config.mesh))
    parts = memory.stored_parts(program)
    whole = 4 * sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    assert whole / 4 <= parts["parameters"] < whole  # shared by 4, norms and the like excepted
    assert parts["average"] == parts["parameters"]
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)  # AdamW's two moments
    assert parts["batch"] == 32 * 64 * (3 * 4 + 1) // 8


@pytest.mark.slow
def test_the_error_names_the_parts_and_what_would_fit(config, monkeypatch, capsys):
    """A simulated error of TPU's compiler, whose chip has room for a bit less than the step needs."""
    complete = pretrain.complete(config)
    needs = memory.need(pretrain.build(complete, sharding.make_mesh(config.mesh)))
    room = (needs.total - 2**16) / 2**20

    def compile_(program):
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 9.99M of {room:.4f}M hbm.\nmore\nlines"
        )

    monkeypatch.setattr(pretrain, "compiled_step", compile_)
    monkeypatch.setattr(command, "make_config", lambda *_: config)
    assert command.main(["pretrain", "--config=x", "--workdir=y"]) == 2
    said = capsys.readouterr().err
    assert "out of memory: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm." in said
    assert f"one device needs {memory.size(needs.total)}, and has {memory.size(room * 2**20)}:" in said
    for part in ("parameters", "optimizer", "average", "batch", "temporaries"):
        assert f"  {part}" in said
    assert "would fit, the cheapest first:" in said
    fitting = [line for line in said.splitlines() if line.startswith("  --config.")]
    assert 1 <= len(fitting) <= 3
    flags = dict(flag.removeprefix("--config.").split("=") for flag in fitting[0].partition(": ")[0].split())
    other = override(complete, flags)
    assert memory.need(pretrain.build(other, sharding.make_mesh(other.mesh))).total < room * 2**20


def test_errors_are_read():
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. …")
    assert memory.capacity(error) == int(15.75 * 2**30)
    assert memory.used(error) == int(20.5 * 2**30)
    assert memory.used(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")) is None
    assert (memory.size(3 * 2**30), memory.size(5000)) == ("3.00 GiB", "4.9 KiB")


def test_an_explanation_that_fails_leaves_the_advice(config, monkeypatch, capsys):
    def run_out(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    monkeypatch.setattr(pretrain, "main", run_out)
    monkeypatch.setattr(pretrain, "build", lambda *_: 1 / 0)
    monkeypatch.setattr(command, "make_config", lambda *_: config)
    assert command.main(["pretrain", "--config=x", "--workdir=y"]) == 2
    assert "a smaller batch_rows, a larger accumulate" in capsys.readouterr().err
