"""Mistakes that newcomers make: each ends with one message that names the field or file and what would be right."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxlm.__main__ import main
from jaxlm.base.errors import out_of_room

IMPORTS = """
from jaxlm.base.config import MeshConfig
from jaxlm.data.config import ChatSource, MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.feedback.config import VerifierConfig
from jaxlm.hub.config import ExportConfig
from jaxlm.model.config import ModelConfig
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.rl.config import CriterionWeight, GRPOConfig, KLConfig, PPOConfig, RLConfig
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
EVALUATE = "EvaluateConfig(model='model', rows='rows')"
SAMPLE = "SampleConfig(model='model', prompts=('a',))"
RUN = f"RunConfig(stages=({PREPARE.format(path='texts.jsonl')}, TokenizerConfig(documents='@prepare', kind='byte')))"

SHORT = ["--config.max_tokens=16", "--config.max_prompt_tokens=16"]


class Mistake(NamedTuple):
    stage: str
    config: str
    arguments: list[str]
    named: str
    """the field, flag or file that the message begins with"""
    wrong: str
    """what it says of what stands there"""
    mend: str
    """what it says would be right"""
    code: int = 2


MISTAKES = {
    "a stage that is none": Mistake(
        "pretrian", PRETRAIN, [], "no stage", "is called 'pretrian'", "did you mean 'pretrain'?"
    ),
    "a field that is none": Mistake(
        "pretrain", PRETRAIN, ["--config.stepz=5"], "stepz", "no such field", "did you mean 'steps'?"
    ),
    "a field below one that is none": Mistake(
        "pretrain", PRETRAIN, ["--config.model.layer=5"], "model.layer", "no such field", "did you mean 'layers'"
    ),
    "a field of documents for chats": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.sources.mine.text_field=x"],
        "sources.mine.text_field", "no such field", "known here: format, general, heldout_share",
    ),
    "a field without a value": Mistake(
        "pretrain", PRETRAIN, ["--config.steps"], "--config.steps", "has no value", "write --config.steps=VALUE"
    ),
    "a word for a number": Mistake(
        "pretrain", PRETRAIN, ["--config.steps=many"], "steps", "got 'many'", "a whole number is needed"
    ),
    "a fraction for a whole number": Mistake(
        "pretrain", PRETRAIN, ["--config.steps=1.5"], "steps", "got '1.5'", "a whole number is needed"
    ),
    "a kind that is none": Mistake(
        "pretrain", PRETRAIN, ["--config.schedule.kind=cosin"], "schedule.kind", "got 'cosin'",
        "one of cosine, wsd, linear is needed",
    ),
    "a word for yes": Mistake(
        "pretrain", PRETRAIN, ["--config.model.qk_norm=yeah"], "model.qk_norm", "got 'yeah'", "true or false is needed"
    ),
    "an item that is none": Mistake(
        "prepare", PREPARE.format(path="x"), ["--config.sources.test.path=x"], "sources.test", "no such item among 1",
        "known here: train",
    ),
    "a flag that is none": Mistake(
        "pretrain", PRETRAIN, ["--confg=x"], "Unknown command line flag 'confg'", "", "Did you mean: config"
    ),
    "a loose word": Mistake(
        "pretrain", PRETRAIN, ["fast"], "'fast'", "is not understood", "--config, --workdir and --config.FIELD=VALUE"
    ),
    "a config of another stage": Mistake(
        "sft", PRETRAIN, [], "x.py", "is a config for 'pretrain', not for 'sft'", "python -m jaxlm pretrain takes it"
    ),
    "a config of a whole run": Mistake(
        "tokenizer", RUN, [], "x.py", "is a config for 'run', not for 'tokenizer'",
        "python -m jaxlm run takes it whole, with --config.only=tokenizer one stage of it",
    ),
    "a config of a run without the stage": Mistake(
        "sft", RUN, [], "x.py", "is a config for 'run', not for 'sft'", "python -m jaxlm run takes it whole"
    ),
    "a config with a typing error": Mistake(
        "pretrain", "PretrainConfig(data=()", [], "x.py:16", "'(' was never closed", ""
    ),
    "a config that is no config": Mistake(
        "pretrain", "{}", [], "x.py", "get_config() returned dict", "return a stage's config, such as PretrainConfig"
    ),
    "a wrong keyword in a config": Mistake(
        "pretrain", "PretrainConfig(stepz=3)", [], "x.py:16: stepz", "no such field of PretrainConfig",
        "did you mean 'steps'?",
    ),
    "a wrong type in a config": Mistake(
        "pretrain", PRETRAIN.replace("steps=2", "steps='2'"), [], "x.py:16: steps", "got '2' (str)", "int is needed"
    ),
    "a path that is none": Mistake(
        "prepare", PREPARE.format(path="gone/*.txt"), [], "sources.train.path", "no file matches gone/*.txt",
        "seen from /",
    ),
    "an empty file": Mistake(
        "sft", SFT.format(path="empty.jsonl"), [], "sources.mine", "holds no record at all", ""
    ),
    "chats for documents": Mistake(
        "prepare", PREPARE.format(path="chats.jsonl"), [], "sources.train", "20 of 20 records are bad (no_text_field",
        "chats.jsonl:1: no_text_field: has messages, but no text; set text_field", 3,
    ),
    "documents for chats": Mistake(
        "sft", SFT.format(path="texts.jsonl"), [], "sources.mine", "2 of 2 records are bad",
        "has text; messages, or prompt with completion, are needed", 3,
    ),
    "documents for rankings": Mistake(
        "reward", REWARD.format(path="texts.jsonl"), [], "sources.mine", "2 of 2 records are bad (missing_field 2)",
        "texts.jsonl:1: missing_field: completions: is missing", 3,
    ),
    "a line that is no JSON": Mistake(
        "sft", SFT.format(path="broken.jsonl"), [], "sources.mine", "1 of 1 records are bad (malformed_json 1)",
        "broken.jsonl:1: malformed_json: Expecting value", 3,
    ),
    "chats in another format": Mistake(
        "sft", SFT.format(path="roles.jsonl"), [], "sources.mine", "1 of 1 records are bad",
        "has conversations; messages, or prompt with completion, are needed", 3,
    ),
    "a rank for an answer that is not there": Mistake(
        "reward", REWARD.format(path="strangers.jsonl"), [], "sources.mine", "(unknown_completion 1)",
        "rankings.overall: names 'z', which is no completion here", 3,
    ),
    "rankings that only tie": Mistake(
        "reward", REWARD.format(path="ties.jsonl"), [], "sources", "no prompt is left with answers to compare",
        "1 no_untied_pair",
    ),
    "an annotator who ranks nothing": Mistake(
        "reward", REWARD.format(path="rankings.jsonl"), ["--config.heldout_annotators=anne"], "heldout_annotators",
        "no record is by 'anne'", "did you mean 'ann'?",
    ),
    "a criterion that nobody ranks by": Mistake(
        "reward", REWARD.format(path="rankings.jsonl"), ["--config.criteria=overal"], "criteria",
        "no record ranks by 'overal'", "did you mean 'overall'?",
    ),
    "a model that is not there": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.model=gone"], "model", "gone: no such folder",
        "a model directory or a run's folder is needed",
    ),
    "a model that is not finished": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.model=begun"], "model", "begun: holds no finished model",
        "found config.json",
    ),
    "rows for a model": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.model=rows"], "model", "rows: holds no finished model",
        "found heldout, manifest.json",
    ),
    "a text for rows": Mistake(
        "pretrain", PRETRAIN, ["--config.data.0.path=texts.jsonl"], "data.0.path", "texts.jsonl: is not finished",
        "python -m jaxlm pack makes it",
    ),
    "a vocabulary too small": Mistake(
        "pretrain", PRETRAIN, ["--config.model.vocab_size=64"], "model.vocab_size", "64 is below the tokenizer's 275",
        "0 takes them",
    ),
    "heads that do not divide": Mistake(
        "pretrain", PRETRAIN, ["--config.model.heads=3"], "model.heads", "3 does not divide 32", "set head_size"
    ),
    "a batch too small for the mesh": Mistake(
        "pretrain", PRETRAIN, ["--config.batch_rows=4"], "batch_rows", "4 rows do not divide among 8 parts",
        "a multiple of 8 is needed",
    ),
    "pieces that do not divide": Mistake(
        "pretrain", PRETRAIN, ["--config.accumulate=3"], "accumulate", "3 pieces do not divide", "a batch of 16 rows"
    ),
    "a mesh that does not divide": Mistake(
        "pretrain", PRETRAIN, ["--config.mesh.tensor=3"], "mesh", "tensor=3 does not divide 8 devices",
        "all sizes together must make them up",
    ),
    "no reward at all": Mistake(
        "rl", RL, ["--config.verifiers="], "reward_model", "is empty, and there is no verifier either",
        "give one of the two",
    ),
    "criteria of no reward model": Mistake(
        "rl", RL.replace("samples=2", "samples=2, criteria=(CriterionWeight(name='kind'),)"), [],
        "x.py:16: criteria", "weighs what a reward model says", "give reward_model too",
    ),
    "two methods at once": Mistake(
        "rl", RL.replace("grpo=", "ppo=PPOConfig(), grpo="), [], "x.py:16: ppo", "got ppo and grpo",
        "give exactly one of ppo",
    ),
    "a group of one": Mistake(
        "rl", RL, ["--config.samples=1", "--config.prompts=16"], "samples", "got 1", "a group needs at least 2 answers"
    ),
    "a minibatch that does not divide": Mistake(
        "rl", RL, ["--config.minibatch_answers=5"], "minibatch_answers", "5 does not divide a rollout of 16 answers",
        "(prompts x samples)",
    ),
    "a language model for a reward model": Mistake(
        "rl", RL, ["--config.reward_model=model", *SHORT], "reward_model", "is a language model",
        "the stage reward makes one",
    ),
    "a temperature below 0": Mistake(
        "sample", SAMPLE, ["--config.sampling.temperature=-1"], "sampling.temperature", "got -1", "0 or more is needed"
    ),
    "nothing to say": Mistake(
        "sample", "SampleConfig(model='model')", [], "x.py:16: prompts", "", "give either prompts or a prompts_file"
    ),
    "a chat template that is not there": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.chat_template=mine.jinja"], "chat_template",
        "got 'mine.jinja', no file and no template", "known here: chatml, llama2",
    ),
    "a template that hides what is said": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.chat_template=bad.jinja"], "sources.mine",
        "(refused_by_the_chat_template 20)", "chats.jsonl:1: refused_by_the_chat_template: ", 3,
    ),
    "rows shorter than every chat": Mistake(
        "sft", SFT.format(path="chats.jsonl"), ["--config.row_length=8"], "sources", "(answer_beyond_the_row 20;",
        "row_length is 8",
    ),
    "a stage that comes later": Mistake(
        "run", RUN.replace("@prepare", "@later"), [], "stages.tokenizer.documents", "'@later' names no earlier stage",
        "earlier ones: prepare",
    ),
    "a stage that is not in the file": Mistake(
        "run", RUN, ["--config.only=sft"], "only", "no stage is called 'sft'", "the stages are prepare, tokenizer"
    ),
    "a workdir in a bucket": Mistake(
        "pretrain", PRETRAIN, ["--workdir=gs://b/x"], "--workdir", "gs://b/x is no folder", "mount the bucket"
    ),
    "a workdir that is a file": Mistake(
        "pretrain", PRETRAIN, ["--workdir=texts.jsonl/x"], "texts.jsonl/x", "cannot be written", "Not a directory"
    ),
    "a task that is not there": Mistake(
        "evaluate", EVALUATE, ["--config.tasks=gone.json"], "tasks", "no such file or folder: gone.json",
        "truthful comes with jaxlm",
    ),
    "a task whose data is not there": Mistake(
        "evaluate", EVALUATE, ["--config.tasks=task.json"], "task.json", "no such file or folder: gone.jsonl",
        "data names it",
    ),
    "a threshold that is no number": Mistake(
        "evaluate", EVALUATE, ["--config.gate=gate.json"], "gate.json", "thresholds.0.least: got nan",
        "a finite number is needed",
    ),
    "an export without a verdict": Mistake(
        "export", "ExportConfig(model='model', output='out')", [], "model", "has no verdict of the gate",
        "evaluate it with a gate (default, or a file of thresholds), or export it with --without_verdict=true", 3,
    ),
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
    (root / "task.json").write_text('{"prompt": "{{ q }}", "data": "gone.jsonl", "metric": "exact"}')
    (root / "gate.json").write_text('{"thresholds": [{"name": "a", "figure": "heldout.loss", "least": NaN}]}')
    (root / "rows").symlink_to(packed_rows)
    (root / "begun").mkdir()
    (root / "begun/config.json").write_text("{}")
    pretrained(packed_rows, root / "model", steps=2)
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(capsys, folder, tmp_path, monkeypatch, name):
    made = MISTAKES[name]
    monkeypatch.chdir(folder)
    path = tmp_path / "x.py"
    path.write_text(IMPORTS + made.config + "\n")
    given = [] if any(a.startswith("--workdir") for a in made.arguments) else [f"--workdir={tmp_path}/w"]
    found = main([made.stage, f"--config={path}", *given, *made.arguments])
    said = capsys.readouterr().err
    (told,) = [line for line in said.splitlines() if line.startswith("jaxlm: ")]
    told = told.removeprefix("jaxlm: ").removeprefix(f"{tmp_path}/")
    assert told.startswith(made.named), told
    assert made.wrong in told, told
    assert made.mend in told, told
    assert "Traceback" not in said
    assert found == made.code


def test_there_are_forty():
    assert len(MISTAKES) >= 40
    assert all(made.wrong or made.mend for made in MISTAKES.values())
    assert sum(not made.mend for made in MISTAKES.values()) <= 2, "a syntax error and an empty file mend themselves"


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
