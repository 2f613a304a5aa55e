"""What the stages' own reports say: data, rankings, reinforcement, evaluation, gate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxlm.report import charts
from jaxlm.report.charts import Curve
from jaxlm.report.tables import shown, table


def documents(report: Mapping[str, Any] | None) -> Markup:
    """What was read, kept and dropped of each source, and why, with examples."""
    if not report or "sources" not in report:
        return Markup("")
    sources = report["sources"]
    reasons = [*dict.fromkeys(reason for source in sources.values() for reason in source["dropped"])]
    rows = [
        [name, *(shown(source[field]) for field in ("read", "kept", "bad"))]
        + [shown(source["dropped"].get(reason, 0)) for reason in reasons]
        for name, source in sources.items()
    ]
    made = table(["source", "read", "kept", "bad", *reasons], rows)
    examples = [
        [name, reason, example["where"], Markup('<span class="said">{}</span>').format(example["text"])]
        for name, source in sources.items()
        for reason, found in source.get("examples", {}).items()
        for example in found
    ]
    if not examples:
        return made
    inside = table(["source", "reason", "where", "text"], examples)
    return made + Markup("<details><summary>examples of what was dropped</summary>{}</details>").format(inside)


def packing(found: Mapping[str, Mapping[str, Any]]) -> Markup:
    """How full rows and batches are: a line for each split of each folder's facts that count tokens."""
    each = {
        f"{name}, {split}": {field: value for field, value in facts[split].items() if field != "lengths"}
        for name, facts in found.items()
        for split in ("train", "heldout")
        if isinstance(facts.get(split), Mapping) and "tokens" in facts[split]
    }
    fields = list(dict.fromkeys(field for facts in each.values() for field in facts))
    rows = [[name, *(shown(facts.get(field)) for field in fields)] for name, facts in each.items()]
    return table(["", *(field.replace("_", " ") for field in fields)], rows)


def lengths(facts: Mapping[str, Any]) -> Markup:
    """Of packed documents: how many have up to 16, 32, … tokens."""
    drawn = [
        charts.bars(f"{split}: documents of up to so many tokens", {name: (n, n, n) for name, n in found.items()})
        for split in ("train", "heldout")
        if (found := facts.get(split, {}).get("lengths"))
    ]
    return Markup('<div class="charts">{}</div>').format(Markup("").join(drawn)) if drawn else Markup("")


def ranking(report: Mapping[str, Any] | None) -> Markup:
    """A reward model's accuracy, whole and by each column, its calibration, and what length explains."""
    if not report or "accuracy_by" not in report:
        return Markup("")
    rows = [
        [
            f"{column}: {name}",
            f"{each['share']:.1%}",
            f"{each['low']:.1%} to {each['high']:.1%}",
            f"{each['total']:,}",
        ]
        for column, shares in {"all": {"pairs": report["accuracy"]}, **report["accuracy_by"]}.items()
        for name, each in shares.items()
    ]
    drawn = [
        charts.bars(f"accuracy by {column}", {name: (s["share"], s["low"], s["high"]) for name, s in shares.items()})
        for column, shares in report["accuracy_by"].items()
    ]
    points = [each for each in report["calibration"] if each["predicted"] is not None and each["observed"]["total"]]
    curve = Curve([each["predicted"] for each in points], [each["observed"]["share"] for each in points])
    title = f"observed share by predicted one (calibration error {report['calibration_error']:.3f})"
    drawn.append(charts.lines(title, {"": curve}, x="predicted share", diagonal=True))
    made = table(["held-out pairs", "better answer first", "95 % interval", "pairs"], rows)
    grid = Markup('<div class="charts">{}</div>').format(Markup("").join(drawn))
    length = [
        [criterion, f"{found['pearson']:.3f}", f"{found['spearman']:.3f}"]
        for criterion, found in report["length_correlation"].items()
        if found["pearson"] is not None and found["spearman"] is not None
    ]
    return grid + made + table(["reward and length", "Pearson", "Spearman"], length)


def frontier(values: Sequence[Mapping[str, Any]]) -> Markup:
    """Reward against √KL, and the gold score beside it: where it falls, the reward is being gamed."""
    points = [line for line in values if line.get("rl/kl") is not None and line.get("rl/reward") is not None]
    if not points:
        return Markup("")
    drawn = []
    for title, name in (("reward, trained on", "rl/reward"), ("gold score, measured only", "rl/gold")):
        shared = [line for line in points if line.get(name) is not None]
        if shared:
            curve = Curve([math.sqrt(max(line["rl/kl"], 0)) for line in shared], [line[name] for line in shared])
            drawn.append(charts.lines(title, {"": curve}, x="√KL to the reference, √nats an answer"))
    held = [line for line in values if line.get("eval/reward") is not None]
    rows = [
        [shown(line["step"]), *(shown(line.get(f"eval/{name}")) for name in ("reward", "reward_std", "kl", "gold"))]
        for line in held
    ]
    grid = Markup('<div class="charts">{}</div>').format(Markup("").join(drawn))
    return grid + table(["held out after step", "reward", "its standard deviation", "KL", "gold"], rows)


def results(found: Mapping[str, Any] | None) -> Markup:
    """An evaluation's figures with their intervals, what else was counted, and what there is no evidence for."""
    if not found:
        return Markup("")
    rows, counts, missing = [], [], []
    for name, value in _walk(found):
        if isinstance(value, Mapping):
            rows.append(
                [name, shown({key: value[key] for key in ("value", "interval")}), shown(value.get("n")), _bar(value)]
            )
        elif name.endswith("no_evidence"):
            missing.append([name.removesuffix(".no_evidence"), value])
        elif not isinstance(value, list):
            counts.append([name, shown(value)])
    made = table(["figure", "value, 95 % interval", "n", "0 to 1"], rows) + table(["no evidence", "why"], missing)
    folded = Markup("<details><summary>counts</summary>{}</details>")
    return made + (folded.format(table(["", ""], counts)) if counts else Markup(""))


def _walk(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all leaves; a figure comes whole, and what else stands beside it after it."""
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if {"value", "interval"} <= {*value}:
                yield name, value
                value = {field: inner for field, inner in value.items() if field not in ("value", "interval", "n")}
            yield from _walk(value, name)
        else:
            yield name, value


def _bar(figure: Mapping[str, Any]) -> Markup:
    """The interval of a share, between 0 and 1; nothing for other figures."""
    value, interval = figure["value"], figure["interval"]
    if not interval or not 0 <= interval[0] <= value <= interval[1] <= 1:
        return Markup("")
    bar = '<div class="scale"><i style="left:{:.1f}%;width:{:.1f}%"></i><b style="left:{:.1f}%"></b></div>'
    return Markup(bar).format(100 * interval[0], 100 * (interval[1] - interval[0]), 100 * value)


def gate(verdict: Mapping[str, Any] | None) -> Markup:
    """Passed or refused, and each claim with what was found."""
    if not verdict:
        return Markup("")
    word = lambda passed: Markup('<p class="{}">{}</p>').format(
        "good" if passed else "bad", "passed" if passed else "refused"
    )
    rows = [[word(check["passed"]), check["name"], check["reason"]] for check in verdict["checks"]]
    return word(verdict["passed"]) + table(["", "claim", "found"], rows)
