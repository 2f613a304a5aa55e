"""A stopped run goes on with all that its optimizer keeps, to the bit; and in the other layout of the layers."""

import dataclasses

import numpy as np
import pytest
from stage_runs import arrays_of, assert_same_run, lines_of

from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

KEPT = {"soap": "left/basis", "adafactor": "v_row", "lion": "mu", "sgd": "trace"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KEPT))
def test_stopped_and_gone_on_equals_never_stopped(kind, packed_rows, tmp_path):
    config = PretrainConfig(
        workdir=str(tmp_path / "whole"),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=288, layers=2, width=16, heads=2, feed_forward=32, compute="float32"),
        batch_rows=8,
        steps=6,
        optimizer=OptimizerConfig(kind=kind, soap_refresh_steps=2),
        schedule=ScheduleConfig(peak=1e-3, warmup_steps=1),
        loop=LoopConfig(log_every_steps=1, checkpoint=CheckpointConfig(every_steps=3)),
    )
    pretrain.main(config)
    stopped = dataclasses.replace(config, workdir=str(tmp_path / "stopped"))
    until = lambda step, **fields: dataclasses.replace(
        stopped, loop=dataclasses.replace(stopped.loop, stop_at_step=step), **fields
    )
    pretrain.main(until(3))
    pretrain.main(until(0))
    assert_same_run(config.workdir, stopped.workdir, 6)
    assert any(KEPT[kind] in name.replace(".", "/") for name in arrays_of(config.workdir, 6))
    # The other layout, from the same step on: the same numbers but for rounding.
    turned = dataclasses.replace(config, workdir=str(tmp_path / "turned"))
    pretrain.main(dataclasses.replace(turned, loop=dataclasses.replace(turned.loop, stop_at_step=3)))
    pretrain.main(dataclasses.replace(turned, model=dataclasses.replace(turned.model, scan_layers=False)))
    losses = [
        [line["train/loss"] for line in lines_of(run.workdir) if "train/loss" in line] for run in (config, turned)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
