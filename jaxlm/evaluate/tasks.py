"""Tasks: plain files that say what a model is asked and how its answers are scored.

    capitals.json    {"prompt": "Q: What is the capital of {{ country }}?\\nA:", "data": "capitals.jsonl",
                      "metric": "multiple_choice"}
    capitals.jsonl   {"country": "Peru", "choices": ["Lima", "Quito"], "target": "Lima"}  and more lines

TOML does as well. `TaskConfig` has all fields. Prompts are Jinja in a sandbox, as chat templates are.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.base import config as configs
from jaxlm.base import files
from jaxlm.base.errors import ConfigError, JaxlmError, UserError
from jaxlm.evaluate.answers import measured
from jaxlm.evaluate.config import TaskConfig
from jaxlm.text import readers
from jaxlm.text.clean import Reason
from jaxlm.text.config import Source, SourceConfig

FOLDER = epath.Path(__file__).parent / "data"
SHIPPED = ("truthful",)
ENDINGS = (".json", ".toml")
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Example(NamedTuple):
    record: Mapping[str, Any]
    language: str
    where: str
    """file:line"""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task file with its data."""

    config: TaskConfig
    path: epath.Path
    examples: list[Example]
    shots: list[Example]
    render: Callable[[Example, bool], str]
    """(example, in a chat) → its prompt."""
    render_answer: Callable[[Example, bool], str] | None
    """The answer that stands behind a shot's prompt, where the file has a template of it."""

    @property
    def name(self) -> str:
        return self.config.name or self.path.stem

    def target(self, example: Example) -> Any:
        return _field(example, self.config.target_field)

    def choices(self, example: Example) -> tuple[list[str], int]:
        """The answers to choose from, and which of them is right."""
        choices, target = _field(example, self.config.choices_field), self.target(example)
        if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices) or len(choices) < 2:
            problem = f"{self.config.choices_field} is {choices!r}; a list of two or more texts is needed"
            raise UserError(f"{example.where}: {problem}")
        if isinstance(target, str) and choices.count(target) == 1:
            return choices, choices.index(target)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
            return choices, target
        problem = f"{self.config.target_field} is {target!r}; a choice's number from 0, or its text, is needed"
        raise UserError(f"{example.where}: {problem}")

    def shot_answer(self, shot: Example, chat: bool) -> str:
        if self.render_answer:
            return self.render_answer(shot, chat)
        if self.config.metric == "multiple_choice":
            choices, right = self.choices(shot)
            return choices[right]
        target = self.target(shot)
        return str(target[0] if isinstance(target, list) else target)

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The conversation that ends with the user's question."""
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        turns = [
            {"role": role, "content": text}
            for shot in self.shots
            for role, text in (("user", self.render(shot, True)), ("assistant", self.shot_answer(shot, True)))
        ]
        return [*system, *turns, {"role": "user", "content": self.render(example, True)}]

    def text(self, example: Example) -> str:
        """The prompt as running text: system, shots and question with a line between them."""
        separator = self.config.separator
        shown = [self.render(shot, False) + separator + self.shot_answer(shot, False) for shot in self.shots]
        system = [self.config.system] if self.config.system else []
        return "\n\n".join([*system, *shown, self.render(example, False)])


def _field(example: Example, name: str) -> Any:
    if name not in example.record:
        raise UserError(f"{example.where}: has no field {name!r}, which the task's metric needs")
    return example.record[name]


def find(path: str) -> list[epath.Path]:
    """The task files that a path, a folder or the name of a shipped task means."""
    if path in SHIPPED:
        return [FOLDER / f"{path}.json"]
    place = epath.Path(path)
    if not place.exists():
        raise UserError(f"tasks: no such file or folder: {path}; {', '.join(SHIPPED)} comes with jaxlm")
    if not place.is_dir():
        return [place]
    found = sorted(child for child in place.iterdir() if child.suffix in ENDINGS and not child.name.startswith("."))
    if not found:
        raise UserError(f"tasks: {path} holds no task, no file that ends in {' or '.join(ENDINGS)}")
    return found


def load(paths: Sequence[str]) -> list[Task]:
    """The tasks of the paths, in order. Raises UserError that names file, field and line."""
    tasks = [read(file) for path in paths for file in find(path)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: {names.count(name)} are called {name!r}; give one another name in its file")
    return tasks


def inputs(paths: Sequence[str]) -> dict[str, str]:
    """Task and data files → their hashes."""
    read_from = {}
    for file in [file for path in paths for file in find(path)]:
        read_from[str(file)] = files.sha256(file)
        read_from |= readers.inputs(_source(file, _config(file)))
    return read_from


def read(path: epath.PathLike) -> Task:
    path = epath.Path(path)
    config = _config(path)
    try:
        records = objects(_source(path, config), "data")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('sources.data.path: ')}; data names it") from None
    found = [Example(record, str(record.get("language", config.language)), where) for where, record in records]
    examples = found[config.shots :][: config.limit or None]
    if not examples:
        raise UserError(f"{path}: data: {config.data} has {len(found)} records, all of them shots; lower shots")
    answer = _renderer(config.shot_answer, f"{path}: shot_answer") if config.shot_answer else None
    return Task(config, path, examples, found[: config.shots], _renderer(config.prompt, f"{path}: prompt"), answer)


def objects(source: Source, field: str) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, object) of all records of a source. Raises UserError for a bad record, and for none at all."""
    found = []
    for where, value, _ in measured(source):
        if isinstance(value, Reason):
            raise UserError(f"{field}: {where}: {value}; a JSON object is needed")
        found.append((where, value))
    if not found:
        raise UserError(f"{field}: {source.path or source.name}: holds no record")
    return found


def _config(path: epath.Path) -> TaskConfig:
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: is not valid TOML: {error}") from None
    else:
        values = files.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f'{path}: holds no object; {{"prompt", "data", "metric"}} is needed')
    try:
        return configs.from_dict(TaskConfig, values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def _source(path: epath.Path, config: TaskConfig) -> SourceConfig:
    data = epath.Path(config.data)
    return SourceConfig(name="data", path=str(data if data.is_absolute() else path.parent / config.data))


def _renderer(template: str, where: str) -> Callable[[Example, bool], str]:
    try:
        compiled = _ENVIRONMENT.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno} is not a template: {error.message}") from None

    def render(example: Example, chat: bool) -> str:
        try:
            return compiled.render({"chat": chat} | dict(example.record))
        except JaxlmError:
            raise
        except Exception as error:  # a template is foreign code
            raise UserError(f"{where}: fails for {example.where}: {type(error).__name__}: {error}") from None

    return render
