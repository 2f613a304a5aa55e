"""Evaluation: a model on held-out rows, texts, chats, tasks, requests to refuse, against others; and the gate.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo --config.only=evaluate

Time: a forward pass over the texts, about a third of a training step's time a token, and the answers. Results:

    results.json    {"heldout": {...}, "texts": {"GLOB": {...}}, "chats": {"NAME": {...}}, "tasks": {"NAME": {...}},
                     "safety", "memorisation", "win_rate", "ratings", "toxicity", "curve"}
    examples/       a line for each example of these, answers-NAME.jsonl those of chats
    gate.json       the verdict, which also goes into the model's manifest

Each figure is {"value", "interval", "n"}, the interval being that of 95 % over documents, examples or prompts
(evaluate/intervals.py). A model that the gate refuses ends the stage with exit code 3, after all of this is written.
"""

import time
from typing import Any

import jax
from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, manifest, sharding
from jaxlm.base.errors import ConfigError, Refused
from jaxlm.evaluate import (
    figures,
    gate,
    heldout,
    lineage,
    memorisation,
    preferences,
    safety,
    task_metrics,
    tasks,
)
from jaxlm.evaluate import verdict as judging
from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.evaluate.subject import Records, subject_of
from jaxlm.evaluate.toxicity import WordLists
from jaxlm.hub.find import find_model
from jaxlm.hub.language_model import load
from jaxlm.text import readers
from jaxlm.text.config import Source

Config = EvaluateConfig
OUTPUTS = ("manifest.json", "results.json", "gate.json", "answers-*.jsonl", "examples/*.jsonl")


def validate(config: EvaluateConfig, device_count: int) -> None:
    """Raises ConfigError for a mesh that does not divide the devices, UserError for tasks and thresholds not there."""
    config.mesh.sizes(device_count)
    tasks.load(config.tasks)
    if config.safety:
        safety.read(config.safety)
    if config.gate:
        gate.read(config.gate)


def inputs(config: EvaluateConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    model = find_model(config.model, "model")
    read = {str(model): manifest.read(model).hash}
    if config.rows:
        read[config.rows] = manifest.read(config.rows, "rows", "rows").hash
    if config.documents:
        read[config.documents] = manifest.read(config.documents, "documents", "documents").hash
    if config.memorisation:
        read[config.memorisation.rows] = manifest.read(config.memorisation.rows, "rows", "memorisation.rows").hash
    texts = (heldout.text_source(pattern, config.text_field) for pattern in config.texts)
    sources: list[Source] = [*texts, *config.chats]
    if config.win_rate:
        for field in ("against", "reward_model"):
            other = find_model(getattr(config.win_rate, field), f"win_rate.{field}")
            read[str(other)] = manifest.read(other).hash
        sources += config.win_rate.prompts
    sources += config.ratings.sources if config.ratings else ()
    read |= {name: found for source in sources for name, found in readers.inputs(source).items()}
    read |= tasks.inputs(config.tasks)
    further = [*config.toxic_words, *([safety.path_of(config.safety)] if config.safety else [])]
    further += [gate.path_of(config.gate)] if config.gate else []
    further += [judging.baseline_results(config)] if config.baseline else []
    further += [lineage.curve_path((), config.curve)] if config.curve else []
    return read | {str(path): files.sha256(path) for path in further if epath.Path(path).exists()}


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Writes WORKDIR/results.json and what else the docstring names. Raises Refused where the gate says no."""
    began = time.monotonic()
    validate(config, jax.device_count())
    workdir = epath.Path(config.workdir)
    files.clear(workdir, OUTPUTS)
    read_from = inputs(config)
    folder = find_model(config.model, "model")
    records = Records(workdir, WordLists(config.toxic_words))
    lm = load(folder, mesh=sharding.make_mesh(config.mesh))
    subject = subject_of(config, lm, str(folder))
    results: dict[str, Any] = {}
    if config.rows:
        results["heldout"] = heldout.of_rows(config, subject)
        figures.show("held-out rows", results["heldout"])
    if not subject.row_length and any((config.texts, config.chats, config.tasks, config.safety, config.win_rate)):
        raise ConfigError("row_length", f"must be given: {folder} does not say on how long rows it was trained")
    for pattern in config.texts:
        results.setdefault("texts", {})[pattern] = result = heldout.of_texts(pattern, config.text_field, subject)
        figures.show(pattern, result)
    for source in config.chats:
        results.setdefault("chats", {})[source.name] = result = heldout.of_chats(config, source, subject, records)
        figures.show(source.name, result)
    for task in tasks.load(config.tasks):
        results.setdefault("tasks", {})[task.name] = result = task_metrics.measure(
            task, subject, config.sampling, records
        )
        figures.show(task.name, result)
    if config.safety:
        results["safety"] = safety.measure(config.safety, subject, config.sampling, records)
        figures.show("safety", results["safety"])
    if config.memorisation:
        results["memorisation"] = memorisation.measure(config.memorisation, subject, records)
        figures.show("memorisation", results["memorisation"])
    family = list(lineage.ancestors(folder))
    optimised = lineage.optimised_for(family)
    if config.win_rate:
        mesh = sharding.make_mesh(config.mesh)
        opened = lambda path, field: (found := find_model(path, field), load(found, mesh=mesh))
        results["win_rate"] = preferences.win_rate(config, subject, records, optimised, opened)
        figures.show("win_rate", {"win_rate": results["win_rate"]})
    if config.ratings:
        unfit = lambda annotation: lineage.unfit_judge(annotation, optimised)
        results["ratings"] = preferences.ratings(config.ratings, preferences.read(config.ratings), unfit)
        figures.show("ratings", {"ratings": results["ratings"]})
    if records.answers:
        results["toxicity"] = records.toxicity()
    found = judging.judged(config, results, family) if config.gate else None
    files.write_json(workdir / "results.json", results)
    summary = figures.summary_of(results, time.monotonic() - began)
    if found:
        read_by_gate = {"thresholds": gate.path_of(config.gate), "results": workdir / "results.json"}
        read_by_gate |= {"baseline": judging.baseline_results(config)} if config.baseline else {}
        found = gate.record(folder, found, read_by_gate)
        files.write_json(workdir / "gate.json", found)
    if found and not found["passed"]:
        # Without a manifest the stage is not done: the next `run` stops here again instead of passing by.
        raise Refused(f"{folder}: the gate refuses it:\n  " + "\n  ".join(found["reasons"]))
    contents = ["results.json", *records.names, *(["gate.json"] if found else [])]
    manifest.write(
        workdir,
        "evaluation",
        contents=contents + [f"answers-{source.name}.jsonl" for source in config.chats if config.answers],
        inputs=read_from,
        config=configs.identity(config),
        facts={"results": results, "summary": summary},
    )
    return summary
