"""lm_eval itself, offline: its command line on a directory of ours, and its own hf model on what was exported of it.

    python3 -m venv ../harness && ../harness/bin/pip install torch 'transformers>=5.23,<5.24' -e '.[lm-eval]' accelerate
    JAXLM_LM_EVAL_PYTHON=../harness/bin/python python -m pytest -m slow tests/hub/test_lm_eval_live.py

Without the variable it is this Python, where it has them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.hub.config import ExportConfig, ImportConfig
from jaxlm.stages import export, import_

pytestmark = pytest.mark.slow

ROOT, FIXTURES = Path(__file__).parents[2], Path(__file__).parent / "fixtures"
CONTEXT = 64
CHOICES = [
    {"asked": "The sky is", "choices": ["blue", "made of stone", "a word"], "right": 0},
    {"asked": "Two and two are", "choices": ["five, they say", "four"], "right": 1},
    {"asked": "A long question. " * 20 + "Its end is", "choices": ["here", "there"], "right": 0},
]
LAST = [{"before": "The sky is", "word": "blue"}, {"before": "Über den Wolken", "word": "muß die Freiheit"}]
TEXTS = [{"text": "A text."}, {"text": "A longer text, of several windows. " * 12}]
COMMON = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\nmetadata: {version: 1}\n"
TASKS = {
    "choices": (
        CHOICES,
        "output_type: multiple_choice\ndoc_to_text: '{{ asked }}'\ndoc_to_choice: '{{ choices }}'\n"
        "doc_to_target: '{{ right }}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    ),
    "last": (
        LAST,
        "output_type: loglikelihood\ndoc_to_text: '{{ before }}'\ndoc_to_target: ' {{ word }}'\n"
        "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    ),
    "texts": (
        TEXTS,
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{ text }}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
    ),
    "answers": (
        LAST,
        "output_type: generate_until\ndoc_to_text: '{{ before }}'\ndoc_to_target: '{{ word }}'\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n",
    ),
}


@pytest.fixture(scope="module")
def python() -> str:
    given = os.environ.get("JAXLM_LM_EVAL_PYTHON", "")
    if not given and all(importlib.util.find_spec(name) for name in ("lm_eval", "torch", "transformers", "accelerate")):
        given = sys.executable
    if not given:
        # torch is no part of the tests' own environment: CI has a step that names a Python with it, where none skips.
        pytest.skip("needs lm_eval, torch, transformers and accelerate in the Python that JAXLM_LM_EVAL_PYTHON names")
    return os.path.abspath(given)


@pytest.fixture(scope="module")
def results(python, tmp_path_factory) -> dict[str, dict]:
    """{"hf" | "jaxlm": {"results": lm_eval's figures, "samples": {task: lm_eval's records}}}"""
    root = tmp_path_factory.mktemp("harness")
    source, tasks = root / "source", root / "tasks"
    for folder in (source, tasks):
        folder.mkdir()
    for path in (*(FIXTURES / "llama").iterdir(), *(FIXTURES / "tokenizer-byte-level").iterdir()):
        shutil.copy(path, source / path.name)
    import_.main(ImportConfig(source=str(source), workdir=f"{root}/imported", compute="float32"))
    export.main(ExportConfig(model=f"{root}/imported", output=f"{root}/exported", without_verdict=True))
    for name, (records, text) in TASKS.items():
        data = tasks / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{COMMON % data}{text}")
    hf = f"pretrained={root}/exported,dtype=float32,add_bos_token=False,max_length={CONTEXT - 1}"
    commands = {
        "hf": ["-m", "lm_eval", "run", "--model", "hf", "--model_args", hf, "--device", "cpu"],
        "jaxlm": ["-m", "jaxlm.hub.lm_eval", "run", "--model", "jaxlm", "--model_args", f"path={root}/imported"],
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{root}/home", "PYTHONPATH": str(ROOT)}
    environment = os.environ | offline | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return {name: evaluated([python, *command], tasks, root / name, environment) for name, command in commands.items()}


def evaluated(command: list[str], tasks: Path, output: Path, environment: dict[str, str]) -> dict:
    asked = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(output), "--log_samples"]
    ran = subprocess.run([*command, *asked], env=environment, cwd=tasks, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    lines = {name: next(output.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines() for name in TASKS}
    records = {name: sorted(map(json.loads, each), key=lambda record: record["doc_id"]) for name, each in lines.items()}
    return {"results": found, "samples": records}


def numbers(record: dict) -> list[float]:
    """The log-probabilities of a record."""
    flat = lambda value: [n for item in value for n in flat(item)] if isinstance(value, list) else [value]
    return [float(value) for value in flat(record["resps"]) if value not in ("True", "False", True, False)]


@pytest.mark.parametrize("task", ["choices", "last", "texts"])
def test_log_probabilities_are_those_of_lm_evals_own_model(results, task):
    """Of continuations, of contexts that are cut, and of texts in several windows."""
    ours, theirs = (results[name]["samples"][task] for name in ("jaxlm", "hf"))
    assert len(ours) == len(theirs) == len(TASKS[task][0])
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(numbers(mine), numbers(other), rtol=0, atol=1e-4)


def test_answers_are_those_of_lm_evals_own_model(results):
    ours, theirs = ([record["resps"] for record in results[name]["samples"]["answers"]] for name in ("jaxlm", "hf"))
    assert ours == theirs


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_lm_evals_own_model(results, task):
    ours, theirs = (results[name]["results"][task] for name in ("jaxlm", "hf"))
    figures = [key for key, value in theirs.items() if isinstance(value, float) and "stderr" not in key]
    assert figures
    for key in figures:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
