"""The whole way through one config, on Russian sentences: what is done again and what is not, and after a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

import jaxlm
from jaxlm.__main__ import main
from jaxlm.base.errors import UserError
from jaxlm.text.documents import read as read_documents

CONFIG = """
from jaxlm.data.config import MixtureSource, PackConfig
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.model.config import ModelConfig
from jaxlm.sample.config import SampleConfig, SamplingConfig
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.tokenizer.config import TokenizerConfig
from jaxlm.train.config import CheckpointConfig, LoopConfig, ScheduleConfig

def get_config():
    sources = (
        SourceConfig(name="train", path="FOLDER/train.jsonl"),
        SourceConfig(name="heldout", path="FOLDER/heldout.jsonl", split="heldout"),
    )
    return RunConfig(
        stages=(
            PrepareConfig(sources=sources, min_characters=20),
            TokenizerConfig(documents="@prepare", vocab_size=600),
            PackConfig(documents="@prepare", tokenizer="@tokenizer", row_length=64),
            PretrainConfig(
                data=(MixtureSource(path="@pack"),),
                model=ModelConfig(layers=2, width=32, heads=2, compute="float32"),
                batch_rows=8,
                steps=30,
                schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
                loop=LoopConfig(log_every_steps=1, checkpoint=CheckpointConfig(every_steps=5)),
            ),
            SampleConfig(model="@pretrain", prompts=("Старый рыбак",), sampling=SamplingConfig(max_tokens=8)),
            EvaluateConfig(model="@pretrain", rows="@pack", documents="@prepare"),
        )
    )
"""
STAGES = ["prepare", "tokenizer", "pack", "pretrain", "sample", "evaluate"]
WHO = ["Старый рыбак", "Моя бабушка", "Ёжик в тумане", "Никакой учитель", "Рыжий котёнок"]
DOES = ["находит", "рисует", "поёт про", "покупает", "забывает", "чинит", "помнит"]
WHAT = ["синий чайник", "жёлтый трамвай", "новый словарь", "твой зонт", "большой секрет"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    for split, count in (("train", 500), ("heldout", 30)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for number in range(count):
                # Half of them spell й and ё with combining marks: NFC brings them together.
                sentences = (f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}." for _ in range(4))
                text = unicodedata.normalize("NFD" if number % 2 else "NFC", " ".join(sentences) + f" №{number}")
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    path = folder / "config.py"
    path.write_text(CONFIG.replace("FOLDER", str(folder)))
    return path


def run(config: Path, workdir: Path, *arguments: str) -> int:
    return main(["run", f"--config={config}", f"--workdir={workdir}", *arguments])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert run(config, workdir) == 0
    return workdir


def created(workdir: Path) -> dict[str, str]:
    found = (json.loads((workdir / name / "manifest.json").read_text()) for name in STAGES)
    return {name: manifest["created"] + manifest["hash"] for name, manifest in zip(STAGES, found, strict=True)}


def test_all_stages_ran_and_the_table_and_the_completion_are_shown(config, whole, capsys):
    assert run(config, whole) == 0
    err = capsys.readouterr().err
    assert [line.split()[0] for line in err.splitlines() if line.strip().startswith(tuple(STAGES))][-6:] == STAGES
    assert "bits a byte" in err
    completion = json.loads((whole / "sample/completions.jsonl").read_text().splitlines()[0])
    assert completion["prompt"] + completion["text"].splitlines()[0] in err


def test_russian_is_learned_and_comes_back(whole):
    lm = jaxlm.load(whole)
    # Words with й and ё; a sign that the tokenizer never saw, spelled in bytes.
    for text in ("Рыжий котёнок поёт", "∮"):
        assert lm.tokenizer.decode(lm.tokenizer.encode(text)) == text
    documents = list(read_documents(whole / "prepare", "train"))
    assert all(unicodedata.is_normalized("NFC", document.text) for document in documents)
    known, unknown = lm.score(["Моя бабушка чинит синий чайник.", "Пью водой лампы весьма бегом кубик."])
    assert known.bits_per_byte < unknown.bits_per_byte


def test_nothing_unchanged_is_done_again(config, whole, capsys):
    before = created(whole)
    assert run(config, whole) == 0
    assert created(whole) == before
    assert capsys.readouterr().err.count("done before, unchanged") == len(STAGES)


def test_a_changed_stage_and_those_after_it_are_done_again_and_the_old_results_stay(config, whole, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    before = created(copy)
    # The copy lies elsewhere, the paths are others, the content is the same: nothing is done again.
    assert run(config, copy) == 0
    assert created(copy) == before
    assert run(config, copy, "--config.stages.pretrain.steps=12") == 0
    after = created(copy)
    assert {name for name in STAGES if after[name] != before[name]} == {"pretrain", "sample", "evaluate"}
    assert (copy / "pretrain.outdated-1/model/config.json").exists()
    err = capsys.readouterr().err
    assert "pretrain: its results are of another config; they are kept in" in err
    assert "evaluate: its results are of other inputs" in err


def test_the_runs_manifest_names_the_corpus_and_every_stage(whole):
    found = json.loads((whole / "manifest.json").read_text())
    prepared = json.loads((whole / "prepare/manifest.json").read_text())
    assert found["facts"]["corpus"] == [{split: prepared["facts"][split]["sha256"] for split in ("train", "heldout")}]
    assert found["inputs"]["prepare"] == prepared["hash"]
    assert list(found["facts"]["stages"]) == STAGES


def test_results_that_were_put_aside_are_not_loaded(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    (copy / "pretrain").rename(copy / "pretrain.outdated-1")
    with pytest.raises(UserError, match="holds no finished model"):
        jaxlm.load(copy)


def test_only_some_stages(config, whole, tmp_path):
    folder = tmp_path / "run"
    assert run(config, folder, "--config.only=prepare,tokenizer") == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["prepare", "tokenizer"]


def test_mistakes_are_named_before_anything_runs(config, tmp_path, capsys):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(config.read_text().replace('model="@pretrain", rows', 'model="@pretrian", rows'))
    assert run(wrong, tmp_path / "run") == 2
    assert "stages.evaluate.model: '@pretrian' names no earlier stage" in capsys.readouterr().err
    assert not (tmp_path / "run/prepare").exists()
    assert run(config, tmp_path / "run", "--config.stages.pretrain.mesh.data=3") == 2
    assert "stages.pretrain.mesh: data=3 does not divide 8 devices" in capsys.readouterr().err
    assert run(config, tmp_path / "run", "--config.only=pretrian") == 2
    assert "no stage is called 'pretrian'" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_there(config, whole, tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "jaxlm", "run", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    waits = {
        "prepare": lambda: (workdir / "prepare/config.json").exists(),
        "pretrain": lambda: (workdir / "pretrain/checkpoints/10/manifest.json").exists(),
        "evaluate": lambda: (workdir / "evaluate/config.json").exists(),
    }
    for name, ready in waits.items():
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 200
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, (name, process.communicate())
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes on from step" in (workdir / "pretrain/log.txt").read_text()
    for name in ("prepare", "tokenizer", "pack"):
        assert (
            json.loads((workdir / name / "manifest.json").read_text())["hash"]
            == json.loads((whole / name / "manifest.json").read_text())["hash"]
        )
    losses = [json.loads(line) for line in (workdir / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "train/loss" in line] == list(range(1, 31))
