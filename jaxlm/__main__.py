"""The command line: `python -m jaxlm STAGE --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]`.

The only map from a stage's name to its module; modules are imported when a stage is asked for, jax with them.
"""

import contextlib
import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config_files
from jaxlm.base import config as configs
from jaxlm.base.errors import JaxlmError, UserError, nearest, out_of_room


class Stage(NamedTuple):
    """Where a stage stands."""

    module: str
    config: str
    """module:class of its config, importable without jax"""
    purpose: str
    argument: str = ""
    """Field that a bare argument sets; a stage with one needs neither --config nor --workdir."""


STAGES = {
    "prepare": Stage("jaxlm.stages.prepare", "jaxlm.text.config:PrepareConfig", "documents → clean shards"),
    "tokenizer": Stage("jaxlm.stages.tokenizer", "jaxlm.tokenizer.config:TokenizerConfig", "documents → vocabulary"),
    "pack": Stage("jaxlm.stages.pack", "jaxlm.data.config:PackConfig", "documents → rows of tokens"),
    "pretrain": Stage("jaxlm.stages.pretrain", "jaxlm.stages.config:PretrainConfig", "rows → base model"),
    "sft": Stage("jaxlm.stages.sft", "jaxlm.stages.config:SFTConfig", "base model + chats → assistant"),
    "reward": Stage("jaxlm.stages.reward", "jaxlm.reward.config:RewardConfig", "assistant + rankings → reward model"),
    "rl": Stage("jaxlm.stages.rl", "jaxlm.rl.config:RLConfig", "assistant + rewards → policy"),
    "preference": Stage(
        "jaxlm.stages.preference", "jaxlm.preference.config:PreferenceConfig", "assistant + rankings → policy"
    ),
    "sample": Stage("jaxlm.stages.sample", "jaxlm.sample.config:SampleConfig", "model + prompts → completions"),
    "select": Stage("jaxlm.stages.select", "jaxlm.rl.config:SelectConfig", "completions + rewards → the best as chats"),
    "chat": Stage("jaxlm.stages.chat", "jaxlm.sample.config:ChatConfig", "a conversation with a model", "model"),
    "evaluate": Stage(
        "jaxlm.stages.evaluate", "jaxlm.evaluate.config:EvaluateConfig", "model + texts, tasks → figures, verdict"
    ),
    "import": Stage(
        "jaxlm.stages.import_", "jaxlm.hub.config:ImportConfig", "Hugging Face directory, GGUF → model", "source"
    ),
    "export": Stage(
        "jaxlm.stages.export", "jaxlm.hub.config:ExportConfig", "model → Hugging Face directory, GGUF", "model"
    ),
    "run": Stage("jaxlm.stages.run", "jaxlm.stages.config:RunConfig", "several stages from one file"),
}

# Stages that use devices, and those of them that several processes can run together.
ON_DEVICES = ("pretrain", "sft", "reward", "rl", "preference", "sample", "chat", "evaluate", "import", "export", "run")
PARALLEL = ("pretrain", "sft", "reward", "rl", "preference")

USAGE = """\
python -m jaxlm STAGE --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]
python -m jaxlm STAGE --help      the stage's fields, with their defaults

Stages:
"""


def load_stage(name: str) -> Any:
    """The module of a stage."""
    return importlib.import_module(STAGES[name].module)


def config_class(name: str) -> type[configs.StageConfig]:
    module, attribute = STAGES[name].config.split(":")
    return getattr(importlib.import_module(module), attribute)


def help_text(name: str) -> str:
    """The fields of a stage's config."""
    cls = config_class(name)
    lines = [f"python -m jaxlm {name} --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]"]
    if argument := STAGES[name].argument:
        lines += [f"python -m jaxlm {name} {argument.upper()} [--workdir=DIR] [--config.FIELD=VALUE ...]"]
    lines += ["", " ".join((cls.__doc__ or "").split()), "", "Fields (type = default):", ""]
    hidden = ("workdir",)
    for field, kind, default, doc in configs.describe(cls):
        if field not in hidden:
            lines += [f"  {field}: {kind} = {default}", f"      {doc}"]
    return "\n".join(lines)


def parse_arguments(name: str, arguments: list[str]) -> tuple[str, str, dict[str, str]]:
    """(--config, --workdir, raw overrides) from the arguments after the stage; absl parses all but the overrides."""
    from absl import flags

    overrides: dict[str, str] = {}
    rest = []
    fields = configs.field_types(config_class(name))
    for argument in arguments:
        bare = argument.lstrip("-")
        # A stage that needs no config file takes its own fields as flags.
        field = bare.partition("=")[0]
        if argument.startswith("--") and STAGES[name].argument and field != "workdir" and field in fields:
            bare = f"config.{bare}"
        if argument.startswith("-") and bare.startswith("config."):
            field, equals, value = bare.removeprefix("config.").partition("=")
            if not equals:
                raise UserError(f"{argument}: has no value; write --config.{field}=VALUE")
            overrides[field] = value
        else:
            rest.append(argument)
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may stand behind a bare argument
    flags.DEFINE_string("config", None, "File with get_config().", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder for the results.", flag_values=values)
    try:
        left = values(["jaxlm", *rest])
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0]}; the flags are --config, --workdir and --config.FIELD") from None
    argument = STAGES[name].argument
    if argument and len(left) > 1 and argument not in overrides:
        overrides[argument] = left.pop(1)
    if len(left) > 1:
        raise UserError(f"{left[1]!r}: is not understood; the flags are --config, --workdir and --config.FIELD=VALUE")
    for flag in ("config", "workdir"):
        if not getattr(values, flag) and not argument:
            raise UserError(f"--{flag}: is missing; usage: {USAGE.splitlines()[0]}")
    return values.config or "", values.workdir or "", overrides


def make_config(name: str, path: str, workdir: str, overrides: dict[str, str]) -> configs.StageConfig:
    """The stage's final config: file, overrides, checks. Without a file: the defaults."""
    cls = config_class(name)
    argument = STAGES[name].argument
    config = config_files.load_config_file(path) if path else cls(**{argument: overrides.get(argument, "")})
    if "://" in workdir:
        raise UserError(
            f"--workdir: {workdir} is no folder of a file system, and metrics and logs are appended to files, which "
            "buckets cannot do; mount the bucket on every host (gcsfuse), or use a shared disk"
        )
    if not isinstance(config, cls):
        made_for = getattr(config, "stage", type(config).__name__)
        hint = f"; python -m jaxlm {made_for} takes it" if made_for in STAGES else ""
        hint += " whole" if made_for == "run" else ""
        parts = [part.name or part.stage for part in getattr(config, "stages", ()) if part.stage == name]
        hint += f", with --config.only={parts[0]} one stage of it" if parts else ""
        raise UserError(f"{path}: is a config for {made_for!r}, not for {name!r}{hint}")
    configs.check_types(config)
    config = configs.override(config, overrides)
    return configs.override(config, {"workdir": workdir})


def prepare_workdir(config: configs.StageConfig) -> None:
    """Makes the folder and keeps the config in it; a folder of another config is refused, field by field."""
    from jaxlm.base import files

    folder = Path(config.workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(folder, error) from error
    changed = changes(config)
    if changed:
        lines = [f"  {field}: was {old!r}, now {new!r}" for field, old, new in changed]
        raise UserError(
            f"--workdir: {folder} belongs to a run with another config; use another folder, or the old values:\n"
            + "\n".join(lines)
        )
    kept = {"config": configs.to_dict(config), "identity": configs.identity(config)}
    kept["continued_identity"] = configs.identity(config, continued=True)
    files.write_json(folder / "config.json", kept)


def changes(config: configs.StageConfig) -> list[tuple[str, Any, Any]]:
    """(field, old, new) of what keeps `config` from being that of its folder's finished or unfinished results."""
    from jaxlm.base import files

    folder = Path(config.workdir)
    if not (folder / "config.json").exists():
        return []
    kept = files.read_json(folder / "config.json")
    if (folder / "manifest.json").exists():
        return list(configs.differences(kept.get("identity"), configs.identity(config)))
    return list(configs.differences(kept.get("continued_identity"), configs.identity(config, continued=True)))


def run(name: str, config: configs.StageConfig) -> None:
    """Runs a stage in this process, or as one of several processes where the surroundings say so."""
    from jaxlm import devices
    from jaxlm.base import logging
    from jaxlm.maintenance import notices

    alone = UserError(f"{name}: runs in one process only; several can share {', '.join(PARALLEL)}")
    if devices.several() and name not in PARALLEL:
        raise alone
    processes = 1
    if name in ON_DEVICES:
        asked = [getattr(each, "loop", None) for each in (config, *getattr(config, "stages", ()))]
        devices.start(deterministic=any(loop.deterministic for loop in asked if loop is not None))
        if devices.distributed():  # perhaps: a TPU VM can be alone
            import jax

            processes = jax.process_count()
    if processes > 1 and name not in PARALLEL:
        raise alone
    if processes > 1:
        import jax

        from jaxlm.train.processes import from_first

        from_first(lambda: prepare_workdir(config))
        logging.start(config.workdir if jax.process_index() == 0 else None)
    elif name != "run":  # `run` decides stage by stage
        if config.workdir:
            prepare_workdir(config)
            refuse_other_inputs(name, config)
        logging.start(config.workdir)
    with notices() if name in (*PARALLEL, "run") else contextlib.nullcontext():
        perform(config)


def perform(config: configs.StageConfig) -> Any:
    """A stage's `main`, and its folder's report.html, also of a run that was stopped or failed."""
    try:
        return load_stage(config.stage).main(config)
    except Exception as error:
        if config.stage in PARALLEL and "RESOURCE_EXHAUSTED" in str(error).partition("\n")[0]:
            raise UserError(out_of_memory(config, error)) from error
        raise
    finally:
        if config.workdir and config.stage != "chat":
            report(config.workdir)


def out_of_memory(config: configs.StageConfig, error: Exception) -> str:
    """What to do about a device's full memory: what needs how much, and what would fit."""
    from jaxlm.base.logging import logger
    from jaxlm.plan.memory import explain

    logger.info("out of memory; looking for what would fit ...")
    try:
        return explain(load_stage(config.stage), config, error)
    except Exception as problem:  # of the explanation, which is none of the user's
        logger.warning("the memory could not be taken apart: %s: %s", type(problem).__name__, problem)
        return out_of_room(error)


def report(workdir: str) -> None:
    """Writes WORKDIR/report.html, by the first process; a page that cannot be made is no reason to fail."""
    from jaxlm.base import logging
    from jaxlm.report import page

    jax = sys.modules.get("jax")  # never asked for its index alone: that would start the devices
    if jax is not None and jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    try:
        page.write(workdir, config_class)
    except Exception as error:
        logging.logger.warning("%s/report.html could not be made: %s: %s", workdir, type(error).__name__, error)


def refuse_other_inputs(name: str, config: configs.StageConfig) -> None:
    """A finished stage is not done again in place from other inputs: what was made from its results would not fit."""
    from jaxlm.base import manifest

    if (Path(config.workdir) / "manifest.json").exists():
        known = manifest.read(config.workdir).inputs
        manifest.refuse_other_inputs(config.workdir, known, load_stage(name).inputs(config))


def main(arguments: list[str]) -> int:
    """Runs a command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, STAGES))
        print(USAGE + "\n".join(f"  {name:{width}}  {stage.purpose}" for name, stage in STAGES.items()))
        return 0
    name, *rest = arguments
    try:
        if name in ("--version", "version"):
            from jaxlm.version import VERSION

            print(VERSION)
            return 0
        if name not in STAGES:
            raise UserError(f"no stage is called {name!r}" + nearest(name, STAGES))
        if any(argument in ("--help", "-h", "-help") for argument in rest):
            print(help_text(name))
            return 0
        run(name, make_config(name, *parse_arguments(name, rest)))
        return 0
    except JaxlmError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("jaxlm: stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if advice := out_of_room(error):
            print(f"jaxlm: {advice}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1


def command() -> None:
    """The console command."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
