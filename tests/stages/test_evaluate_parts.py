"""The stage evaluate on small random models: every part of it, what it writes, which reward model is no evidence."""

import json
from pathlib import Path

import jax
import pytest
from stage_runs import written

from jaxlm.__main__ import config_class
from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, Refused, UserError
from jaxlm.data.config import ChatSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig, MemorisationConfig, RatingsConfig, WinRateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.report import page
from jaxlm.reward.config import RankingSource
from jaxlm.sample.config import SamplingConfig
from jaxlm.stages import evaluate, pack, prepare
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.train import model_directory

SHAPE = dict(vocab_size=288, layers=1, width=16, heads=2, feed_forward=32, compute="float32")


def model(folder: Path, tokenizer: str, *, seed: int = 0, inputs=None, stage: str = "sft", **shape) -> str:
    """A random model that speaks ChatML, of a made-up stage."""
    config = ModelConfig(**SHAPE | shape).complete()
    params = jax.jit(lambda: initialize(define_model(config), seed))()
    template = chat.load("chatml", tokenizers.load(tokenizer))
    made_with = dict(inputs=inputs or {}, config={"stage": stage, "seed": seed}, facts={"row_length": 64})
    model_directory.write(folder, params, config, tokenizer, chat_template=template, **made_with)
    return str(folder)


@pytest.fixture(scope="module")
def folders(packed_rows, tmp_path_factory) -> dict[str, str]:
    root, tokenizer = tmp_path_factory.mktemp("models"), f"{packed_rows}/tokenizer"
    reward = model(root / "reward" / "model", tokenizer, seed=1, stage="reward", criteria=("overall",))
    start = model(root / "sft" / "model", tokenizer, seed=2)
    made_from = {path: manifest.read(path).hash for path in (start, reward)}
    return {
        "root": str(root),
        "tokenizer": tokenizer,
        "reward": reward,
        "other": model(root / "other" / "model", tokenizer, seed=3, stage="reward", criteria=("overall",)),
        "start": start,
        "policy": model(root / "rl" / "model", tokenizer, seed=4, stage="rl", inputs=made_from),
    }


def config_of(folders, packed_rows, tmp_path, **fields) -> EvaluateConfig:
    questions = [{"prompt": f"{n}?", "completion": "yes", "language": "en" if n % 2 else "ru"} for n in range(6)]
    tasks = tmp_path / "tasks"
    tasks.mkdir(exist_ok=True)
    written(tasks / "sums.jsonl", [{"q": f"{n}+1", "target": n + 1} for n in range(4)])
    (tasks / "sums.json").write_text(
        '{"prompt": "{{ q }}=", "data": "sums.jsonl", "metric": "number", "max_tokens": 5, "chat": true}'
    )
    requests = [{"request": f"{n}?", "kind": kind} for n in range(3) for kind in ("harmful", "harmless")]
    rankings = [
        {
            "prompt_id": "1",
            "messages": [{"role": "user", "content": "?"}],
            "completions": [{"id": "a", "content": "a", "policy": "rl"}, {"id": "b", "content": "b", "policy": "sft"}],
            "annotations": [
                {"id": "1", "annotator": "ann", "role": "trainer", "status": "submitted",
                 "rankings": {"overall": [["a"], ["b"]]}},
            ],
        }
    ]  # fmt: skip
    source = ChatSource(name="asked", path=written(tmp_path / "chats.jsonl", questions))
    values = dict(
        model=folders["policy"],
        rows=packed_rows,
        documents=str(Path(packed_rows).parent / "prepare"),
        chats=(source,),
        answers=4,
        tasks=(str(tasks), "truthful"),
        safety=written(tmp_path / "requests.jsonl", requests),
        memorisation=MemorisationConfig(rows=packed_rows, examples=5, prompt_tokens=8, tokens=4),
        win_rate=WinRateConfig(against=folders["start"], reward_model=folders["other"], prompts=(source,), limit=3),
        ratings=RatingsConfig(
            sources=(RankingSource(name="ranked", path=written(tmp_path / "rankings.jsonl", rankings)),), policy="rl"
        ),
        sampling=SamplingConfig(temperature=0.0, max_tokens=8),
        # Truthful's questions are longer than 64 bytes.
        row_length=256,
        workdir=str(tmp_path / "evaluate"),
    )
    return EvaluateConfig(**values | fields)


def test_every_part_writes_its_figures_and_examples(folders, packed_rows, tmp_path):
    config = config_of(folders, packed_rows, tmp_path)
    summary = evaluate.main(config)
    folder = Path(config.workdir)
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == [
        "heldout", "chats", "tasks", "safety", "memorisation", "win_rate", "ratings", "toxicity",
    ]  # fmt: skip
    assert results["tasks"]["sums"]["n"] == 4
    assert results["tasks"]["truthful"]["accuracy"]["n"] == 40
    assert set(results["tasks"]["truthful"]["by_language"]) == {"en", "ru"}
    assert results["chats"]["asked"]["by_language"]["ru"]["documents"] == 3
    assert results["safety"]["refusal"] == {"value": 0, "interval": [0, pytest.approx(0.5615, abs=1e-3)], "n": 3}
    assert results["memorisation"]["train"]["n"] == 5
    assert results["win_rate"]["n"] == 3
    assert "no_evidence" not in results["win_rate"]
    assert (results["ratings"]["value"], results["ratings"]["annotators"]) == (1, {"ann": 1})
    # chats 4, sums 4, safety 6, win_rate 3
    assert results["toxicity"]["n"] == 17
    counts = {name: len((folder / "examples" / f"{name}.jsonl").read_text().splitlines()) for name in
              ("task-sums", "task-truthful", "safety", "memorisation", "win_rate")}  # fmt: skip
    assert counts == {"task-sums": 4, "task-truthful": 40, "safety": 6, "memorisation": 10, "win_rate": 3}
    assert "tasks.truthful.accuracy" in page.write(folder, config_class).read_text()

    made = manifest.read(folder, "evaluation")
    manifest.verify(folder, made)
    assert made.inputs == evaluate.inputs(config)
    assert {"examples/safety.jsonl", "answers-asked.jsonl"} <= made.files.keys()
    assert made.facts["summary"] == summary
    assert "gate" not in manifest.read(folders["policy"]).facts


def test_chats_longer_than_a_row_are_counted(folders, packed_rows, tmp_path, caplog):
    only = dict(rows="", documents="", tasks=(), safety="", memorisation=None, ratings=None, win_rate=None)
    config = config_of(folders, packed_rows, tmp_path, **only, answers=0, row_length=64)
    written(tmp_path / "chats.jsonl", [{"prompt": "?", "completion": "yes" * n} for n in (1, 2, 30, 40)])
    evaluate.main(config)
    found = json.loads((Path(config.workdir) / "results.json").read_text())["chats"]["asked"]
    assert (found["documents"], found["cut"]) == (4, 2)
    assert "chats: 2 of asked are longer than 64 tokens and were measured up to there; raise row_length" in caplog.text


def test_the_reward_model_that_rl_optimised_is_no_evidence(folders, packed_rows, tmp_path):
    only = dict(rows="", documents="", chats=(), tasks=(), safety="", memorisation=None, ratings=None)
    config = config_of(folders, packed_rows, tmp_path)
    same = WinRateConfig(against=folders["start"], reward_model=folders["reward"], prompts=config.chats)
    (tmp_path / "gate.json").write_text(
        json.dumps({"thresholds": [{"name": "preferred", "figure": "win_rate", "least": 0.0}]})
    )
    config = config_of(folders, packed_rows, tmp_path, **only, win_rate=same, gate=str(tmp_path / "gate.json"))
    with pytest.raises(Refused, match="preferred: win_rate: .* is the very reward model that the model was optimised"):
        evaluate.main(config)
    assert not (tmp_path / "evaluate" / "manifest.json").exists()
    found = manifest.read(folders["policy"]).facts["gate"]
    assert found == json.loads((tmp_path / "evaluate" / "gate.json").read_text())
    assert (found["passed"], found["checks"][0]["value"]) == (False, None)
    assert "preferred" in page.write(tmp_path / "evaluate", config_class).read_text()
    model_directory.read(folders["policy"])  # its files and hashes are as they were


def test_bits_per_byte_by_source_and_language(folders, tmp_path):
    sources = [SourceConfig(name="train", path=str(tmp_path / "train.jsonl"))]
    written(tmp_path / "train.jsonl", [{"text": f"a document to train on, number {n}"} for n in range(9)])
    for language, text in (("en", "an English document"), ("ru", "русский документ, другие буквы")):
        path = written(tmp_path / f"{language}.jsonl", [{"text": f"{text} {n}", "source": language} for n in range(5)])
        sources.append(SourceConfig(name=f"{language} books", path=path, split="heldout", language=language))
    prepare.main(PrepareConfig(sources=tuple(sources), workdir=str(tmp_path / "prepare"), min_characters=5))
    packed = dict(documents=str(tmp_path / "prepare"), tokenizer=folders["tokenizer"], row_length=128)
    pack.main(PackConfig(**packed, workdir=str(tmp_path / "pack")))
    config = EvaluateConfig(
        model=folders["start"],
        rows=str(tmp_path / "pack"),
        documents=str(tmp_path / "prepare"),
        texts=(f"{tmp_path}/??.jsonl",),
        workdir=str(tmp_path / "evaluate"),
    )
    evaluate.main(config)
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    whole = results["heldout"]
    assert list(whole["by_source"]) == ["en books", "ru books"]
    assert list(whole["by_language"]) == ["en", "ru"]
    bits = lambda found: found["bits_per_byte"]["value"] * found["bytes"]
    for groups in (whole["by_source"], whole["by_language"]):
        assert [found["documents"] for found in groups.values()] == [5, 5]
        assert sum(map(bits, groups.values())) == pytest.approx(bits(whole))
    texts = results["texts"][f"{tmp_path}/??.jsonl"]
    assert [found["documents"] for found in texts["by_source"].values()] == [5, 5]


def test_what_does_not_fit_is_refused(folders, packed_rows, tmp_path):
    with pytest.raises(ConfigError, match="baseline: is the gate's"):
        EvaluateConfig(model="x", safety="shipped", baseline="y")
    with pytest.raises(ConfigError, match="rows: give a pack folder as rows, or texts, chats, tasks"):
        EvaluateConfig(model="x")
    with pytest.raises(ConfigError, match="ratings.policy|policy: is empty"):
        RatingsConfig(sources=(RankingSource(name="r", path="r.jsonl"),))
    config = config_of(folders, packed_rows, tmp_path, gate="default", baseline=str(tmp_path))
    with pytest.raises(UserError, match="baseline: .* holds no results.json"):
        evaluate.main(config)
    config = config_of(folders, packed_rows, tmp_path, safety=str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="safety: no such file"):
        evaluate.validate(config, 8)
    config = config_of(folders, packed_rows, tmp_path, memorisation=MemorisationConfig(rows=packed_rows, tokens=64))
    with pytest.raises(UserError, match="memorisation.prompt_tokens: no train segment has 96 tokens; lower it"):
        evaluate.main(config)
