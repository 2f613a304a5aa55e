"""Reward models on a made-up scorer: what is learnt, measured, kept and refused."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from stage_runs import Runner, arrays_of, lines_of, pretrained, written

import jaxlm
from jaxlm.adapters.quantising import quantise
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.hub import forward
from jaxlm.model.config import ExpertsConfig, LoRAConfig
from jaxlm.model.quantised import dequantised
from jaxlm.model.transformer import define_model
from jaxlm.preference.rewards import mean_rewards
from jaxlm.reward.config import AnnotatorWeight, RankingSource, RewardConfig
from jaxlm.stages import reward
from jaxlm.tokenizer import chat
from jaxlm.train import model_directory
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


def score(answer: str) -> int:
    """What the made-up annotator likes: the letter a."""
    return answer.count("a")


def record(number: int, draw: random.Random, annotator: str = "ann", turned: bool = False) -> dict:
    """2 to 5 answers in tiers by their score; "short" wants the opposite of "overall"."""
    answers = ["".join(draw.choices("abcd", k=draw.randint(3, 8))) for _ in range(draw.randint(2, 5))]
    tiers = [
        [str(n) for n in group]
        for _, group in itertools.groupby(
            sorted(range(len(answers)), key=lambda n: -score(answers[n])), key=lambda n: score(answers[n])
        )
    ]
    overall, other = (tiers[::-1], tiers) if turned else (tiers, tiers[::-1])
    return {
        "prompt_id": str(number),
        "messages": [{"role": "user", "content": f"say {number % 7}"}],
        "completions": [
            {"id": str(n), "content": a, "policy": "rich" if score(a) > 2 else "poor"} for n, a in enumerate(answers)
        ],
        "annotations": [
            {
                "id": f"{number}/{annotator}",
                "annotator": annotator,
                "role": "trainer",
                "status": "submitted",
                "rankings": {"overall": overall, "short": other},
            }
        ],
    }


@pytest.fixture(scope="module")
def base(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=2)


@pytest.fixture
def config(base, tmp_path) -> RewardConfig:
    draw = random.Random(0)
    train = [record(number, draw) for number in range(600)]
    heldout = [record(number, draw) for number in range(1000, 1100)]
    return RewardConfig(
        workdir=str(tmp_path / "reward"),
        model=base,
        sources=(
            RankingSource(name="train", path=written(tmp_path / "train.jsonl", train)),
            RankingSource(name="heldout", path=written(tmp_path / "heldout.jsonl", heldout), split="heldout"),
        ),
        criteria=("overall", "short"),
        row_length=256,
        batch_rows=16,
        batch_pairs=1024,
        epochs=10,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=5),
        loop=LoopConfig(log_every_steps=10, evaluate_every_steps=100),
    )


def loaded(config):
    directory = model_directory.read(f"{config.workdir}/model")
    definition = define_model(directory.config)
    return directory, definition, directory.load_params(definition)


def rewards(config, answers: list[str]) -> np.ndarray:
    directory, definition, params = loaded(config)
    encoder = reward.encoder_of(config, directory.chat_template())
    ids = [encoder.answer([{"role": "user", "content": "say 3"}], answer)[0] for answer in answers]
    return np.array([mean_rewards(definition, params, [one], 256, 1) for one in ids])


@pytest.mark.slow
def test_a_scorer_is_learnt_and_its_opposite_beside_it(config):
    reward.main(config)
    report = json.loads((Path(config.workdir) / "report.json").read_text())
    for criterion in ("overall", "short"):
        assert report["accuracy_by"]["criterion"][criterion]["share"] > 0.95, report["accuracy_by"]
    assert set(report["accuracy_by"]["ranked"]) <= {"2", "3", "4", "5"}
    assert set(report["accuracy_by"]["kind"]) == {"rich", "poor"}
    assert report["accuracy_by"]["distance"]["2"]["share"] > report["accuracy_by"]["distance"]["1"]["share"] - 0.02
    assert report["calibration_error"] < 0.1
    assert lines_of(config.workdir)[-1]["eval/pair_accuracy"] > 0.95
    # The heads learn apart: what one likes, the other does not.
    found = rewards(config, ["bbbb", "abbb", "aabb", "aaab", "aaaa"])
    assert (np.diff(found[:, 0]) > 0).all(), found
    assert (np.diff(found[:, 1]) < 0).all(), found


@pytest.mark.slow
def test_the_mean_of_the_reference_answers_is_0_after_reading_back(config):
    config = dataclasses.replace(config, steps=20, reference_policy="poor", reference_answers=100)
    reward.main(config)
    directory, definition, params = loaded(config)
    facts = directory.manifest.facts
    assert abs(facts["mean_before_centring"][0]) > 1e-2
    records = [json.loads(line) for line in Path(config.sources[0].path).read_text().splitlines()]
    encoder = reward.encoder_of(config, directory.chat_template())
    poor = [
        encoder.answer(r["messages"], c["content"])[0]
        for r in records
        for c in r["completions"]
        if c["policy"] == "poor"
    ]
    np.testing.assert_allclose(mean_rewards(definition, params, poor[:100], 256, 16), 0, atol=1e-5)


def steps_on(config, mesh: MeshConfig, devices: list) -> tuple:
    """Parameters and metrics after two steps on two batches."""
    config = dataclasses.replace(config, steps=10)
    encoder = reward.encoder_of(config, chat.load("chatml", model_directory.read(f"{config.model}/model").tokenizer()))
    made = make_mesh(mesh, devices)
    with jax.set_mesh(made):
        prompts = encoder.prompts(reward.read_records(config)["train"], lambda name: True)
        batches = reward.ranking_batches(config, prompts, made, config.accumulate)
        program = reward.build(config, made)
        state = program.initialize()
        for step in range(2):
            batch = reward.placed_batch(made, batches.batch(step), config.batch_rows)
            state, measured = program.step(state, batch)
        return jax.device_get(state.params), values(measured)


@pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (MeshConfig(data=8), MeshConfig(data=1, fsdp=8))),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_eight_devices_learn_what_one_learns(config, mesh):
    one, measured = steps_on(config, MeshConfig(), jax.devices()[:1])
    many, also = steps_on(config, mesh, jax.devices())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), one, many)
    np.testing.assert_allclose(list(measured.values()), list(also.values()), rtol=1e-4)


@pytest.mark.slow
def test_who_is_held_out_is_measured_and_not_trained_on(config, tmp_path):
    draw = random.Random(1)
    both = []
    for number in range(60):
        one = record(number, draw)
        state = draw.getstate()
        one["annotations"] += [
            one["annotations"][0]
            | {"id": "x", "annotator": "bea"}
            | {"rankings": {k: v[::-1] for k, v in one["annotations"][0]["rankings"].items()}}
        ]
        draw.setstate(state)
        both.append(one)
    source = RankingSource(name="train", path=written(tmp_path / "both.jsonl", both))
    config = dataclasses.replace(
        config, sources=(source,), criteria=("overall",), heldout_annotators=("bea",), epochs=1, steps=60
    )
    reward.main(config)
    by = json.loads((Path(config.workdir) / "report.json").read_text())["accuracy_by"]["annotator"]
    assert set(by) == {"bea"}
    assert by["bea"]["share"] < 0.2, "she wants the opposite of what was learnt"
    unheard = dataclasses.replace(config, heldout_annotators=(), annotators=(AnnotatorWeight(name="bea", weight=0.0),))
    reward.main(dataclasses.replace(unheard, workdir=config.workdir + "-0"))
    a, b = (loaded(dataclasses.replace(config, workdir=config.workdir + end))[2] for end in ("", "-0"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_stopped_and_gone_on_is_never_stopped(config):
    whole = dataclasses.replace(config, steps=12, workdir=config.workdir + "-whole")
    reward.main(whole)
    loop = dataclasses.replace(config.loop, checkpoint=CheckpointConfig(every_steps=4))
    parts = dataclasses.replace(config, steps=12, loop=loop)
    reward.main(dataclasses.replace(parts, loop=dataclasses.replace(loop, stop_at_step=5)))
    reward.main(parts)
    jax.tree.map(np.testing.assert_array_equal, loaded(whole)[2], loaded(parts)[2])


def test_what_cannot_be_is_refused(config, base, tmp_path):
    draw = random.Random(0)
    same = [record(3, draw)]
    twice = (
        RankingSource(name="a", path=written(tmp_path / "a.jsonl", same)),
        RankingSource(name="b", path=written(tmp_path / "b.jsonl", same), split="heldout"),
    )
    with pytest.raises(UserError, match="1 prompts are in train and in heldout, such as"):
        reward.main(dataclasses.replace(config, sources=twice))
    bad = RankingSource(name="bad", path=written(tmp_path / "bad.jsonl", [record(1, draw), "{}", "{}"]))
    with pytest.raises(Refused, match="sources.bad: 2 of 3 records are bad"):
        reward.main(dataclasses.replace(config, sources=(bad,), workdir=config.workdir + "-bad"))
    tied = record(1, draw)
    ids = [c["id"] for c in tied["completions"]]
    tied["annotations"][0]["rankings"] = {"overall": [ids], "short": [ids]}
    source = RankingSource(name="tied", path=written(tmp_path / "tied.jsonl", [tied]))
    with pytest.raises(UserError, match="sources: no prompt is left with answers to compare: 1 no_untied_pair"):
        reward.main(dataclasses.replace(config, sources=(source,), workdir=config.workdir + "-tied"))
    with pytest.raises(ConfigError, match="reference_policy: no answer is of policy 'nobody'"):
        reward.main(dataclasses.replace(config, steps=1, reference_policy="nobody", workdir=config.workdir + "-none"))
    with pytest.raises(ConfigError, match="criteria: is empty"):
        dataclasses.replace(config, criteria=())


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_experts_learn_beside_new_heads_over_four_bits(config, packed_rows, tmp_path, dora, caplog):
    experts = ExpertsConfig(count=4, chosen=2, feed_forward=16)
    mixture = pretrained(packed_rows, tmp_path / "mixture", steps=4, experts=experts)
    lora = LoRAConfig(rank=2, targets=("layers/experts/*",), base="nf4", dora=dora)
    reward.main(dataclasses.replace(config, model=mixture, lora=lora, steps=2))
    told = "no adapter/ will be written, model/ will have all of it: peft has no DoRA beside mlp.experts"
    assert (told in caplog.text) == dora
    assert (Path(config.workdir) / "adapter").exists() != dora
    before, after = (model_directory.read(f"{folder}/model") for folder in (mixture, config.workdir))
    old, new = (found.load_params(define_model(found.config))["stack"]["0"]["experts"] for found in (before, after))
    kept = arrays_of(config.workdir, 2)
    for name in ("gate", "up", "down"):
        a, b = (kept[f"params/stack/0/experts/{name}_lora_{part}"] for part in "ab")
        whole = dequantised(*quantise(old[name], "nf4")) + lora.scale * np.einsum("ledr,lerf->ledf", a, b)
        if dora:
            magnitude = kept[f"params/stack/0/experts/{name}_lora_magnitude"]
            whole *= (magnitude / np.linalg.norm(whole, axis=-2))[..., None, :]
        np.testing.assert_allclose(new[name], whole, atol=1e-5 if dora else 1e-6)
    np.testing.assert_array_equal(new["router"], old["router"])


@pytest.mark.slow
def test_adapters_learn_beside_new_heads(config, base):
    config = dataclasses.replace(config, lora=LoRAConfig(rank=2, dropout=0.1), steps=2)
    reward.main(config)
    kept = arrays_of(config.workdir, 2)
    params = {name.split("/")[-1] for name in kept if name.startswith("params/") and "_lora_" not in name}
    assert params == {"score", "score_bias"}
    assert len([name for name in kept if name.startswith("params/")]) == 2 + 2 * 7
    before, after = (model_directory.read(f"{folder}/model") for folder in (base, config.workdir))
    old, new = (found.load_params(define_model(found.config)) for found in (before, after))
    np.testing.assert_array_equal(new["embedding"], old["embedding"])
    change = new["stack"]["0"]["mlp"]["up"] - old["stack"]["0"]["mlp"]["up"]
    a, b = (kept[f"params/stack/0/mlp/up_lora_{part}"] for part in "ab")
    np.testing.assert_allclose(change, config.lora.scale * np.einsum("ldr,lrf->ldf", a, b), atol=1e-6)
    # From a reward model, its heads go on.
    again = dataclasses.replace(config, model=config.workdir, workdir=config.workdir + "-2", steps=1)
    first = reward.tune(again, make_mesh(MeshConfig(data=1), jax.devices()[:1]), after, True)
    begun = first.start(first.trained.shardings(first.mesh))
    np.testing.assert_array_equal(begun["score"], new["score"])


@pytest.mark.slow
def test_the_adapter_over_its_base_gives_the_rewards_of_the_model(config, base):
    """Of averages, of a mean that was brought to 0, and also where the base was a reward model."""
    optimizer = OptimizerConfig(weight_decay=0.0, epsilon=1e-3, ema=0.9)
    kind, reference = LoRAConfig(rank=2, dora=True), {"reference_policy": "poor", "reference_answers": 50}
    config = dataclasses.replace(config, lora=kind, steps=3, optimizer=optimizer, **reference)
    ids = forward.padded(np.arange(24).reshape(3, 8) + 60)
    scores = lambda lm: forward.last_scores(lm.definition, lm.params, *ids)[:3]
    first = config.workdir
    for model, workdir in ((base, first), (first, first + "-2")):
        reward.main(dataclasses.replace(config, model=model, workdir=workdir))
        beside, whole = jaxlm.load(model, adapter=f"{workdir}/adapter"), jaxlm.load(workdir)
        assert beside.config.criteria == whole.config.criteria == ("overall", "short")
        np.testing.assert_allclose(scores(beside), scores(whole), atol=1e-5)
        kept = arrays_of(workdir, 3)
        np.testing.assert_array_equal(beside.params["score"], kept["ema/score"])
        assert np.abs(kept["ema/score"] - kept["params/score"]).max() > 1e-4
        moved = kept["ema/score_bias"] - np.asarray(beside.params["score_bias"])
        before = model_directory.read(f"{workdir}/model").manifest.facts["mean_before_centring"]
        np.testing.assert_allclose(moved, before, atol=1e-6)
        assert np.abs(scores(jaxlm.load(first)) - scores(beside)).max() > 1e-3 or workdir == first


CONFIG = """
from jaxlm.base.config import MeshConfig
from jaxlm.model.config import LoRAConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.train.config import ScheduleConfig

def get_config():
    return RewardConfig(
        model=%(model)r,
        sources=(RankingSource(name="train", path=%(train)r),),
        criteria=("overall", "short"),
        row_length=256,
        batch_rows=16,
        batch_pairs=1024,
        steps=3,
        lora=LoRAConfig(rank=2),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=1),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(config, base, tmp_path):
    runner = Runner(tmp_path, "reward", CONFIG % {"model": base, "train": config.sources[0].path})
    runner.run(tmp_path / "1")
    # Twice: read back from a cache, a CPU program of several processes loses the order of its collectives and dies.
    for workdir in (tmp_path / "again", tmp_path / "2"):
        runner.run(workdir, processes=2)
    for file in ("adapter/adapter_model.safetensors", "model/params/model-00001.safetensors"):
        one, two = (safetensors.numpy.load_file(tmp_path / name / file) for name in "12")
        assert one.keys() == two.keys()
        for name, value in one.items():
            np.testing.assert_allclose(two[name], value, atol=1e-5)
