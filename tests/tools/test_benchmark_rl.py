"""The parts of an iteration are those of the stage's own, and what is made of their times."""

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console

from jaxlm.base.config import MeshConfig
from jaxlm.base.sharding import make_mesh
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.train.config import OptimizerConfig

TOOLS = Path(__file__).parent.parent.parent / "tools"
# Work enough that dispatching its pieces one by one is little beside it.
SHAPE = ModelConfig(
    vocab_size=512, layers=1, width=64, heads=2, qk_norm=True, scan_layers=False, compute="float32"
).complete()
PARTS = {
    "ppo": "weights for the sampler,prefill,decoding,old log-probabilities,reference's,values,reward model",
    "grpo": "weights for the sampler,prefill,decoding,old log-probabilities,reference's,verifiers",
}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("benchmark_rl")


@pytest.fixture
def small(tool):
    """Name → the demo's stage, with little to say."""
    shape, stages = tool.demo()
    assert (shape.vocab_size, [config.name for config in stages]) == (4096, ["ppo", "grpo"])
    sizes = {"ppo": dict(prompts=32, samples=1), "grpo": dict(prompts=4, samples=8)}
    short = dict(max_prompt_tokens=16, max_tokens=16, minibatch_answers=32)
    return {config.name: dataclasses.replace(config, **short, **sizes[config.name]) for config in stages}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def length(prompt: str, answer: str) -> float:
    return len(answer) / 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_parts_of_an_iteration(tool, small, tmp_path, name):
    config = tool.write_inputs(tmp_path, SHAPE, small[name], 16)
    if name == "grpo":
        # Random answers are never exactly right: with rewards all alike there would be nothing to learn.
        config = dataclasses.replace(
            config, verifiers=(VerifierConfig(kind="function", function=f"{__name__}:length"),)
        )
    # Adam would blow the rounding of a gradient that is almost 0 up to whole steps.
    config = dataclasses.replace(config, optimizer=OptimizerConfig(weight_decay=0.0, epsilon=1e-3), minibatch_answers=8)
    case = tool.Case(tool.of_size(config, 16), one_device())

    watch = tool.Stopwatch()
    whole = case.iterate(watch)
    pieces = case.pieces(watch, watch.given["program"][1])
    assert int(whole.policy.step) == int(pieces.policy.step) == 2
    first, one, other = (jax.tree.leaves(state.policy.params) for state in (case.first, whole, pieces))
    assert max(np.abs(a - b).max() for a, b in zip(one, first, strict=True)) > 1e-4, "something was learned"
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg="the pieces make what the iteration makes")

    rounds = [case.round() for _ in range(5)]
    for one in rounds:
        assert ",".join(one.parts) == f"{PARTS[name]},learning,host"
        assert min(one.parts.values()) > 0
        assert one.answers == 16
        assert 0 < one.tokens <= 16 * 16
    # What varies is the learner's program, timed in one piece inside of the iteration and in several after it.
    together = sorted(sum(one.parts.values()) / one.whole for one in rounds)
    assert 0.5 < together[2] < 1.5, together


def made_up(tool, size: int) -> list:
    """Of 8 answers an iteration takes 10.5, 11.5 and 11 s; with more of them, scoring and learning grow alone."""
    factor = size // 8
    parts = lambda off: {
        "prefill": 0.5,
        "decoding": 1.5,
        "old log-probabilities": 1.0 * factor,
        "verifiers": 0.5,
        "learning": factor * (6.0 + off),
        "host": 1.5,
    }
    return [tool.Round(sum(parts(off).values()), parts(off), size, 4 * size) for off in (-0.5, 0.5, 0)]


def test_the_table(tool, capsys):
    console = rich.console.Console(width=110, highlight=False)
    console.print(tool.table({size: made_up(tool, size) for size in (8, 32)}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    rows = {line[:24].strip(): line[24:].split() for line in lines if line.strip()}
    assert rows["rollout"] == ["2.000", "±", "0%", "18%", "2.000", "±", "0%", "6%", "0.25"]
    assert rows["decoding"] == ["1.500", "±", "0%", "14%", "1.500", "±", "0%", "5%", "0.25"]
    assert rows["scoring"] == ["1.500", "±", "0%", "14%", "4.500", "±", "0%", "14%", "0.75"]
    assert rows["learning"] == ["6.000", "±", "8%", "55%", "24.000", "±", "8%", "75%", "1.00"]
    assert rows["iteration"] == ["11.000", "±", "5%", "100%", "32.000", "±", "6%", "100%", "0.73"]
    assert rows["parts together"] == rows["iteration"]
    assert rows["answers/s"] == ["0.7", "1.0"]
    assert rows["answers' tokens/s"] == ["2.9", "4.0"]
    assert rows["decoding, tokens/s"] == ["16.0", "64.0"]
    assert not any("values" in line for line in lines), "a part that the method does not have"


def test_as_a_command(tool, small, monkeypatch, capsys):
    command = importlib.import_module("benchmark")
    monkeypatch.setattr(tool, "demo", lambda: (SHAPE, list(small.values())))
    monkeypatch.setattr(tool, "measure", lambda _, config, sizes, repeats, mesh: {n: made_up(tool, n) for n in sizes})
    monkeypatch.setattr(command, "product_rate", lambda dtype: 1.0)
    assert command.main(["rl", "--answers=32,8", "--repeats=1"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("ppo: 0.1 M parameters") < shown.index("grpo: 0.1 M parameters")
    assert shown.index(" 8 answers") < shown.index(" 32 answers")
    for given, problem in {
        "--answers=12": "--answers: 12 are no multiple of grpo's 8 a prompt",
        "--answers=40": "minibatch_answers: 32 does not divide a rollout of 40 answers (prompts x samples)",
        "--repeats=0": "--repeats: got 0; 1 or more is needed",
        "--stage=pop": "--stage: the demo has no 'pop'; did you mean 'ppo'?",
    }.items():
        assert command.main(["rl", given]) == 2
        assert capsys.readouterr().err == f"benchmark: {problem}\n"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ([], ("all", "")),
        (["train"], ("train", "")),
        (["decode", "--peer=x"], ("decode", "x")),
        (["--peer=x"], ("all", "x")),
        (["--peer=x", "train"], ("train", "x")),
    ],
)
def test_the_other_commands(tool, monkeypatch, given, asked):
    command = importlib.import_module("benchmark")
    calls = []
    monkeypatch.setattr(command, "ratios", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(command, "product_rate", lambda dtype: 1.0)
    assert command.main(given) == 0
    assert calls == [asked]
