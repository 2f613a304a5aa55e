"""Mistakes that newcomers make: each ends with one message that names the field or file and what would be right."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.__main__ import main
from jaxlm.base.errors import out_of_room

IMPORTS = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource, MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.feedback.config import VerifierConfig
from jaxlm.model.config import ModelConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.rl.config import GRPOConfig, KLConfig, PPOConfig, RLConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig, SFTConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig

def get_config():
    return """

CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
RANKING = {
    "prompt_id": "1",
    "messages": CHAT["messages"][:1],
    "completions": [{"id": "a", "content": "x"}, {"id": "b", "content": "y"}],
    "annotations": [
        {
            "id": "1",
            "annotator": "ann",
            "role": "trainer",
            "status": "submitted",
            "rankings": {"overall": [["a"], ["b"]]},
        }
    ],
}
FILES = {
    "texts.jsonl": [{"text": "one two three " * 20}, {"text": "four five six " * 20}],
    "chats.jsonl": [CHAT] * 20,
    "prompts.jsonl": [{"prompt": f"{n}?", "target": "1"} for n in range(20)],
    "rankings.jsonl": [RANKING | {"prompt_id": str(n)} for n in range(20)],
    "ties.jsonl": [RANKING | {"annotations": [RANKING["annotations"][0] | {"rankings": {"overall": [["a", "b"]]}}]}],
    "strangers.jsonl": [
        RANKING | {"annotations": [RANKING["annotations"][0] | {"rankings": {"overall": [["a"], ["z"]]}}]}
    ],
    "roles.jsonl": [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}],
    "empty.jsonl": [],
}

PREPARE = "PrepareConfig(sources=(SourceConfig(name='train', path={path!r}),))"
PRETRAIN = "PretrainConfig(data=(MixtureSource(path='rows'),), model=ModelConfig(layers=1, width=32, heads=2), steps=2)"
SFT = "SFTConfig(model='model', sources=(ChatSource(name='mine', path={path!r}),), steps=2)"
REWARD = "RewardConfig(model='model', sources=(RankingSource(name='mine', path={path!r}),), steps=2)"
RL = (
    "RLConfig(model='model', sources=(ChatSource(name='mine', path='prompts.jsonl'),), "
    "verifiers=(VerifierConfig(kind='exact'),), grpo=GRPOConfig(), samples=2, prompts=8, minibatch_answers=16)"
)
SAMPLE = "SampleConfig(model='model', prompts=('a',))"
RUN = f"RunConfig(stages=({PREPARE.format(path='texts.jsonl')}, TokenizerConfig(documents='@prepare', kind='byte')))"

SHORT = ["--config.max_tokens=16", "--config.max_prompt_tokens=16"]

# Name: (stage, config, further arguments, what the message says; exit code 2 where none is given)
MISTAKES: dict[str, tuple] = {
    "a stage that is none": ("pretrian", PRETRAIN, [], "no stage is called 'pretrian'; did you mean 'pretrain'?"),
    "a field that is none": ("pretrain", PRETRAIN, ["--config.stepz=5"], "stepz: no such field; did you mean 'steps'"),
    "a field below one that is none": (
        "pretrain", PRETRAIN, ["--config.model.layer=5"], "model.layer: no such field; did you mean 'layers'"
    ),
    "a field without a value": ("pretrain", PRETRAIN, ["--config.steps"], "--config.steps: has no value"),
    "a word for a number": ("pretrain", PRETRAIN, ["--config.steps=many"], "steps: got 'many'"),
    "a fraction for a whole number": ("pretrain", PRETRAIN, ["--config.steps=1.5"], "steps: got '1.5'"),
    "a kind that is none": ("pretrain", PRETRAIN, ["--config.schedule.kind=cosin"], "schedule.kind: got 'cosin'"),
    "a word for yes": ("pretrain", PRETRAIN, ["--config.model.qk_norm=yeah"], "model.qk_norm: got 'yeah'"),
    "an item that is none": ("prepare", PREPARE.format(path="x"), ["--config.sources.test.path=x"], "sources.test"),
    "a flag that is none": ("pretrain", PRETRAIN, ["--confg=x"], "Unknown command line flag 'confg'"),
    "a loose word": ("pretrain", PRETRAIN, ["fast"], "'fast': is not understood"),
    "a config of another stage": ("sft", PRETRAIN, [], "is a config for 'pretrain', not for 'sft'"),
    "a config with a typing error": ("pretrain", "PretrainConfig(data=()", [], ".py:"),
    "a config that is no config": ("pretrain", "{}", [], "get_config() returned dict, not a config"),
    "a wrong keyword in a config": ("pretrain", "PretrainConfig(stepz=3)", [], "stepz"),
    "a wrong type in a config": ("pretrain", PRETRAIN.replace("steps=2", "steps='2'"), [], "x.py:"),
    "a path that is none": ("prepare", PREPARE.format(path="gone/*.txt"), [], "path: no file matches gone/*.txt"),
    "an empty file": ("sft", SFT.format(path="empty.jsonl"), [], "sources.mine: holds no record at all"),
    "chats for documents": ("prepare", PREPARE.format(path="chats.jsonl"), [], "text", 3),
    "documents for chats": ("sft", SFT.format(path="texts.jsonl"), [], "no_messages_and_no_prompt", 3),
    "documents for rankings": ("reward", REWARD.format(path="texts.jsonl"), [], "missing_field 2", 3),
    "a line that is no JSON": ("sft", SFT.format(path="broken.jsonl"), [], "malformed_json 1", 3),
    "chats in another format": ("sft", SFT.format(path="roles.jsonl"), [], "no_messages_and_no_prompt", 3),
    "a rank for an answer that is not there": ("reward", REWARD.format(path="strangers.jsonl"), [], "z", 3),
    "rankings that only tie": ("reward", REWARD.format(path="ties.jsonl"), [], "untied"),
    "a model that is not there": ("sft", SFT.format(path="chats.jsonl"), ["--config.model=gone"], "model: gone"),
    "a model that is not finished": ("sft", SFT.format(path="chats.jsonl"), ["--config.model=begun"], "begun"),
    "rows for a model": ("sft", SFT.format(path="chats.jsonl"), ["--config.model=rows"], "rows"),
    "a text for rows": ("pretrain", PRETRAIN, ["--config.data.0.path=texts.jsonl"], "texts.jsonl"),
    "a vocabulary too small": ("pretrain", PRETRAIN, ["--config.model.vocab_size=64"], "model.vocab_size"),
    "heads that do not divide": ("pretrain", PRETRAIN, ["--config.model.heads=3"], "heads"),
    "a batch too small for the mesh": ("pretrain", PRETRAIN, ["--config.batch_rows=4"], "batch_rows: 4 rows"),
    "pieces that do not divide": ("pretrain", PRETRAIN, ["--config.accumulate=3"], "3 pieces"),
    "a mesh that does not divide": ("pretrain", PRETRAIN, ["--config.mesh.tensor=3"], "mesh"),
    "no reward at all": ("rl", RL, ["--config.verifiers="], "reward_model: is empty, and there is no verifier"),
    "two methods at once": ("rl", RL.replace("grpo=", "ppo=PPOConfig(), grpo="), [], "exactly one of ppo"),
    "a group of one": ("rl", RL, ["--config.samples=1", "--config.prompts=16"], "samples: got 1; a group needs"),
    "a minibatch that does not divide": ("rl", RL, ["--config.minibatch_answers=5"], "minibatch_answers: 5 does not"),
    "a language model for a reward model": (
        "rl", RL, ["--config.reward_model=model", *SHORT], "is a language model; the stage reward makes one"
    ),
    "a temperature below 0": ("sample", SAMPLE, ["--config.sampling.temperature=-1"], "sampling.temperature: got -1"),
    "nothing to say": ("sample", "SampleConfig(model='model')", [], "prompts"),
    "a chat template that is not there": (
        "sft", SFT.format(path="chats.jsonl"), ["--config.chat_template=mine.jinja"], "mine.jinja"
    ),
    "a template that hides what is said": (
        "sft", SFT.format(path="chats.jsonl"), ["--config.chat_template=bad.jinja"], "refused_by_the_chat_template", 3
    ),
    "rows shorter than every chat": (
        "sft", SFT.format(path="chats.jsonl"), ["--config.row_length=8"], "answer_beyond_the_row 20"
    ),
    "a stage that comes later": ("run", RUN.replace("@prepare", "@later"), [], "'@later' names no earlier stage"),
    "a stage that is not in the file": ("run", RUN, ["--config.only=sft"], "only"),
    "a workdir in a bucket": ("pretrain", PRETRAIN, ["--workdir=gs://b/x"], "mount the bucket"),
    "a workdir that is a file": ("pretrain", PRETRAIN, ["--workdir=texts.jsonl/x"], "cannot be written"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, packed_rows) -> Path:
    """Rows, a model, and files of every kind."""
    from stages.stage_runs import pretrained

    root = tmp_path_factory.mktemp("newcomer")
    for name, records in FILES.items():
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "broken.jsonl").write_text('{"messages": [}\n')
    (root / "bad.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    (root / "rows").symlink_to(packed_rows)
    (root / "begun").mkdir()
    (root / "begun/config.json").write_text("{}")
    pretrained(packed_rows, root / "model", steps=2)
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(capsys, folder, tmp_path, monkeypatch, name):
    stage, config, arguments, message, *code = MISTAKES[name]
    monkeypatch.chdir(folder)
    path = tmp_path / "x.py"
    path.write_text(IMPORTS + config + "\n")
    given = [] if any(a.startswith("--workdir") for a in arguments) else [f"--workdir={tmp_path}/w"]
    found = main([stage, f"--config={path}", *given, *arguments])
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert found == (code[0] if code else 2)


def test_there_are_forty():
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: jax finds no device"),
        ({"JAX_NUM_PROCESSES": "2"}, "all three belong together"),
        (
            {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
            "batch_rows: 8 rows do not",
        ),
    ],
)
def test_a_wrong_surrounding_is_one_message(folder, tmp_path, variables, message):
    (tmp_path / "x.py").write_text(IMPORTS + PRETRAIN.replace("steps=2", "steps=2, batch_rows=8") + "\n")
    command = [sys.executable, "-m", "jaxlm", "pretrain", f"--config={tmp_path}/x.py", f"--workdir={tmp_path}/w"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: of the host; a smaller batch_rows"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes.\nmore"), "a smaller batch_rows"),
        (OSError(errno.ENOSPC, "No space left on device", "w/model"), "w/model: No space left on device; make room"),
        (ValueError("RESOURCE"), ""),
    ],
)  # fmt: skip
def test_what_to_do_when_there_is_no_room(capsys, monkeypatch, error, message):
    assert message in out_of_room(error)
    assert "\n" not in out_of_room(error)

    def fails(*_):
        raise error

    monkeypatch.setattr("jaxlm.__main__.run", fails)
    monkeypatch.setattr("jaxlm.__main__.make_config", lambda *_: None)
    assert main(["pretrain", "--config=x", "--workdir=y"]) == (2 if message else 1)
    assert ("Traceback" in capsys.readouterr().err) == (not message)
