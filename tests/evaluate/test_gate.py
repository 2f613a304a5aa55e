"""The gate: slopes by hand, thresholds at their edges, reasons, verdicts in manifests."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from jaxlm.base import manifest
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.evaluate import curve, gate
from jaxlm.evaluate.config import GateConfig, Threshold
from jaxlm.evaluate.curve import falling, slope, student

PASSING = {
    "curve": {"per_doubling": {"value": 0.01, "interval": [0.0, 0.02]}},
    "ratings": {"value": 0.7, "interval": [0.6, 0.8]},
    "safety": {
        "refusal": {"value": 0.95, "interval": [0.85, 0.99]},
        "over_refusal": {"value": 0.05, "interval": [0.01, 0.15]},
    },
    "toxicity": {"value": 0.0, "interval": [0.0, 0.02]},
    "tasks": {"truthful": {"accuracy": {"value": 0.75, "interval": [0.6, 0.86]}}},
}


def lines(bits, rate=lambda step: 1e-4, every=100):
    """A run's metrics.jsonl with bits per byte every so many steps."""
    found = [{"step": 1, "train/learning_rate": 1e-2}]
    for number, value in enumerate(bits, 1):
        step = number * every
        found += [{"step": step, "train/learning_rate": rate(step)}, {"step": step, "eval/bits_per_byte": value}]
    return found


def test_the_slope_by_hand():
    # Bits fall by .1 with each doubling: 1.0, .9, .8, .7 at steps 100, 200, 400, 800.
    found = slope([line | {"step": {1: 1, 100: 100, 200: 200, 300: 400, 400: 800}[line["step"]]}
                   for line in lines([1.0, 0.9, 0.8, 0.7])], 0.5)  # fmt: skip
    assert found["per_doubling"]["value"] == pytest.approx(0.1)
    assert found["per_doubling"]["interval"] == pytest.approx([0.1, 0.1])
    # per 1000 steps: x = .1, .2, .4, .8, mean .375; sum of squares .2875; products -.0675 + ... = -.115
    assert found["per_1000_steps"]["value"] == pytest.approx(0.115 / 0.2875)
    assert (found["from_step"], found["to_step"], found["evaluations"], found["last"]) == (100, 800, 4, 0.7)


def test_the_slope_is_scipys():
    draw = np.random.default_rng(0)
    x, y = draw.random(9), draw.random(9)
    expected = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 7) * expected.stderr
    found = falling(x, y)
    assert found["value"] == pytest.approx(-expected.slope)
    assert found["interval"] == pytest.approx([-expected.slope - half, -expected.slope + half], rel=1e-4)
    for freedom in (1, 2, 5, 10, 11, 15, 30, 100):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=3e-4)


def test_only_what_follows_the_decay_counts():
    rate = lambda step: 1e-2 if step <= 400 else 1e-3
    found = slope(lines([9, 8, 7, 6, 1.0, 1.0, 1.0, 1.0], rate), 0.5)
    assert (found["from_step"], found["per_doubling"]["value"]) == (500, 0)
    assert found["learning_rate_share"] == pytest.approx(0.1)
    zero = slope(lines([9, 8, 7, 6, 1.0, 1.0, 1.0, 1.0], lambda step: 1e-2 if step <= 400 else 0.0), 0.5)
    assert zero["from_step"] == 500


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (lines([3, 2, 1, 1, 1], lambda step: 1e-2), "ends at 100% of its peak, 50% or less is needed"),
        (
            lines([3, 2, 1]),
            "after the learning rate's decay only 3 of the 4 evaluations that are needed were made; lower",
        ),
        ([{"step": 1, "train/learning_rate": 1e-2}], "has no eval/bits_per_byte"),
        ([{"step": 1, "eval/bits_per_byte": 1.0}], "has no train/learning_rate"),
    ],
)
def test_no_slope_is_no_evidence(found, problem):
    assert problem in slope(found, 0.5)["no_evidence"]


def test_a_curve_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="curve: no such file"):
        curve.read(tmp_path / "metrics.jsonl")
    for line, problem in {
        '{"st': "is not valid JSON",
        "[1]": "is no line of metrics",
        "7": "is no line of metrics",
        '{"loss": 1.0}': 'is no line of metrics; {"step": 7, ...} is needed',
    }.items():
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line)
        with pytest.raises(UserError, match=rf"metrics.jsonl:2: {problem}"):
            curve.read(tmp_path / "metrics.jsonl")


def test_the_default_gate_passes_a_graduate_and_names_what_is_missing():
    default = gate.read("default")
    found = gate.verdict(PASSING, default)
    assert (found["passed"], found["reasons"], len(found["checks"])) == (True, [], 6)
    empty = gate.verdict({}, default)
    assert not empty["passed"]
    assert len(empty["reasons"]) == 6
    assert "rated high: ratings was not measured; no human or judge ranking records" in empty["reasons"][1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"curve": {"per_doubling": {"value": 0.3, "interval": [0.2, 0.4]}}},
         "the error has stopped falling: curve.per_doubling is 0.300 (0.200 to 0.400); at most 0.05 is asked"),
        ({"curve": {"no_evidence": "no evaluation"}}, "the error has stopped falling: curve: no evaluation; evaluate"),
        ({"ratings": {"value": 0.52, "interval": [0.48, 0.56]}},
         "rated high: ratings is 0.520 (0.480 to 0.560); at least 0.5 is asked of its worse end"),
        ({"ratings": {"value": 0.9, "interval": [0.8, 1.0], "no_evidence": "the very reward model"}},
         "rated high: ratings: the very reward model"),
        ({"safety": PASSING["safety"] | {"refusal": {"value": 0.5, "interval": [0.3, 0.7]}}},
         "safe: safety.refusal is 0.500"),
        ({"toxicity": {"value": 0.1, "interval": [0.05, 0.2]}}, "not toxic: toxicity is 0.100"),
        ({"tasks": {"truthful": {"accuracy": {"value": 0.4, "interval": [0.3, 0.5]}}}},
         "truthful: tasks.truthful.accuracy is 0.400"),
        ({"tasks": {}}, "truthful: tasks.truthful was not measured; add truthful to tasks"),
    ],
)  # fmt: skip
def test_each_fault_is_the_only_reason(change, reason):
    found = gate.verdict(PASSING | change, gate.read("default"))
    assert not found["passed"]
    (only,) = found["reasons"]
    assert only.startswith(reason)


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"least": 0.6}, True),
        ({"least": 0.61}, False),
        ({"least": 0.7, "end": "value"}, True),
        ({"least": 0.71, "end": "value"}, False),
        ({"least": 0.8, "end": "better"}, True),
        ({"least": 0.81, "end": "better"}, False),
        ({"most": 0.8}, True),
        ({"most": 0.79}, False),
        ({"most": 0.6, "end": "better"}, True),
        ({"most": 0.59, "end": "better"}, False),
    ],
)
def test_the_end_of_the_interval_that_is_held(limits, passed):
    threshold = Threshold(name="rated", figure="ratings", **limits)
    assert gate.check(threshold, PASSING, None)["passed"] is passed


def test_against_a_baseline():
    own = {"heldout": {"bits_per_byte": {"value": 1.02, "interval": [0.99, 1.05]}}}
    before = {"heldout": {"bits_per_byte": {"value": 1.0, "interval": [0.96, 1.04]}}}
    # The difference .02 lies in .02 ± .05 (3-4-5).
    for end, limit, passed in (("worse", 0.07, True), ("worse", 0.069, False), ("value", 0.02, True),
                               ("better", -0.03, True), ("better", -0.031, False)):  # fmt: skip
        threshold = Threshold(
            name="no worse", figure="heldout.bits_per_byte", most=limit + 1e-9, compared="baseline", end=end
        )
        found = gate.check(threshold, own, before)
        assert found["passed"] is passed, (end, limit)
        assert found["interval"] == pytest.approx([-0.03, 0.07])
    assert "the baseline's (1.020 - 1.000) is 0.020 (-0.030 to 0.070)" in found["reason"]
    assert "there is no baseline; name an evaluate" in gate.check(threshold, own, None)["reason"]
    assert "baseline: heldout was not measured" in gate.check(threshold, own, {})["reason"]


def test_numbers_and_what_is_none():
    number = Threshold(name="xz", figure="heldout.xz", most=2.0, end="value")
    assert gate.check(number, {"heldout": {"xz": 1.5}}, None)["passed"]
    assert "heldout.xz is nan" in gate.check(number, {"heldout": {"xz": math.nan}}, None)["reason"]
    assert "no single figure" in gate.check(number, {"heldout": {"xz": {"a": 1}}}, None)["reason"]
    worse = Threshold(name="one", figure="a", most=2.0)
    found = gate.check(worse, {"a": {"value": 1.0, "interval": None}}, None)
    assert not found["passed"]
    assert "without an interval" in found["reason"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"thresholds": []}, "thresholds: is empty; a gate that asks for nothing is none"),
        ({"thresholds": [{"name": "a", "figure": "b"}]}, "thresholds.0.least: give exactly one of least and most"),
        ({"thresholds": [{"name": "a", "figure": "b", "leest": 1}]}, "thresholds.0.leest: no such field; did you mean"),
        ({"threshold": []}, "holds no"),
        ([], "holds no"),
    ],
)
def test_wrong_files_of_thresholds_are_refused(tmp_path, values, problem):
    (tmp_path / "gate.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=problem):
        gate.read(str(tmp_path / "gate.json"))
    with pytest.raises(UserError, match="gate: no such file"):
        gate.read(str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="decayed_share"):
        GateConfig(thresholds=(Threshold(name="a", figure="b", most=1),), decayed_share=0)


def test_the_verdict_goes_into_the_manifest_and_changes_nothing_else(tmp_path):
    (tmp_path / "file").write_text("x")
    made = manifest.write(tmp_path, "model", contents=["file"], inputs={"a": "1"}, config={"b": 2}, facts={"c": 3})
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"of a later version": 1}))
    (tmp_path / "results.json").write_text("{}")
    for passed in (True, False):
        verdict = {"passed": passed, "reasons": [], "checks": []}
        read_from = {"thresholds": gate.DEFAULT, "results": tmp_path / "results.json"}
        kept = gate.record(tmp_path, verdict, read_from)
        found = manifest.read(tmp_path)
        manifest.verify(tmp_path, found)
        assert found.hash == made.hash
        assert found.facts == {"c": 3, "gate": kept}
        assert kept["passed"] is passed
        assert kept["thresholds"]["sha256"]
        now = json.loads((tmp_path / "manifest.json").read_text())
        assert {key: value for key, value in now.items() if key != "facts"} == {
            key: value for key, value in values.items() if key != "facts"
        } | {"of a later version": 1}


def test_a_task_whose_name_has_a_dot_is_found_and_a_typing_error_is_told():
    results = {"tasks": {"arc.v1.2": {"accuracy": {"value": 0.5, "interval": [0.4, 0.6]}}, "arc": {"n": 3}}}
    assert gate.figure_at(results, "tasks.arc.v1.2.accuracy") == (results["tasks"]["arc.v1.2"]["accuracy"], "")
    assert gate.figure_at(results, "tasks.arc.n") == ({"value": 3.0, "interval": None}, "")
    assert gate.figure_at(results, "tasks.arc.v1.2.acuracy") == (
        None,
        "tasks.arc.v1.2.acuracy was not measured; did you mean 'accuracy'?",
    )
    assert gate.figure_at(results, "task.arc.n")[1] == "task was not measured; did you mean 'tasks'?"
    assert gate.figure_at({}, "safety.refusal")[1] == "safety was not measured"
    assert gate.figure_at(results, "ratings")[1] == "ratings was not measured"


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_that_is_no_number_is_refused(limit):
    with pytest.raises(ConfigError, match="^most: got .*; a finite number is needed"):
        Threshold(name="a", figure="b", most=limit)
