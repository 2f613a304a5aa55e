"""sft, reward and preference, killed or in two processes: the same as never killed, and in one."""

import itertools
import random

import pytest
from stage_runs import Runner, assert_same_run, lines_of, pretrained, written

STEPS = 24
HEAD = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource
from jaxlm.preference.config import KTOConfig, PreferenceConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.stages.config import SFTConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

def get_config():
    common = dict(
        model=%(model)r,
        batch_rows=8,
        row_length=64,
        steps=%(steps)d,
        optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3, ema=0.9),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=-1),
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=8, checkpoint=CheckpointConfig(every_steps=4)),
    )
    train, heldout = %(train)r, %(heldout)r
"""
CONFIGS = {
    "sft": """
    sources = ChatSource(name="train", path=train), ChatSource(name="heldout", path=heldout, split="heldout")
    return SFTConfig(sources=sources, **common)
""",
    "reward": """
    sources = RankingSource(name="train", path=train), RankingSource(name="heldout", path=heldout, split="heldout")
    return RewardConfig(sources=sources, criteria=("overall", "short"), batch_pairs=64, **common)
""",
    "preference": """
    sources = RankingSource(name="train", path=train), RankingSource(name="heldout", path=heldout, split="heldout")
    return PreferenceConfig(sources=sources, kto=KTOConfig(), batch_pairs=64, **common)
""",
}
HEADLINE = {"sft": "train/loss", "reward": "reward/loss", "preference": "preference/loss"}


def chats(draw: random.Random, count: int) -> list[dict]:
    sounds = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "owl": "hoo", "pig": "oink"}
    asked = (draw.choice([*sounds]) for _ in range(count))
    return [{"prompt": f"{animal}?", "completion": sounds[animal]} for animal in asked]


def rankings(draw: random.Random, count: int) -> list[dict]:
    made = []
    for number in range(count):
        ids = "abcd"[: draw.randint(2, 4)]
        best_first = [[id] for id in ids]
        said = {"rankings": {"overall": best_first, "short": best_first[::-1]}, "status": "submitted"}
        answers = [{"id": id, "content": "a" * (len(ids) - place)} for place, id in enumerate(ids)]
        annotation = {"id": "1", "annotator": "ann", "role": "trainer"} | said
        prompt = {"role": "user", "content": f"say {draw.random():.3f}"}
        made.append(
            {"prompt_id": str(number), "messages": [prompt], "completions": answers, "annotations": [annotation]}
        )
    return made


@pytest.fixture(scope="module")
def model(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=4)


@pytest.fixture(scope="module", params=["sft", "reward", "preference"])
def runner(request, model, tmp_path_factory) -> Runner:
    root = tmp_path_factory.mktemp(request.param)
    records, draw = {"sft": chats}.get(request.param, rankings), random.Random(0)
    paths = {name: written(root / f"{name}.jsonl", records(draw, n)) for name, n in (("train", 120), ("heldout", 12))}
    if request.param != "sft":  # no prompt may be in both
        lines = (root / "heldout.jsonl").read_text().replace('"prompt_id": "', '"prompt_id": "h')
        (root / "heldout.jsonl").write_text(lines)
    return Runner(root, request.param, (HEAD + CONFIGS[request.param]) % ({"model": model, "steps": STEPS} | paths))


@pytest.fixture(scope="module")
def never_stopped(runner):
    workdir = runner.root / "whole"
    runner.run(workdir)
    trained = [line["step"] for line in lines_of(workdir) if HEADLINE[runner.stage] in line]
    assert trained == list(range(1, STEPS + 1))
    return workdir


@pytest.mark.slow
def test_killed_at_random_moments_is_the_same_as_never_killed(runner, never_stopped):
    workdir = runner.root / "killed"
    runner.kill(workdir, 4, seed=3, lines=(-3, 9))
    runner.run(workdir)
    assert_same_run(workdir, never_stopped, STEPS, kinds=("params/", "optimizer/", "ema/", "step", "skipped"))
    assert (workdir / "model/params").exists()
    files = (path.relative_to(workdir) for path in workdir.glob("model/params/*"))
    assert all((workdir / file).read_bytes() == (never_stopped / file).read_bytes() for file in files)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_write_once(runner, never_stopped):
    whole, stopped = runner.root / "two", runner.root / "two-stopped"
    runner.run(whole, processes=2)
    runner.run(stopped, "--config.loop.stop_at_step=10", processes=2)
    runner.run(stopped, processes=2)
    assert_same_run(stopped, whole, STEPS)
    wanted = {"train/loss", "reward/loss", "reward/accuracy", "preference/loss", "preference/kl", "train/gradient_norm"}
    shared = set(lines_of(whole)[0]) & wanted
    assert len(shared) >= 2
    # gloo and the in-process collectives add in different orders, which grows from step to step.
    for two, one in itertools.islice(zip(lines_of(whole), lines_of(never_stopped), strict=True), 8):
        for name in {*shared, "eval/loss", "eval/pair_accuracy", "eval/bits_per_byte"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), (name, one["step"])
