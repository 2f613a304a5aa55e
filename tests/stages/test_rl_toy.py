"""Toy tasks that must be learned: the reward is the share of an answer's characters that are an "a"."""

import dataclasses
import json

import pytest
from stage_runs import lines_of, pretrained

from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.rl.config import GRPOConfig, KLConfig, OnlineDPOConfig, PPOConfig, ReinforceConfig, RLConfig
from jaxlm.stages import rl
from jaxlm.train.config import CheckpointConfig, LoopConfig, ScheduleConfig

MOST = 8


def share_of_a(prompt: str, answer: str) -> float:
    return min(answer.count("a") / MOST, 1.0)


@pytest.fixture(scope="module")
def base(packed_rows, tmp_path_factory) -> str:
    return pretrained(packed_rows, tmp_path_factory.mktemp("base"), steps=60)


@pytest.fixture
def config(base, tmp_path) -> RLConfig:
    words = "the a small large red blue cat dog bird sees hears follows finds house river tree".split()
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{word} "}) + "\n" for word in words))
    return RLConfig(
        workdir=str(tmp_path / "rl"),
        model=base,
        verifiers=(VerifierConfig(kind="function", function=f"{__name__}:share_of_a"),),
        sources=(
            ChatSource(name="train", path=str(path)),
            ChatSource(name="heldout", path=str(path), split="heldout"),
        ),
        ppo=PPOConfig(kl=KLConfig(coefficient=0.003), value_rate=3.0),
        prompts=64,
        max_prompt_tokens=12,
        max_tokens=MOST,
        steps=40,
        passes=2,
        minibatch_answers=32,
        schedule=ScheduleConfig(kind="linear", peak=3e-3, warmup_steps=2),
        # "aaaaaaaa" is so unlikely to the base model that any policy that says nothing else is 35 to 45 nats away.
        kl_budget=60.0,
        loop=LoopConfig(log_every_steps=1, evaluate_every_steps=20, checkpoint=CheckpointConfig(every_steps=10)),
    )


@pytest.mark.slow
def test_ppo_learns_within_the_kl_budget(config):
    rl.main(config)
    rolled = [line for line in lines_of(config.workdir) if "rl/reward" in line]
    assert rolled[0]["rl/reward"] < 0.3
    assert rolled[-1]["rl/reward"] > 0.9, [round(line["rl/reward"], 2) for line in rolled]
    assert rolled[-1]["rl/kl"] < config.kl_budget
    # The first update of a rollout finds the policy that drew it.
    assert all(abs(line["rl/first_old_kl"]) < 1e-6 for line in rolled)
    assert all(line["rl/sampler_difference"] < 1e-4 for line in rolled)
    assert rolled[0]["rl/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_grpo_learns_within_the_kl_budget(config):
    config = dataclasses.replace(
        config, ppo=None, grpo=GRPOConfig(kl_coefficient=0.003), prompts=8, samples=8, steps=40
    )
    rl.main(config)
    rolled = [line for line in lines_of(config.workdir) if "rl/reward" in line]
    assert rolled[-1]["rl/reward"] > 0.9, [round(line["rl/reward"], 2) for line in rolled]
    assert rolled[-1]["rl/kl"] < config.kl_budget


@pytest.mark.slow
def test_online_dpo_learns_within_the_kl_budget(config):
    config = dataclasses.replace(config, ppo=None, dpo=OnlineDPOConfig(beta=0.1), prompts=16, samples=8, steps=40)
    rl.main(config)
    rolled = [line for line in lines_of(config.workdir) if "rl/reward" in line]
    assert rolled[0]["rl/reward"] < 0.3
    assert rolled[-1]["rl/reward"] > 0.9, [round(line["rl/reward"], 2) for line in rolled]
    assert rolled[-1]["rl/kl"] < config.kl_budget
    # Where all groups are equal there is no pair left to be right about.
    assert rolled[-1]["rl/equal_groups"] > 0.5 or rolled[-1]["rl/pair_accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        # An answer's ratio is the mean over 8 tokens: a band a tenth as wide as GRPO's.
        GRPOConfig(ratio="sequence", clip=0.02, clip_high=0.03, kl_coefficient=0.003),
        ReinforceConfig(kl=KLConfig(coefficient=0.003)),
        ReinforceConfig(kl=KLConfig(coefficient=0.003), baseline="group"),
        GRPOConfig(clip_high=0.28, normalization="token", kl_coefficient=0.0, extra_prompts=4),
    ],
    ids=["gspo", "reinforce++", "reinforce++ with baseline", "dapo"],
)
def test_the_variants_learn_within_the_kl_budget(config, method):
    given = {"reinforce": method} if isinstance(method, ReinforceConfig) else {"grpo": method}
    rl.main(dataclasses.replace(config, ppo=None, **given, prompts=8, samples=8))
    rolled = [line for line in lines_of(config.workdir) if "rl/reward" in line]
    assert rolled[0]["rl/reward"] < 0.3
    assert rolled[-1]["rl/reward"] > 0.85, [round(line["rl/reward"], 2) for line in rolled]
    assert rolled[-1]["rl/kl"] < config.kl_budget
    assert all(abs(line["rl/first_old_kl"]) < 1e-6 for line in rolled)
