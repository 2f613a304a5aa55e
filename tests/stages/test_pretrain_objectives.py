"""Pretraining on missing words and on rearranged documents: the step's invariants, and whole runs of both."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from stage_runs import assert_same_run, lines_of

import jaxlm
from jaxlm.__main__ import config_class
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.data.config import MixtureSource
from jaxlm.data.loader import Loader
from jaxlm.hub.config import ExportConfig
from jaxlm.model.config import ModelConfig
from jaxlm.objectives.config import FillInTheMiddleConfig, MaskedWordsConfig, ObjectiveConfig
from jaxlm.report import page as report
from jaxlm.stages import export, pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from jaxlm.train.state import convert_layout

SLOW = pytest.mark.slow
V, S, B = 288, 64, 8
BERT = ModelConfig(
    vocab_size=V,
    layers=2,
    width=32,
    heads=4,
    feed_forward=64,
    causal=False,
    norm="layer",
    norm_place="sum",
    norm_epsilon=1e-12,
    biases=("qkv", "output", "mlp"),
    gated_mlp=False,
    activation="gelu_exact",
    learned_positions=S,
    token_types=2,
    head="transform",
    tied_embeddings=True,
    compute="float32",
).complete()
DECODER = ModelConfig(vocab_size=V, layers=1, width=32, heads=2, compute="float32")
MASKED = ObjectiveConfig(masked_words=MaskedWordsConfig(mask_token="<|reserved_0|>"))
MIDDLE = ObjectiveConfig(
    fill_in_the_middle=FillInTheMiddleConfig(
        prefix_token="<|reserved_1|>", suffix_token="<|reserved_2|>", middle_token="<|reserved_3|>"
    )
)


@pytest.fixture
def config(packed_rows, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        workdir=str(tmp_path / "run"),
        data=(MixtureSource(path=packed_rows),),
        model=dataclasses.replace(BERT, layers=1),
        objective=MASKED,
        row_length=S,
        batch_rows=B,
        steps=12,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=3, checkpoint=CheckpointConfig(every_steps=3)),
    )


def batches_of(config, fixed=False):
    """step → a global batch; `fixed`: always the first one."""
    path = config.data[0].path
    change = pretrain.objectives.change_of(config.objective, pretrain.tokenizers.load(f"{path}/tokenizer"), config.seed)
    loader = Loader([(path, 1.0)], "train", global_batch=config.batch_rows, seed=config.seed, change=change)
    return lambda step: loader.batch(0 if fixed else step)


def run(config, mesh=None, steps=3, fixed=False):
    mesh = make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
    batch, history = batches_of(config, fixed), []
    with jax.set_mesh(mesh):
        program = pretrain.build(config, mesh)
        state = program.initialize()
        for step in range(steps):
            state, metrics = program.step(state, jax.device_put(batch(step), program.shardings.batch))
            history.append(values(metrics))
        return jax.device_get(state), history


@pytest.fixture(scope="module")
def one_device(packed_rows):
    config = PretrainConfig(
        data=(MixtureSource(path=packed_rows),),
        model=BERT,
        objective=MASKED,
        row_length=S,
        batch_rows=B,
        steps=12,
        # Attention's key bias has no gradient but rounding, which AdamW would blow up to whole steps.
        optimizer=OptimizerConfig(kind="sgd"),
        schedule=ScheduleConfig(peak=0.5, warmup_steps=2),
    )
    return config, *run(config)


@pytest.mark.parametrize(
    ("changed", "mesh"),
    [
        pytest.param({"accumulate": 4}, None, id="pieces"),
        pytest.param({"loss_chunk_tokens": 128}, None, id="chunks", marks=SLOW),
        pytest.param({"model": dataclasses.replace(BERT, scan_layers=False)}, None, id="unrolled", marks=SLOW),
        pytest.param({}, MeshConfig(data=2, fsdp=2, tensor=2), id="eight devices"),
        pytest.param({"accumulate": 2}, MeshConfig(data=1, fsdp=4, context=2), id="along the row too", marks=SLOW),
    ],
)
def test_pieces_devices_and_layout_change_nothing(one_device, changed, mesh):
    config, state, history = one_device
    found, others = run(dataclasses.replace(config, **changed), mesh)
    for a, b in zip(history, others, strict=True):
        np.testing.assert_allclose(a["train/loss"], b["train/loss"], rtol=1e-5)
        np.testing.assert_allclose(a["train/gradient_norm"], b["train/gradient_norm"], rtol=1e-4)
    params = state.params if "model" not in changed else convert_layout(state.params, BERT, stacked=False)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_loss_is_that_of_the_missing_words_alone(one_device):
    """The mean over the batch's missing words of -log p, with the model's own logits."""
    config, *_ = one_device
    batch = batches_of(config)(0)
    definition = pretrain.define_model(config.model)
    params = pretrain.from_seed(definition, config.seed)(None)
    places = (batch["ids"], batch["segment_ids"], batch["positions"])
    forward = lambda *x: pretrain.losses.apply(definition, params, lambda m: m.logits(m(*x)[0]))
    logp = jax.nn.log_softmax(jax.jit(forward)(*places).astype(np.float32))
    each = np.take_along_axis(np.asarray(logp), batch["targets"][..., None], axis=-1)[..., 0]
    expected = -each[batch["loss_mask"]].mean()
    np.testing.assert_allclose(one_device[2][0]["train/loss"], expected, rtol=1e-5)
    assert 0.1 < batch["loss_mask"].sum() / (batch["segment_ids"] > 0).sum() < 0.2


@pytest.mark.slow
def test_overfits_one_batch_of_missing_words(one_device):
    config = dataclasses.replace(one_device[0], steps=100, optimizer=OptimizerConfig(weight_decay=0.0))
    config = dataclasses.replace(config, schedule=ScheduleConfig(peak=1e-2, warmup_steps=10))
    _, history = run(config, steps=100, fixed=True)
    assert history[0]["train/loss"] > 4
    assert history[-1]["train/loss"] < 0.05
    assert history[-1]["train/accuracy"] == 1


def stopped_and_continued(config):
    """The same run, stopped behind step 7 and started again from its checkpoint."""
    again = dataclasses.replace(config, workdir=config.workdir + "-again")
    pretrain.main(dataclasses.replace(again, loop=dataclasses.replace(config.loop, stop_at_step=7)))
    pretrain.main(again)
    return again.workdir


@pytest.mark.slow
def test_missing_words_from_rows_to_vectors_and_to_bert(config, tmp_path):
    """A whole run; its figures; the same after a stop, bit for bit; its model as BERT, and back."""
    summary = pretrain.main(config)
    assert summary["figure"].endswith("nats a missing word held out")
    evaluated = [line for line in lines_of(config.workdir) if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6, 9, 12]
    assert not any(name.endswith("bits_per_byte") for line in lines_of(config.workdir) for name in line)
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    assert 0 < evaluated[-1]["eval/accuracy"] < 1
    assert "eval/loss" in report.write(config.workdir, config_class).read_text()
    assert_same_run(stopped_and_continued(config), config.workdir, 12, ("params/", "optimizer/"))

    lm = jaxlm.load(config.workdir)
    texts = ["the cat sees a dog", "the large bird follows the small cat"]
    assert lm.embed(texts).shape == (2, 32)
    export.main(ExportConfig(model=config.workdir, output=f"{tmp_path}/bert", without_verdict=True))
    assert json.loads((tmp_path / "bert/config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    bert = jaxlm.load(tmp_path / "bert")
    np.testing.assert_array_equal(bert.embed(texts), lm.embed(texts))
    mask = lm.tokenizer.special_ids["<|reserved_0|>"]
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode("the c"), mask, *lm.tokenizer.encode("t"), lm.tokenizer.eos_id]
    np.testing.assert_array_equal(bert.logits([ids]), lm.logits([ids]))
    with pytest.raises(UserError, match="generate: the model is an encoder"):
        lm.generate(["the cat"])


@pytest.mark.slow
def test_rearranged_documents_from_rows_to_a_model_that_speaks(config):
    """Bits per byte are those of plain rows; the order of the data is the same; a stop changes no bit."""
    config = dataclasses.replace(config, model=DECODER, objective=MIDDLE)
    pretrain.main(config)
    plain = dataclasses.replace(config, objective=ObjectiveConfig(), workdir=config.workdir + "-plain")
    pretrain.main(dataclasses.replace(plain, loop=dataclasses.replace(config.loop, stop_at_step=3)))
    first = lambda workdir: next(line for line in lines_of(workdir) if line["step"] == 1)
    assert first(config.workdir)["train/loss"] != first(plain.workdir)["train/loss"]
    assert first(config.workdir)["tokens"] == first(plain.workdir)["tokens"]
    evaluated = [line for line in lines_of(config.workdir) if "eval/bits_per_byte" in line]
    assert [line["step"] for line in evaluated] == [3, 6, 9, 12]
    assert_same_run(stopped_and_continued(config), config.workdir, 12, ("params/", "optimizer/"))
    assert len(jaxlm.load(config.workdir).generate(["the cat"], max_tokens=4)) == 1


@SLOW
def test_the_average_is_judged_by_its_own_loss(config):
    config = dataclasses.replace(config, steps=3, optimizer=OptimizerConfig(ema=0.5))
    pretrain.main(config)
    (evaluated,) = [line for line in lines_of(config.workdir) if "eval/loss" in line]
    assert evaluated["eval/ema_loss"] != evaluated["eval/loss"]
    kept = json.loads((Path(config.workdir) / "checkpoints/3/manifest.json").read_text())
    assert kept["extra"]["figures"] == [evaluated["eval/ema_loss"]]


CAUSAL = dataclasses.replace(BERT, causal=True)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"model": CAUSAL}, "objective.masked_words: a causal model does not see what follows"),
        ({"objective": ObjectiveConfig()}, "model.causal: is off, so that each token would see the next one"),
        ({"objective": MIDDLE}, "model.causal: is off"),
        ({"model": dataclasses.replace(BERT, head="pooler")}, "model.head: is pooler, which predicts no token"),
        ({"sample_prompts": ("the cat",)}, "sample_prompts: an encoder writes no text"),
        ({"steps": 0, "depth": 2}, "steps: is 0; give it: what the depth derives was measured on causal models"),
        ({"batch_rows": 0}, "batch_rows: is 0; give it"),
        ({"schedule": ScheduleConfig()}, "schedule.peak: is 0; give it"),
        (
            {"objective": ObjectiveConfig(masked_words=MaskedWordsConfig())},
            r"objective.masked_words.mask_token: the rows' tokenizer has no special token '\[MASK\]'",
        ),
        (
            {"model": DECODER, "objective": ObjectiveConfig(fill_in_the_middle=FillInTheMiddleConfig())},
            r"objective.fill_in_the_middle.prefix_token: the rows' tokenizer has no special token '<\|fim_prefix\|>'",
        ),
        (
            {"model": dataclasses.replace(BERT, learned_positions=32)},
            "model.learned_positions: 32 are too few for rows of 64 tokens",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(config, changed, problem):
    with pytest.raises(ConfigError, match=problem):
        pretrain.main(dataclasses.replace(config, **changed))
