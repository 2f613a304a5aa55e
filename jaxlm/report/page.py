"""WORKDIR/report.html: what a run was, did and gave, on one page that needs nothing beside it.

Made when a stage ends, also when it was stopped, and again whenever `write` is called: all is read from the folder.
"""

import functools
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from jaxlm.base import files
from jaxlm.base import manifest as manifests
from jaxlm.report import sections
from jaxlm.report.sections import Section

ConfigClass = Callable[[str], type]


def write(folder: str | Path, config_class: ConfigClass) -> Path:
    """The page of a stage's run, or of a whole `run` with all of its stages; `config_class`: a stage's, by its name."""
    folder = Path(folder)
    page = _template().render(title=folder.name, stages=stages(folder, config_class), **head(folder))
    target = folder / "report.html"
    files.write_bytes(target, page.encode())
    return target


def head(folder: Path) -> dict[str, Any]:
    """What the page says first: state, versions, commit, and a whole run's table of stages."""
    manifest = sections.optional_json(folder / "manifest.json") or {}
    # A run that has no manifest was made by what makes this page.
    made_by = manifest or {"commit": manifests.commit(), "versions": manifests.versions()}
    summaries = manifest.get("facts", {}).get("stages", {})
    own = manifest.get("facts", {}).get("summary")
    # A refused stage has no manifest: the next run stops there again.
    refused = not (sections.optional_json(folder / "gate.json") or {"passed": True})["passed"]
    return {
        "state": f"finished {manifest['created']}" if manifest else "refused by the gate" if refused else "unfinished",
        "commit": made_by.get("commit", ""),
        "versions": made_by.get("versions", {}),
        "table": summaries or ({folder.name: own} if own else {}),
    }


def stages(folder: Path, config_class: ConfigClass) -> dict[str, list[Section]]:
    """Name → sections: of the folder itself, or of each stage that a whole run has done something of."""
    config = (sections.optional_json(folder / "config.json") or {}).get("config", {})
    if "stages" not in config:
        return {folder.name: sections.of(folder, config_class)}
    names = [each.get("name") or each["stage"] for each in config["stages"]]
    begun = [name for name in names if (folder / name / "config.json").exists()]
    return {name: sections.of(folder / name, config_class) for name in begun}


@functools.cache
def _template() -> jinja2.Template:
    text = importlib.resources.files("jaxlm.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
