"""Preferences as a stage: what the loss is made of, meshes and pieces, the reference's cache, what is learnt."""

import dataclasses
import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_runs import arrays_of, assert_same_run, lines_of, pretrained, written

from jaxlm.adapters.quantising import quantise
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.base.metrics import values
from jaxlm.base.sharding import make_mesh
from jaxlm.model.config import ExpertsConfig, LoRAConfig
from jaxlm.model.quantised import dequantised
from jaxlm.model.transformer import define_model
from jaxlm.preference import reference, scoring
from jaxlm.preference.config import DPOConfig, KTOConfig, ORPOConfig, PreferenceConfig, SimPOConfig
from jaxlm.preference.records import Encoder, read_records
from jaxlm.reward.config import AnnotatorWeight, RankingSource
from jaxlm.sample.scoring import token_scores
from jaxlm.stages import preference
from jaxlm.tokenizer import chat
from jaxlm.train import model_directory
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

UNSAID = "no adapter/ will be written, model/ will have all of it: peft has no DoRA beside mlp.experts"
METHODS: dict[str, dict[str, Any]] = {
    "dpo": dict(dpo=DPOConfig()),
    "ipo": dict(dpo=DPOConfig(loss="ipo", length_normalised=True, beta=0.5)),
    "kto": dict(dpo=None, kto=KTOConfig()),
    "orpo": dict(dpo=None, orpo=ORPOConfig(weight=2.0)),
    "simpo": dict(dpo=None, simpo=SimPOConfig()),
}


def record(number: int, draw: random.Random, tiers: list[list[str]] | None = None, **said: Any) -> dict:
    """2 to 4 answers; the more of the letter a, the better. A prompt of more than one turn every second time."""
    count = draw.randint(2, 4)
    ids = "abcd"[:count]
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}] * (number % 2)
    annotation = {"id": "1", "annotator": "ann", "role": "trainer", "status": "submitted"}
    return {
        "prompt_id": str(number),
        "messages": [*before, {"role": "user", "content": f"say {number % 7}"}],
        "completions": [
            {
                "id": id,
                "content": "a" * (count - n) + "bcd"[: draw.randint(0, 3)],
                "policy": "rich" if n < 1 else "poor",
            }
            for n, id in enumerate(ids)
        ],
        "annotations": [annotation | {"rankings": {"overall": tiers or [[id] for id in ids]}} | said],
    }


@pytest.fixture(scope="module")
def base(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=2)


@pytest.fixture
def config(base, tmp_path) -> PreferenceConfig:
    draw = random.Random(0)
    train = [record(number, draw) for number in range(60)]
    heldout = [record(number, draw) for number in range(1000, 1012)]
    return PreferenceConfig(
        workdir=str(tmp_path / "preference"),
        model=base,
        sources=(
            RankingSource(name="train", path=written(tmp_path / "train.jsonl", train)),
            RankingSource(name="heldout", path=written(tmp_path / "heldout.jsonl", heldout), split="heldout"),
        ),
        dpo=DPOConfig(),
        row_length=192,
        batch_rows=8,
        batch_pairs=64,
        # Adam would blow the rounding of a gradient that is almost 0 up to whole steps.
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3),
        schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=8),
    )


def other(config: PreferenceConfig, **fields: Any) -> PreferenceConfig:
    return dataclasses.replace(config, **fields)


class Bench:
    """Steps on the config's batches, on a mesh; `state` is where it is."""

    def __init__(self, config: PreferenceConfig, mesh: MeshConfig | None = None):
        self.config = config = other(config, steps=10)
        Path(config.workdir).mkdir(exist_ok=True)
        self.mesh = make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
        self.model = preference.open_model(config)
        self.encoder = Encoder(chat.load("chatml", self.model.tokenizer()), (config.criterion,), config.annotators)
        with jax.set_mesh(self.mesh):
            self.batches, self.heldout = preference.read_batches(config, self.mesh, self.model, self.encoder)
            self.program = preference.build(config, self.mesh)
            self.state = self.program.initialize()

    def step(self, number: int) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            batch = preference.placed(self.program, self.batches.batch(number), self.config.batch_rows)
            self.state, measured = self.program.step(self.state, batch)
            return values(measured)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), a, b)


MESHES = MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8), MeshConfig(data=1, fsdp=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        *((method, mesh) for method in ("dpo", "kto") for mesh in MESHES),
        *((method, MESHES[0]) for method in ("ipo", "orpo", "simpo")),
    ],
    ids=str,
)
def test_eight_devices_learn_what_one_learns(config, method, mesh):
    config = other(config, **METHODS[method])
    one, many = Bench(config), Bench(other(config, workdir=config.workdir + "-8", loss_chunk_tokens=192), mesh)
    for step in range(2):
        measured, also = one.step(step), many.step(step)
        for name, value in measured.items():
            if (step, name) != (0, "preference/accuracy"):  # its margins are 0, but for rounding
                assert also[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert_close(jax.device_get(one.state.params), jax.device_get(many.state.params))


@pytest.mark.parametrize(
    "method", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "ipo", "orpo", "simpo"))]
)
def test_accumulated_is_one_big_batch(config, method):
    """The same prompts in two pieces and in one: KTO's point is that of both pieces together."""
    config = other(config, **METHODS[method])
    pieces = Bench(other(config, accumulate=2))
    pieces.step(0)  # the policy leaves its reference
    whole = Bench(config)
    whole.state = jax.tree.map(jnp.copy, pieces.state)
    batch = pieces.batches.batch(1)
    # Piece a's rows and pairs lie at a, a + 2, …; in one piece, flat positions count all rows.
    S, R = config.row_length, config.batch_pairs
    moved = dict(batch)
    for name in ("better", "worse"):
        row, at = np.divmod(batch[name], S)
        moved[name] = ((row * 2 + np.arange(R) % 2) * S + at).astype(np.int32)
    with jax.set_mesh(pieces.mesh):
        put = lambda bench, arrays: preference.placed(bench.program, arrays, 8)
        a, measured = pieces.program.step(pieces.state, put(pieces, batch))
        b, also = whole.program.step(whole.state, put(whole, moved))
    measured, also = values(measured), values(also)
    for name, value in measured.items():
        assert also[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    if method == "kto":
        assert abs(measured["preference/kl"]) > 1e-3
    assert_close(jax.device_get(a.params), jax.device_get(b.params))


def sums_of(bench: Bench, params: Any, messages: list, contents: list[str]) -> list[tuple[float, int]]:
    """(log-probability, tokens) of each answer alone in a row, without anything of this package."""
    template = bench.encoder.template
    definition = define_model(bench.model.config)
    found = []
    for content in contents:
        encoded = template.encode([*messages, {"role": "assistant", "content": content}])
        prompt = len(template.prompt(messages))
        ids = np.zeros((1, 192), np.int32)
        ids[0, : len(encoded.ids)] = encoded.ids
        places = np.arange(192, dtype=np.int32)[None, :]
        segments = (places < len(encoded.ids)).astype(np.int32)
        scores = token_scores(definition, params, *map(jnp.asarray, (ids, segments, places * segments)))
        # The answer and its stop token; ChatML's newline behind that is no part of it.
        found.append((float(scores.logprobs[0, prompt : len(encoded.ids) - 1].sum()), len(encoded.ids) - 1 - prompt))
    return found


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_prompt_counts_as_one_by_the_mean_of_its_pairs(config, tmp_path, method):
    """Packed, K-wise, with weights of annotators, ties and answers that train not: the loss as written out by hand."""
    draw = random.Random(3)
    three = record(1, draw) | {"completions": [{"id": id, "content": id * 3} for id in "abcd"]}
    annotation = three["annotations"][0]
    three["annotations"] = [
        annotation | {"rankings": {"overall": [["b"], ["a", "c"]]}},  # d is not ranked
        annotation | {"id": "2", "annotator": "bea", "status": "approved", "rankings": {"overall": [["a"], ["b"]]}},
        annotation | {"id": "3", "status": "draft", "rankings": {"overall": [["d"], ["b"]]}},
    ]
    two = {"prompt": "say 2", "chosen": "good", "rejected": "worse"}
    tied = record(7, draw, tiers=[["a", "b"]])
    source = RankingSource(name="train", path=written(tmp_path / "few.jsonl", [three, two, tied]))
    weights = (AnnotatorWeight(name="bea", weight=3.0),)
    bench = Bench(other(config, sources=(source,), annotators=weights, **METHODS[method]))
    assert bench.batches.dropped == {"no_untied_pair": ["7"]}
    start = jax.tree.map(jnp.copy, bench.state.params)
    bench.step(0)
    now = jax.tree.map(jnp.copy, bench.state.params)
    measured = bench.step(1)

    def losses(messages: list, contents: list[str], pairs: dict[tuple[int, int], float]) -> float:
        policy, before = (sums_of(bench, params, messages, contents) for params in (now, start))
        ratio = [a - b for (a, _), (b, _) in zip(policy, before, strict=True)]
        mean = [total / tokens for total, tokens in policy]
        odds = [m - np.log1p(-np.exp(m)) for m in mean]
        total = 0.0
        for (better, worse), weight in pairs.items():
            if method == "dpo":
                total += weight * np.log1p(np.exp(-0.1 * (ratio[better] - ratio[worse])))
            else:
                total += weight * (-mean[better] + 2.0 * np.log1p(np.exp(-(odds[better] - odds[worse]))))
        return total

    # ann (1): b over a and c, half of 1/4 each; bea (3): a over b, 3/4.
    one = losses(three["messages"], ["aaa", "bbb", "ccc"], {(1, 0): 0.125, (1, 2): 0.125, (0, 1): 0.75})
    both = one + losses([{"role": "user", "content": "say 2"}], ["good", "worse"], {(0, 1): 1.0})
    assert measured["preference/loss"] == pytest.approx(both / 2, rel=1e-5)
    assert measured["train/skipped_steps"] == 0


def test_the_first_step_finds_the_reference(config):
    bench = Bench(config)
    measured = bench.step(0)
    assert measured["preference/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert measured["preference/margin"] == pytest.approx(0, abs=1e-5)
    assert bench.step(1)["preference/loss"] != pytest.approx(np.log(2), abs=1e-4)
    kto = Bench(other(config, workdir=config.workdir + "-kto", **METHODS["kto"]))
    measured = kto.step(0)
    assert measured["preference/loss"] == pytest.approx(0.5, abs=1e-6)
    assert measured["preference/kl"] == pytest.approx(0, abs=1e-5)


def test_running_sums_begin_anew_with_each_segment():
    values = jnp.array([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50]])
    first = jnp.array([[True, False, True, False, True], [True, False, False, False, False]])
    assert scoring.running_sums(values, first).tolist() == [[1, 3, 3, 7, 5], [10, 30, 60, 100, 150]]


def counted(monkeypatch) -> list[int]:
    """Grows by one whenever the reference is computed."""
    calls: list[int] = []
    computed = reference._computed

    @functools.wraps(computed)
    def count(batches, *rest):
        calls.append(len(batches.prompts))
        return computed(batches, *rest)

    monkeypatch.setattr(reference, "_computed", count)
    return calls


def test_the_reference_is_asked_once_and_its_cache_is_verified(config, monkeypatch, tmp_path):
    calls = counted(monkeypatch)
    config = other(config, reference_cache=str(tmp_path / "cache"))
    first = Bench(config)
    assert calls == [60, 12], "train and held out"
    again = Bench(other(config, seed=3, dpo=DPOConfig(beta=0.3), accumulate=1, batch_pairs=32))
    assert len(calls) == 2, "another run with the same rows reads them"
    np.testing.assert_array_equal(first.batches.reference.own, again.batches.reference.own)
    Bench(other(config, **METHODS["orpo"]))
    assert len(calls) == 2, "a method without reference asks for none"
    Bench(other(config, **METHODS["kto"]))
    assert len(calls) == 4, "answers to other prompts besides"
    Bench(other(config, row_length=200))
    assert len(calls) == 6, "other rows round otherwise"
    source = dataclasses.replace(
        config.sources[0],
        path=written(tmp_path / "less.jsonl", (tmp_path / "train.jsonl").read_text().splitlines()[1:]),
    )
    Bench(other(config, sources=(source, config.sources[1])))
    assert calls[6:] == [59], "other answers; the held-out ones are those that were"
    for path in (tmp_path / "cache").glob("*/logprobs.npy"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="logprobs.npy: its content differs from the manifest's sha256"):
        Bench(config)
    assert len(calls) == 7


@pytest.mark.slow
def test_a_run_stopped_and_gone_on_is_never_stopped(config, monkeypatch):
    calls = counted(monkeypatch)
    loop = dataclasses.replace(config.loop, checkpoint=CheckpointConfig(every_steps=3))
    config = other(config, loop=loop, steps=9)
    whole = other(config, workdir=config.workdir + "-whole")
    preference.main(whole)
    preference.main(other(config, loop=dataclasses.replace(loop, stop_at_step=4)))
    assert len(calls) == 4
    preference.main(config)
    assert len(calls) == 4, "not asked again"
    assert_same_run(config.workdir, whole.workdir, 9, kinds=("params/", "optimizer/", "step", "skipped"))
    reports = [(Path(c.workdir) / "report.json").read_bytes() for c in (config, whole)]
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_preferences_are_learnt(config, tmp_path, method):
    config = other(
        config, epochs=12, schedule=ScheduleConfig(kind="linear", peak=1e-2, warmup_steps=5), **METHODS[method]
    )
    preference.main(config)
    lines = lines_of(config.workdir)
    first, last = lines[0], [line for line in lines if "preference/loss" in line][-1]
    assert last["preference/loss"] < first["preference/loss"]
    assert last["preference/accuracy"] > 0.9, last
    evaluated = lines[-1]
    assert evaluated["eval/pair_accuracy"] > 0.8, evaluated
    assert evaluated["eval/margin"] == pytest.approx(
        evaluated["eval/chosen_reward"] - evaluated["eval/rejected_reward"], abs=1e-4
    )
    report = json.loads((Path(config.workdir) / "report.json").read_text())
    assert report["accuracy"]["share"] == evaluated["eval/pair_accuracy"]
    assert set(report["accuracy_by"]["ranked"]) <= {"2", "3", "4"}
    assert set(report["accuracy_by"]["kind"]) == {"poor"}
    made = model_directory.read(f"{config.workdir}/model")
    assert made.chat_template() is not None
    assert made.manifest.facts["row_length"] == 192


def test_what_cannot_be_is_refused(config, tmp_path):
    for message, fields in {
        "^dpo: give exactly one of dpo, kto, orpo, simpo; got none": dict(dpo=None),
        "^dpo: give exactly one of .* got dpo and simpo": dict(simpo=SimPOConfig()),
        "^model: is empty": dict(model=""),
        "^criterion: is empty": dict(criterion=""),
        "^accumulate: 3 pieces do not divide batch_rows 8": dict(accumulate=3),
        "^schedule.peak: is 0": dict(schedule=ScheduleConfig(warmup_steps=1)),
    }.items():
        with pytest.raises(ConfigError, match=message):
            other(config, **fields)
    for message, make in {
        "^beta: got 0.0": lambda: DPOConfig(beta=0.0),
        "^label_smoothing: got 0.5": lambda: DPOConfig(label_smoothing=0.5),
        "^label_smoothing: is for loss='sigmoid'": lambda: DPOConfig(loss="ipo", label_smoothing=0.1),
        "^undesirable_weight: got -1": lambda: KTOConfig(undesirable_weight=-1.0),
        "^weight: got 0": lambda: ORPOConfig(weight=0.0),
        "^margin: got -1": lambda: SimPOConfig(margin=-1.0),
    }.items():
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(ConfigError, match="^batch_rows: 8 rows do not divide among 3 parts"):
        preference.validate(config, 3)
    with pytest.raises(ConfigError, match="^loss_chunk_tokens: 7 does not divide"):
        preference.validate(other(config, loss_chunk_tokens=7), 1)
    draw = random.Random(0)

    def reading(*records: Any, **fields: Any) -> PreferenceConfig:
        source = RankingSource(name="train", path=written(tmp_path / "bad.jsonl", records))
        workdir = tmp_path / "refused"
        shutil.rmtree(workdir, ignore_errors=True)
        return other(config, sources=(source,), workdir=str(workdir), **fields)

    with pytest.raises(Refused, match="sources.train: 2 of 3 records are bad"):
        preference.main(reading(record(1, draw), "{}", "{}"))
    with pytest.raises(UserError, match="sources: no prompt is left with answers to compare: 1 no_untied_pair"):
        preference.main(reading(record(1, draw, status="draft")))
    with pytest.raises(UserError, match="1 answer_longer_than_a_row"):
        preference.main(reading(record(1, draw), row_length=16))
    with pytest.raises(UserError, match="sources: kto compares with answers to other prompts"):
        preference.main(reading(record(1, draw), **METHODS["kto"]))


def test_records_keep_what_the_stages_share(config):
    """Multi-turn prompts: earlier answers of the assistant are the prompt's, only the last one is scored."""
    directory = preference.open_model(config)
    encoder = Encoder(chat.load("chatml", directory.tokenizer()), ("overall",))
    Path(config.workdir).mkdir()
    one = read_records(config.workdir, config.sources, 0.0)["train"][1]
    assert [message["role"] for message in one.messages] == ["user", "assistant", "user"]
    prompt = encoder.prompt(one, lambda name: True, apart=False)
    for ids, targets, completion in zip(prompt.answers, prompt.targets, one.completions, strict=True):
        assert directory.tokenizer().decode([int(id) for id in ids[targets][:-1]]) == completion.content
        assert int(ids[targets][-1]) in encoder.template.stop_ids
        assert targets.tolist() == [False] * prompt.prefix + [True] * (len(ids) - prompt.prefix)


@pytest.mark.parametrize(
    ("method", "lies"),
    [("dpo", "nf4"), *(pytest.param(method, "compute", marks=pytest.mark.slow) for method in ("dpo", "kto"))],
)
def test_under_adapters_the_reference_is_the_base_itself(config, monkeypatch, method, lies):
    config = other(
        config,
        **METHODS[method],
        lora=LoRAConfig(rank=2, base=lies),
        steps=2,
        accumulate=2,
        mesh=MeshConfig(fsdp=4, data=1, tensor=2),
    )
    given = []
    asked, fed = preference.reference_logprobs, preference.with_base
    monkeypatch.setattr(preference, "reference_logprobs", lambda *a: (given.append(a[-1]()), asked(*a))[1])
    monkeypatch.setattr(
        preference, "with_base", lambda batches, base: (given.append(base["base"]), fed(batches, base))[1]
    )
    preference.main(config)
    for params in given[1:]:
        jax.tree.map(lambda a, b: a is b or pytest.fail("a second copy"), params, given[0])
    lines = [line for line in lines_of(config.workdir) if "preference/loss" in line]
    if method == "dpo":
        assert lines[0]["preference/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(lines[0]["preference/margin"]) < 1e-5
    assert lines[1]["preference/loss"] < lines[0]["preference/loss"]
    kept = arrays_of(config.workdir, 2)
    assert all("_lora_" in name for name in kept if name.startswith("params/"))
    assert (Path(config.workdir) / "adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_adapters_of_experts_learn_from_preferences(config, packed_rows, tmp_path, caplog):
    experts = ExpertsConfig(count=4, chosen=2, feed_forward=16)
    mixture = pretrained(packed_rows, tmp_path / "mixture", steps=2, experts=experts)
    targets = ("layers/experts/*",)
    config = dataclasses.replace(config, model=mixture, lora=LoRAConfig(rank=2, dora=True, base="nf4", targets=targets))
    preference.main(dataclasses.replace(config, steps=2))
    lines = [line for line in lines_of(config.workdir) if "preference/loss" in line]
    assert lines[0]["preference/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[1]["preference/loss"] < lines[0]["preference/loss"]
    assert UNSAID in caplog.text
    assert not (Path(config.workdir) / "adapter").exists()
    found = [model_directory.read(f"{folder}/model") for folder in (mixture, config.workdir)]
    old, new = (one.load_params(define_model(one.config))["stack"]["0"]["experts"] for one in found)
    stored = dequantised(*quantise(old["up"], "nf4"))
    assert np.abs(new["up"] - stored).max() > 1e-6
    np.testing.assert_array_equal(new["router"], old["router"])
