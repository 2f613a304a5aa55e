"""Whole pretraining runs of a tiny model: what the loop stops for, writes and refuses."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.__main__ import config_class, run
from jaxlm.base import metrics
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.report import page as report
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.stages.run import state_of
from jaxlm.train.config import (
    CheckpointConfig,
    LoopConfig,
    OptimizerConfig,
    PlateauConfig,
    ScheduleConfig,
    WatchdogConfig,
)


@pytest.fixture
def config(packed_rows, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        workdir=str(tmp_path / "run"),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=288, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=8,
        steps=12,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=3, checkpoint=CheckpointConfig(every_steps=3)),
    )


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_what_it_says_at_each_evaluation_is_kept_once_and_shown(config):
    config = dataclasses.replace(config, sample_prompts=("the cat", "a <b>dog"))

    def spoken():
        return [json.loads(line) for line in (Path(config.workdir) / "completions.jsonl").read_text().splitlines()]

    pretrain.main(dataclasses.replace(config, loop=dataclasses.replace(config.loop, stop_at_step=9)))
    before = spoken()
    assert [(line["step"], line["prompt"]) for line in before] == [
        (step, prompt) for step in (3, 6, 9) for prompt in config.sample_prompts
    ]
    assert all(line["stop_reason"] in ("length", "eos") for line in before)
    # Step 9 is lost, and taken again: it says the same.
    shutil.rmtree(Path(config.workdir) / "checkpoints/9")
    pretrain.main(config)
    assert spoken()[:6] == before
    assert [line["step"] for line in spoken()[6:]] == [12, 12]
    page = (report.write(config.workdir, config_class)).read_text()
    assert "a &lt;b&gt;dog" in page
    assert page.count("the cat</span>") == 4


def test_a_prompt_longer_than_a_row_is_refused_at_the_start(config):
    with pytest.raises(ConfigError, match=r"sample_prompts\[0\]: has \d+ tokens; 1 to 32 are possible"):
        pretrain.main(dataclasses.replace(config, sample_prompts=("the cat " * 10,)))


@pytest.mark.slow
def test_stops_when_the_error_has_stopped_falling_and_stays_stopped(config):
    # "Falling" is asked to mean 90 % a look: the third evaluation ends it.
    plateau = PlateauConfig(evaluations=2, least_improvement=0.9)
    config = dataclasses.replace(config, plateau=plateau)
    pretrain.main(config)
    evaluated = [line["step"] for line in lines(config) if "eval/loss" in line]
    assert evaluated == [3, 6, 9]
    assert max(line["step"] for line in lines(config)) == 9
    before = lines(config)
    pretrain.main(config)
    assert lines(config) == before
    model = jaxlm.load(config.workdir)
    assert json.loads((Path(config.workdir) / "manifest.json").read_text())["facts"]["steps"] == 9
    assert model.config.layers == 1


@pytest.mark.slow
def test_the_average_is_measured_and_becomes_the_model(config):
    config = dataclasses.replace(config, optimizer=OptimizerConfig(ema=0.5))
    pretrain.main(config)
    last = [line for line in lines(config) if "eval/loss" in line][-1]
    assert last["eval/ema_loss"] != last["eval/loss"]
    texts = ["the cat sees a dog", "the large bird follows the small cat"]
    averaged = jaxlm.load(config.workdir)
    without = dataclasses.replace(config, optimizer=OptimizerConfig(), workdir=config.workdir + "-plain")
    pretrain.main(without)
    plain = jaxlm.load(without.workdir)
    assert not np.array_equal(averaged.params["embedding"], plain.params["embedding"])
    assert all(a.logprob != b.logprob for a, b in zip(averaged.score(texts), plain.score(texts), strict=True))


@pytest.mark.slow
def test_traces_the_chosen_steps(config):
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, profile_steps=(4, 5)))
    pretrain.main(config)
    assert list(Path(config.workdir).glob("tensorboard/plugins/profile/*/*"))


@pytest.mark.slow
def test_a_run_that_starts_again_within_the_trace_does_not_end_a_trace_it_never_began(config):
    loop = dataclasses.replace(config.loop, profile_steps=(2, 8), stop_at_step=6)
    pretrain.main(dataclasses.replace(config, loop=loop))
    pretrain.main(dataclasses.replace(config, loop=dataclasses.replace(loop, stop_at_step=0)))
    assert lines(config)[-1]["step"] == 12


@pytest.mark.slow
def test_the_watchdog_ends_a_run_whose_data_never_comes(config, packed_rows, tmp_path):
    """In a process of its own, for the watchdog ends the process."""
    import subprocess
    import sys

    script = tmp_path / "hang.py"
    script.write_text(f"""
import sys, time
from jaxlm import devices
devices.start()
from jaxlm.report import page as report
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.base import config as configs
import jaxlm.data.loader as loader
real = loader.Loader.batches
def hanging(self, step):
    for number, item in enumerate(real(self, step)):
        if number == 3:
            time.sleep(100)
        yield item
loader.Loader.batches = hanging
import json
pretrain.main(configs.from_dict(PretrainConfig, json.loads({json.dumps(json.dumps(as_dict(config)))})))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 76, done.stderr
    assert "hanging" in done.stderr
    assert [line["step"] for line in lines(config)][-1] >= 1


def as_dict(config):
    from jaxlm.base import config as configs

    watchdog = WatchdogConfig(step_seconds=2.0)
    return configs.to_dict(dataclasses.replace(config, loop=dataclasses.replace(config.loop, watchdog=watchdog)))


def test_a_run_that_only_skips_steps_is_refused_and_says_so(config, monkeypatch):
    loop = dataclasses.replace(config.loop, max_skipped_steps=4)
    broken = lambda tree: jax.numpy.float32(jax.numpy.nan)
    monkeypatch.setattr(pretrain.optimizers, "global_norm", broken)
    with pytest.raises(Refused, match="the last 4 steps up to step 4 were all skipped"):
        pretrain.main(dataclasses.replace(config, loop=loop))
    assert not (Path(config.workdir) / "model").exists()


@pytest.mark.slow
def test_a_held_out_figure_that_is_not_finite_does_not_end_the_run(config, monkeypatch):
    real = metrics.values
    monkeypatch.setattr(
        metrics,
        "values",
        lambda found: {k: math.nan if "bits_per_byte" in found else v for k, v in real(found).items()},
    )
    pretrain.main(config)
    kept = json.loads((Path(config.workdir) / "checkpoints/12/manifest.json").read_text())
    assert kept["extra"]["figures"] == [None] * 4
    assert kept["metric"] is None


@pytest.mark.slow
def test_the_best_checkpoint_is_the_one_that_was_measured(config):
    checkpoint = CheckpointConfig(every_steps=1, keep_last=1, keep_best=1)
    pretrain.main(dataclasses.replace(config, loop=dataclasses.replace(config.loop, checkpoint=checkpoint)))
    kept = sorted(int(path.name) for path in (Path(config.workdir) / "checkpoints").iterdir())
    assert all(step % 3 == 0 for step in kept), "evaluated every third step"
    assert 12 in kept


def test_the_plateau_needs_held_out_rows(config, packed_rows, tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(packed_rows, rows)
    found = json.loads((rows / "manifest.json").read_text())
    del found["facts"]["heldout"]
    (rows / "manifest.json").write_text(json.dumps(found))
    without = dataclasses.replace(config, data=(MixtureSource(path=str(rows)),))
    with pytest.raises(ConfigError, match=r"plateau.evaluations: needs held-out rows"):
        pretrain.main(dataclasses.replace(without, plateau=PlateauConfig(evaluations=2)))
    pretrain.main(without)
    assert not any("eval/loss" in line for line in lines(config))


@pytest.mark.slow
def test_weights_that_change_on_the_way_are_kept_with_the_checkpoint(config, packed_rows):
    def go_on(weights, stop_at_step=0, workdir=config.workdir):
        sources = tuple(MixtureSource(path=packed_rows, weight=weight) for weight in weights)
        loop = dataclasses.replace(config.loop, stop_at_step=stop_at_step)
        given = dataclasses.replace(config, data=sources, loop=loop, workdir=workdir)
        run("pretrain", given)
        return given

    go_on((1.0, 0.0), stop_at_step=6)
    assert state_of(go_on((1.0, 1.0), stop_at_step=9)) == "unfinished"
    finished = go_on((1.0, 1.0))
    kept = json.loads((Path(config.workdir) / "checkpoints/12/manifest.json").read_text())
    assert kept["extra"]["mixture"] == [[0, [1.0, 0.0]], [6, [1.0, 1.0]]]
    # The change counts from step 6, not from the restart at step 9: without that stop it is the same.
    once = config.workdir + "-once"
    go_on((1.0, 0.0), 6, once)
    go_on((1.0, 1.0), 0, once)
    also = json.loads((Path(once) / "checkpoints/12/manifest.json").read_text())
    assert also["arrays"] == kept["arrays"]
    assert also["extra"] == kept["extra"]
    # A finished run of other weights is another run's.
    assert state_of(finished) == "done"
    halved = dataclasses.replace(finished.data[1], weight=0.5)
    assert state_of(dataclasses.replace(finished, data=(finished.data[0], halved))) == "another config"
    with pytest.raises(UserError, match=r"data.1.weight: was 1.0, now 0.5"):
        go_on((1.0, 0.5))


@pytest.mark.slow
def test_a_damaged_step_of_another_layout_falls_back_to_the_one_before(config):
    loop = dataclasses.replace(config.loop, stop_at_step=6)
    pretrain.main(dataclasses.replace(config, loop=loop))
    unrolled = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False))
    pretrain.main(dataclasses.replace(unrolled, loop=dataclasses.replace(loop, stop_at_step=9)))
    state = Path(config.workdir) / "checkpoints/9/state"
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    pretrain.main(unrolled)
    assert [line["step"] for line in lines(config) if "train/loss" in line] == list(range(1, 13))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"mesh": MeshConfig(data=3, fsdp=1)}, "mesh: data=3 does not divide 8 devices"),
        ({"mesh": MeshConfig(data=1, fsdp=2, tensor=4)}, "mesh.tensor: 4 does not divide model.heads 2"),
        ({"batch_rows": 12}, "batch_rows: 12 rows do not divide among 8 parts of the mesh"),
        (
            {"batch_rows": 16, "accumulate": 4},
            "batch_rows: 16 rows do not divide among 8 parts of the mesh in 4 pieces",
        ),
        ({"loss_chunk_tokens": 100}, "loss_chunk_tokens: 100 does not divide the 512 of a piece"),
        ({"row_length": 32}, "row_length: is 32, but the rows have 64 tokens"),
        ({"model": ModelConfig(vocab_size=100, layers=1, width=16, heads=2)}, "model.vocab_size: 100 is below the tok"),
        ({"data": ()}, "data: is empty"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_field(config, changed, problem):
    assert jax.device_count() == 8
    with pytest.raises(ConfigError) as caught:
        pretrain.main(dataclasses.replace(config, **changed))
    assert problem in str(caught.value)


def test_rows_that_are_not_there_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        pretrain.main(dataclasses.replace(config, data=(MixtureSource(path=str(tmp_path / "none")),)))


def test_other_data_under_a_run_is_refused(config, packed_rows, tmp_path):
    pretrain.main(config)
    kept = json.loads((Path(config.workdir) / "inputs.json").read_text())
    (Path(config.workdir) / "inputs.json").write_text(json.dumps(dict.fromkeys(kept, "0" * 64)))
    with pytest.raises(UserError, match="began with another content"):
        pretrain.main(config)


@pytest.mark.slow
def test_the_depth_dial_gives_a_whole_run(config):
    given = dataclasses.replace(config, depth=1, batch_rows=8, steps=2, schedule=ScheduleConfig(warmup_steps=1))
    complete = pretrain.complete(dataclasses.replace(given, model=ModelConfig(compute="float32")))
    assert (complete.model.layers, complete.model.width, complete.model.heads) == (1, 64, 1)
    assert complete.schedule.peak > 0
    pretrain.main(dataclasses.replace(given, model=ModelConfig(compute="float32")))
    assert len([line for line in lines(config) if "train/loss" in line]) == 2
