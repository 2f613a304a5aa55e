"""What a page shows of one stage's folder: a section for each kind of file that lies there."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxlm.base import config as configs
from jaxlm.base import files
from jaxlm.base.errors import JaxlmError
from jaxlm.report import charts, results
from jaxlm.report.charts import Curve
from jaxlm.report.tables import record_rows, shown, table

# Where stages count what they read, and what they pack.
PACKED = ("", "rows", "general")
COUNTED = (*(f"{name}/report.json" for name in PACKED), "data.json", "data-train.json", "data-heldout.json")
MOST_EXAMPLES = 12
MOST_SAMPLES = 24  # answers on the page: of the first, the middle and the last ones
GROUPS = "train/gradient_norm/"

# Title, and what is drawn in it; metrics that stand nowhere here get a chart of their own.
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss, nats a token", ("train/loss", "eval/loss", "eval/ema_loss", "eval/general_loss")),
    ("bits a byte, held out", ("eval/bits_per_byte", "eval/ema_bits_per_byte", "eval/general_bits_per_byte")),
    ("accuracy", ("train/accuracy", "eval/accuracy", "eval/general_accuracy", "reward/accuracy", "eval/pair_accuracy")),
    ("ranking loss, nats a prompt", ("reward/loss",)),
    ("rewards of the two", ("reward/difference", "reward/level")),
    ("reward", ("rl/reward", "eval/reward", "rl/reward_model", "rl/verifier")),
    ("gold score, measured only", ("rl/gold", "eval/gold")),
    ("KL to the reference, nats an answer", ("rl/kl", "eval/kl")),
    ("answer length, tokens", ("rl/answer_tokens", "eval/answer_tokens")),
    ("ended by itself, repetition", ("rl/eos_rate", "eval/eos_rate", "rl/repetition")),
    ("entropy, nats a token", ("rl/entropy",)),
    ("clipped share", ("rl/clip_fraction", "rl/value_clip_fraction")),
    ("value function", ("rl/explained_variance", "rl/value_loss")),
    ("KL of the updates, nats a token", ("rl/old_kl", "rl/first_old_kl", "rl/sampler_difference")),
    ("seconds an iteration", ("rl/rollout_seconds", "rl/reward_seconds", "rl/learning_seconds")),
    ("learning rate", ("train/learning_rate",)),
    ("gradient norm", ("train/gradient_norm", "rl/value_gradient_norm")),
    ("norm of the update", ("train/update_norm",)),
    ("norm of the parameters", ("train/parameter_norm",)),
    ("squared log-normaliser", ("train/z_loss",)),
    ("tokens a second", ("train/tokens_per_second",)),
    ("utilisation, wait for data", ("train/mfu", "train/data_wait")),
)
# Where the time of a run goes, in the words of the table of goodput; these are not drawn.
TIMES = {
    "time/step_seconds": "steps that stayed",
    "time/lost_seconds": "steps taken again after a restart",
    "time/start_seconds": "start",
    "time/compile_seconds": "compiling",
    "time/data_seconds": "waiting for data",
    "time/save_seconds": "saving",
    "time/eval_seconds": "evaluating",
}
UNDRAWN = ("train/step_seconds", "train/skipped_steps", *TIMES)  # said in the table of throughput


class Section(NamedTuple):
    title: str
    body: Markup
    folded: bool = False
    """behind its title, to be opened by a click"""


def of(folder: Path, config_class: Callable[[str], type]) -> list[Section]:
    """All that can be said of a stage's folder, the figures first, how it was made last."""
    values = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    report, found = optional_json(folder / "report.json"), optional_json(folder / "results.json")
    manifest = optional_json(folder / "manifest.json") or {}
    facts = {name: value for name, value in manifest.get("facts", {}).items() if name not in ("summary", "results")}
    counted = [optional_json(folder / name.lstrip("/")) for name in COUNTED]
    packed = [optional_json(folder / name / "manifest.json") or {} for name in PACKED]
    packed_facts = {name or "rows": found["facts"] for name, found in zip(PACKED, packed, strict=True) if found}
    if packing := (optional_json(folder / "data.json") or {}).get("packing"):
        packed_facts["rankings"] = packing
    made = [
        ("Verdict of the gate", results.gate(optional_json(folder / "gate.json"))),
        ("Results", results.results(found)),
        ("Reward against √KL", results.frontier(values)),
        ("Ranking", results.ranking(report)),
        ("Data", Markup("").join(results.documents(each) for each in counted)),
        ("Packing", results.packing(packed_facts)),
        ("Documents' lengths", results.lengths(facts)),
        ("Curves", curves(values)),
        ("Throughput", goodput(values)),
        ("Samples", samples(folder)),
        ("Examples", examples(folder)),
    ]
    kept = [Section(title, body) for title, body in made if body]
    inputs = record_rows(manifest.get("inputs") or optional_json(folder / "inputs.json") or {})
    folded = (("Facts", record_rows(facts)), ("Config", config(folder, config_class)), ("Inputs", inputs))
    return kept + [Section(title, body, folded=True) for title, body in folded if body]


def optional_json(path: Path) -> Any:
    return files.read_json(path) if path.exists() else None


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").splitlines() if line.strip()] if path.exists() else []


def curves(values: Sequence[Mapping[str, Any]]) -> Markup:
    """A chart for each group of metrics."""
    series = {name: _series(values, name) for name in dict.fromkeys(name for line in values for name in line)}
    series = {name: curve for name, curve in series.items() if "/" in name and curve.x}
    groups = [name for name in series if name.startswith(GROUPS)]
    drawn = [*CHARTS, ("gradient norm by group of layers", tuple(groups))]
    listed = {*UNDRAWN, *(name for _, names in drawn for name in names)}
    drawn += [(name, (name,)) for name in series if name not in listed]
    parts = []
    for title, names in drawn:
        present = {name: series[name] for name in names if name in series and any(series[name].y)}
        if present:
            short = {name.removeprefix(GROUPS): curve for name, curve in present.items()}
            parts.append(charts.lines(title, short))
    return _grid(parts)


def _series(values: Iterable[Mapping[str, Any]], name: str) -> Curve:
    points = [(line["step"], line[name]) for line in values if line.get(name) is not None]
    return Curve([x for x, _ in points], [y for _, y in points])


def _grid(parts: Sequence[Markup]) -> Markup:
    return Markup('<div class="charts">{}</div>').format(Markup("").join(parts)) if parts else Markup("")


def goodput(values: Sequence[Mapping[str, Any]]) -> Markup:
    """Which share of the wall time from the first start to the last line of metrics went into steps that stayed, and
    what took the rest (`jaxlm/train/goodput.py`)."""
    lines = [line for line in values if line.get("train/goodput")]
    if not lines:
        return Markup("")
    last = lines[-1]
    spent = {name: last[name] for name in TIMES}
    spent["time/step_seconds"] -= spent["time/lost_seconds"]
    wall = spent["time/step_seconds"] / last["train/goodput"]
    rates = sorted(line["train/tokens_per_second"] for line in lines if line.get("train/tokens_per_second"))
    told = {TIMES[name]: f"{seconds / wall:.1%} ({seconds:,.1f} s)" for name, seconds in spent.items()}
    rest = wall - sum(spent.values())
    told["stopped, or killed before the next line"] = f"{max(rest, 0) / wall:.1%} ({max(rest, 0):,.1f} s)"
    told["tokens/s"] = f"{rates[len(rates) // 2]:,.0f} (median; {rates[0]:,.0f} to {rates[-1]:,.0f})" if rates else ""
    return record_rows({"wall time": f"{wall:,.1f} s"} | told | {"skipped steps": shown(last["train/skipped_steps"])})


def samples(folder: Path) -> Markup:
    """Prompts and answers: of a policy those of its first, middle and last rollouts; and lengths of all of them."""
    for name in ("completions.jsonl", *sorted(path.name for path in folder.glob("answers-*.jsonl"))):
        records = [json.loads(line) for line in _lines(folder / name)]
        if records:
            break
    else:
        return Markup("")
    third = MOST_SAMPLES // 3
    middle = (len(records) - third) // 2
    kept = records
    if len(records) > MOST_SAMPLES:
        kept = records[:third] + records[middle : middle + third] + records[-third:]
    fields = [field for field in ("step", "reward", "kl", "gold", "stop_reason") if field in records[0]]
    rows = [
        [*(shown(record.get(field)) for field in fields), _said(record["prompt"]), _said(_answer(record))]
        for record in kept
    ]
    made = table([*fields, "prompt", "answer"], rows)
    if len(records) <= MOST_SAMPLES:
        return made
    half = len(records) // 2
    parts = {"first half": records[:half], "second half": records[half:]} if "step" in records[0] else {"all": records}
    lengths = {name: [len(_answer(record)) for record in part] for name, part in parts.items()}
    return made + _grid([charts.histogram("length of answers, share of each bin", lengths, x="characters")])


def examples(folder: Path) -> Markup:
    """What an evaluation asked and got, the first ones of each part."""
    parts = []
    for path in sorted(folder.glob("examples/*.jsonl")):
        records = [json.loads(line) for line in _lines(path)]
        fields = list(dict.fromkeys(field for record in records[:MOST_EXAMPLES] for field in record))
        rows = [[_cell(field, record.get(field)) for field in fields] for record in records[:MOST_EXAMPLES]]
        folded = Markup("<details><summary>{}: {} of {}</summary>{}</details>")
        parts.append(folded.format(path.stem, len(rows), len(records), table(fields, rows)))
    return Markup("").join(parts)


def _cell(field: str, value: Any) -> Any:
    """A value of an example: texts as they are, numbers short, lists with an item a line."""
    if field == "where":
        return str(value).rpartition("/")[2]
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        return _said("\n".join(item if isinstance(item, str) else shown(round(item, 3)) for item in value))
    return shown(value) if isinstance(value, bool | int | float) or value is None else _said(value)


def _answer(record: Mapping[str, Any]) -> str:
    return str(record.get("answer", record.get("text", "")))


def _said(value: Any) -> Markup:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Markup('<span class="said">{}</span>').format(text if len(text) < 400 else text[:400] + " …")


def config(folder: Path, config_class: Callable[[str], type]) -> Markup:
    """The fields that differ from their defaults; below them, all."""
    values = (optional_json(folder / "config.json") or {}).get("config")
    if not values:
        return Markup("")
    everything = Markup('<details><summary>all fields</summary><pre class="said">{}</pre></details>').format(
        json.dumps(values, indent=1, ensure_ascii=False)
    )
    try:
        made = configs.from_dict(config_class(values["stage"]), values)
    except (JaxlmError, KeyError) as error:  # of another version
        return Markup("<p>{}</p>").format(error) + everything
    rows = [[field, shown(value), shown(default)] for field, value, default in changed(made)]
    return table(["field", "value", "default"], rows) + everything


def changed(config: Any, path: str = "", made: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, value, default) of what differs from the defaults, without names and folders.

    `made`: what the outer class has as its default here; where it has none, the class's own defaults count.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = configs.default_of(field) if made is None else getattr(made, field.name)
        if value == default or (not path and field.name in ("name", "workdir")):
            continue
        parts = {"": value}
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            parts = {f".{number}": item for number, item in enumerate(value)}
        for suffix, part in parts.items():
            if dataclasses.is_dataclass(part):
                if dataclasses.is_dataclass(default) and type(part) is not type(default):
                    yield f"{path}{field.name}{suffix}", type(part).__name__, type(default).__name__
                yield from changed(
                    part, f"{path}{field.name}{suffix}.", default if type(part) is type(default) else None
                )
            else:
                known = None if default is dataclasses.MISSING else configs.to_dict(default)
                yield f"{path}{field.name}{suffix}", configs.to_dict(part), known
