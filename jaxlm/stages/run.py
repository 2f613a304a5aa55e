"""Several stages from one file, each in WORKDIR/NAME; what is done and unchanged is not done again.

    python -m jaxlm run --config=configs/demo.py --workdir=runs/demo

A stage is skipped when its manifest has this config and these inputs. Results of another config or of other inputs
are moved aside to NAME.outdated-1, never deleted; unfinished work with the same config is gone on with. Ends with a
table of all stages and with the samples.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.base import config as configs
from jaxlm.base import files, logging, manifest
from jaxlm.base.config import StageConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.logging import logger
from jaxlm.report import terminal
from jaxlm.stages.config import RunConfig, stage_name

Config = RunConfig
State = Literal["new", "unfinished", "done", "another config", "other inputs"]


def validate(config: RunConfig, device_count: int) -> None:
    """Resolves all paths and lets every stage check what it can, so that a mistake in the last is found at once."""
    from jaxlm.__main__ import load_stage

    for stage in resolve(config):
        if config.only and stage_name(stage) not in config.only:
            continue
        try:
            load_stage(stage.stage).validate(stage, device_count)
        except ConfigError as error:
            raise error.within(f"stages.{stage_name(stage)}") from None


def resolve(config: RunConfig) -> list[StageConfig]:
    """The stages' configs with their folders, and with `@NAME` paths pointing into this run."""
    folders: dict[str, str] = {}
    resolved = []
    for stage in config.stages:
        name = stage_name(stage)
        try:
            stage = _replace_references(stage, folders)
        except ConfigError as error:
            raise error.within(f"stages.{name}") from None
        folders[name] = f"{config.workdir}/{name}"
        resolved.append(dataclasses.replace(stage, workdir=folders[name], name=name))
    return resolved


def _replace_references(value: Any, folders: dict[str, str]) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        name, slash, rest = value[1:].partition("/")
        if name not in folders:
            known = ", ".join(folders) or "none"
            raise ConfigError("path", f"{value!r} names no earlier stage of this run; earlier ones: {known}")
        return folders[name] + slash + rest
    if isinstance(value, tuple):  # of parts with paths; strings in tuples are texts, such as prompts
        return tuple(item if isinstance(item, str) else _replace_references(item, folders) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            try:
                replaced = _replace_references(getattr(value, field.name), folders)
            except ConfigError as error:
                raise ConfigError(error.path.replace("path", field.name, 1), error.problem) from None
            if replaced is not getattr(value, field.name):
                new[field.name] = replaced
        return dataclasses.replace(value, **new) if new else value
    return value


def state_of(config: StageConfig) -> State:
    """How far a stage's folder is; "another config" and "other inputs" say why its content cannot be used."""
    from jaxlm.__main__ import changes, load_stage

    folder = Path(config.workdir)
    if not (folder / "config.json").exists():
        return "new"
    if changes(config):
        return "another config"
    inputs = load_stage(config.stage).inputs(config)
    if (folder / "manifest.json").exists():
        return "done" if manifest.same_inputs(manifest.read(folder).inputs, inputs) else "other inputs"
    begun = folder / "inputs.json"
    other = begun.exists() and not manifest.same_inputs(files.read_json(begun), inputs)
    return "other inputs" if other else "unfinished"


def move_aside(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.outdated-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def main(config: RunConfig) -> dict[str, Any]:
    """Runs the stages; returns stage name → its summary."""
    from jaxlm.__main__ import perform, prepare_workdir

    started = time.monotonic()
    try:
        Path(config.workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(config.workdir, error) from error
    validate(config, jax.device_count())
    files.write_json(f"{config.workdir}/config.json", {"config": configs.to_dict(config)})
    stages = resolve(config)
    summaries: dict[str, Any] = {}
    for stage in stages:
        name = stage_name(stage)
        if config.only and name not in config.only:
            continue
        logging.start(config.workdir)
        state = state_of(stage)
        if state == "done":
            logger.info("%s: done before, unchanged", name)
            summaries[name] = manifest.read(stage.workdir).facts["summary"]
            continue
        if state in ("another config", "other inputs"):
            kept = move_aside(Path(stage.workdir))
            logger.warning("%s: its results are of %s; they are kept in %s", name, state, kept)
        prepare_workdir(stage)
        logger.info("%s: starts in %s%s", name, stage.workdir, " where it was stopped" if state == "unfinished" else "")
        logging.start(stage.workdir)
        summaries[name] = perform(stage)
    logging.start(config.workdir)
    write_manifest(config, stages, summaries)
    samples = {stage_name(s): s.workdir for s in stages if s.stage == "sample" and stage_name(s) in summaries}
    terminal.show_run(f"{config.workdir}: {time.monotonic() - started:.0f} s", summaries, samples)
    return summaries


def write_manifest(config: RunConfig, stages: list[StageConfig], summaries: dict[str, Any]) -> None:
    """WORKDIR/manifest.json: each stage's hash and summary, and the hash of the corpus, once all stages are done."""
    if not all((Path(stage.workdir) / "manifest.json").exists() for stage in stages):
        return
    made = {stage_name(stage): manifest.read(stage.workdir) for stage in stages}
    corpora = [found.facts for stage, found in zip(stages, made.values(), strict=True) if stage.stage == "prepare"]
    corpus = [{split: facts[split]["sha256"] for split in ("train", "heldout") if split in facts} for facts in corpora]
    facts = {"corpus": corpus, "stages": {name: found.facts["summary"] for name, found in made.items()}}
    inputs = {name: found.hash for name, found in made.items()}
    manifest.write(config.workdir, "run", contents=[], inputs=inputs, config=configs.identity(config), facts=facts)
