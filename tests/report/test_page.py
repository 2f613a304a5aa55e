import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import pytest

from jaxlm.__main__ import config_class
from jaxlm.base import config as configs
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import VerifierConfig
from jaxlm.preference.config import DPOConfig, PreferenceConfig
from jaxlm.report import charts, page, sections, tables
from jaxlm.report.charts import Curve
from jaxlm.reward.config import RankingSource
from jaxlm.rl.config import GRPOConfig, RLConfig
from jaxlm.train.config import OptimizerConfig, ScheduleConfig


@pytest.fixture
def policy(tmp_path):
    """A folder as rl leaves it when it was stopped after 30 rollouts."""
    folder = tmp_path / "policy <1>"
    folder.mkdir()
    source = ChatSource(name="mine", path="prompts.jsonl")
    made = RLConfig(
        model="runs/sft",
        sources=(source,),
        verifiers=(VerifierConfig(kind="exact"),),
        grpo=GRPOConfig(clip=0.3),
        samples=4,
    )
    (folder / "config.json").write_text(json.dumps({"config": configs.to_dict(made)}))
    lines = [
        {"step": n, "time": 100.0 + 2 * n, "tokens": n, "rl/reward": n / 30, "rl/kl": n / 10, "rl/gold": 0.5}
        | {"train/loss": None if n == 7 else 1.0, "nonfinite": ["train/loss"], "train/step_seconds": 1.5}
        | {"train/tokens_per_second": 100.0 * n, "train/skipped_steps": 1.0, "train/goodput": 0.6}
        | {f"time/{part}_seconds": 2.0 * n for part in ("start", "compile", "data", "save", "eval", "lost")}
        | {"time/step_seconds": 20.0 * n}
        for n in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [{"step": n, "prompt": f"<b>{n}</b>?", "answer": "y" * n, "reward": 0.5} for n in range(1, 31)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in said))
    return folder


def text_of(folder) -> str:
    return page.write(folder, config_class).read_text("utf-8")


def test_a_page_needs_nothing_beside_it(policy):
    text = text_of(policy)
    assert not re.search(r"(?:src|href)=(?!\"#)|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert "<b>1</b>" not in text, "answers are text, not markup"
    assert "&lt;b&gt;1&lt;/b&gt;?" in text
    assert "<h1>policy &lt;1&gt;</h1>" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


def test_a_stopped_run_is_shown_as_far_as_it_came(policy):
    text = text_of(policy)
    assert "unfinished" in text
    for title in ("Reward against √KL", "Curves", "Throughput", "Samples", "Config"):
        assert title in text
    # 600 s of steps, of which 60 were taken again, are 60 % of 900 s.
    for share in ("60.0% (540.0 s)", "6.7% (60.0 s)", "900.0 s"):
        assert share in text
    assert text_of(policy) == text, "the same folder, the same page"


def test_what_differs_from_the_defaults_is_said(policy):
    made = configs.from_dict(RLConfig, json.loads((policy / "config.json").read_text())["config"])
    changed = {field: (value, default) for field, value, default in sections.changed(made)}
    assert changed["grpo.clip"] == (0.3, 0.2)
    assert changed["model"] == ("runs/sft", "")
    assert changed["sources.0.path"] == ("prompts.jsonl", "")
    assert changed["verifiers.0.kind"][0] == "exact"
    assert not {"prompts", "grpo.baseline", "sources.0.split", "workdir"} & {*changed}


def test_the_defaults_are_the_stages_own():
    """Preference trains without weight decay and with a linear schedule, unlike the classes that hold these fields."""
    sources = (RankingSource(name="a", path="b"),)
    made = PreferenceConfig(model="m", sources=sources, dpo=DPOConfig())
    assert not [field for field, *_ in sections.changed(made) if field.startswith(("optimizer", "schedule"))]
    other = dataclasses.replace(made, optimizer=OptimizerConfig(), schedule=ScheduleConfig(peak=1e-6))
    changed = {field: (value, default) for field, value, default in sections.changed(other)}
    assert changed["optimizer.weight_decay"] == (OptimizerConfig().weight_decay, 0.0)
    assert changed["schedule.kind"] == ("cosine", "linear")


def test_a_config_of_another_version_is_shown_whole(policy):
    kept = json.loads((policy / "config.json").read_text())
    kept["config"]["no_such_field"] = 7
    (policy / "config.json").write_text(json.dumps(kept))
    assert "no_such_field: no such field" in text_of(policy)


def test_samples_are_of_the_first_the_middle_and_the_last_rollouts(policy):
    shown = [int(n) for n in re.findall(r"&lt;b&gt;(\d+)&lt;/b&gt;", text_of(policy))]
    assert shown == [*range(1, 9), *range(12, 20), *range(23, 31)]


def test_a_whole_run_has_a_table_and_every_stage_that_has_begun(tmp_path, policy):
    names = {policy.name: "rl", "begun": "sample", "later": "sample"}
    config = {"stage": "run", "stages": [{"stage": stage, "name": name} for name, stage in names.items()]}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    summary = {"seconds": 61.25, "tokens_per_second": 1234.5, "figure": "reward 1 held out"}
    manifest = {"created": "2026-01-02T03:04:05Z", "commit": "0" * 40 + "+changes", "versions": {"jax": "0.10.2"}}
    manifest["facts"] = {"stages": {policy.name: summary}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(tmp_path)
    assert "finished 2026-01-02T03:04:05Z · commit 000000000000+changes" in text
    assert "61.2 s" in text
    assert "1,234" in text
    assert '<h2 id="policy &lt;1&gt;">' in text
    assert '<h2 id="begun">' in text
    assert "later" not in text


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0], [float("nan"), 1.0], [1e-9, 2e-9], [-5e7, 5e7]])
def test_a_chart_of_any_values_can_be_drawn(values):
    drawn = charts.lines("a < b", {"": Curve(range(len(values)), values)})
    root = ET.fromstring(drawn)
    points = [float(n) for n in re.findall(r"[\d.]+", root.find("polyline").get("points") or "")]
    assert all(0 <= n <= charts.WIDTH for n in points)
    assert len(points) == 2 * sum(value == value for value in values)


def test_a_chart_puts_points_where_they_belong():
    root = ET.fromstring(charts.lines("t", {"a": Curve([0, 1], [0.0, 10.0]), "b": Curve([0], [5.0])}))
    (left, low), (right, high) = (map(float, pair.split(",")) for pair in root.find("polyline").get("points").split())
    assert (left, right) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert low > high, "up is more"
    middle = [c for c in root.iter("circle") if "b 0: 5" in c.find("title").text]
    assert float(middle[0].get("cy")) == pytest.approx((low + high) / 2)
    assert [t.text for t in root.iter("text") if t.text in ("0", "5", "10")] != []


def test_long_curves_are_means_of_their_stretches():
    xs, ys = charts.thinned(Curve(range(1000), [float(n % 4) for n in range(1000)]))
    assert len(xs) == 250
    assert {*ys} == {1.5}
    assert xs[-1] == 999


def test_histograms_are_shares_of_their_group():
    drawn = charts.histogram("lengths", {"a": [0, 0, 24, 24], "b": [12]}, x="n")
    assert len(ET.fromstring(drawn).findall("polyline")) == 2
    assert charts.ticks(0, 0.03, 3) == [0, 0.01, 0.02, 0.03]


def test_records_alike_become_a_table_and_figures_keep_their_interval():
    record = {"sources": {n: {"documents": i, "bytes": 2000} for i, n in enumerate("abc")}, "n": {"x": 1}}
    record["loss"] = {"value": 1.5, "interval": [1.0, 2.0]}
    flat = tables.flatten(record)
    assert {*flat} == {"sources", "n.x", "loss"}
    drawn = tables.record_rows(record)
    assert "<summary>sources, 3</summary>" in drawn
    assert "1.5 (1 to 2)" in drawn
    assert tables.shown("<i>" * 100).endswith(" …")
    assert "&lt;i&gt;" in tables.table(["x"], [["<i>"]])


def share(correct: int, total: int) -> dict:
    return {"correct": correct, "total": total, "share": correct / total, "low": 0.5, "high": 1.0}


def test_a_reward_model_shows_its_accuracy_and_calibration(policy):
    report = {
        "accuracy": share(9, 10),
        "accuracy_by": {"ranked": {"2": share(4, 5), "3": share(5, 5)}, "kind": {"<cut>": share(9, 10)}},
        "calibration": [
            {"low": 0.5, "high": 0.75, "predicted": 0.6, "observed": share(3, 4)},
            {"low": 0.75, "high": 1.0, "predicted": None, "observed": share(0, 1) | {"total": 0}},
        ],
        "calibration_error": 0.15,
        "length_correlation": {
            "overall": {"pearson": 0.25, "spearman": None},
            "helpful": {"pearson": 0.5, "spearman": 0.5},
        },
    }
    (policy / "report.json").write_text(json.dumps(report))
    text = text_of(policy)
    for said in ("90.0%", "50.0% to 100.0%", "kind: &lt;cut&gt;", "calibration error 0.150", "0.500"):
        assert said in text
    assert "0.250" not in text, "a correlation that is not defined is left out"


def test_what_prepare_dropped_and_how_long_documents_are(policy):
    counted = {"read": 5, "kept": 3, "bad": 1, "dropped": {}}
    examples = {"too_short": [{"where": "f:1", "text": "<x>"}]}
    sources = {"mine": counted | {"dropped": {"too_short": 1}, "examples": examples}, "other": counted}
    (policy / "report.json").write_text(json.dumps({"sources": sources}))
    facts = {"train": {"documents": 3, "lengths": {"16": 1, "32": 2}}, "summary": {"seconds": 1.0, "figure": "3 rows"}}
    (policy / "manifest.json").write_text(json.dumps({"created": "2026", "facts": facts}))
    text = text_of(policy)
    assert "too_short" in text
    assert "&lt;x&gt;" in text
    assert "train: documents of up to so many tokens" in text
    assert "32: 2 (2 to 2)" in text


def test_the_gate_names_its_reasons(policy):
    checks = [{"name": "safe", "passed": False, "reason": "safety.refusal is 0.300"}]
    (policy / "gate.json").write_text(json.dumps({"passed": False, "reasons": ["safe: …"], "checks": checks}))
    text = text_of(policy)
    assert '<p class="bad">refused</p>' in text
    assert ">refused by the gate" in text
    assert "safety.refusal is 0.300" in text


def test_results_are_figures_with_intervals_counts_and_what_is_missing(policy):
    results = {
        "heldout": {"documents": 7, "bits_per_byte": {"value": 1.5, "interval": [1.25, 1.75], "n": 7}},
        "safety": {"refusal": {"value": 0.5, "interval": [0.25, 0.75], "n": 40, "by_language": {"ru": 0.5}}},
        "ratings": {"no_evidence": "no <records>"},
    }
    (policy / "results.json").write_text(json.dumps(results))
    text = text_of(policy)
    assert "1.5 (1.25 to 1.75)" in text
    assert 'style="left:25.0%;width:50.0%"' in text
    assert text.count('class="scale"') == 1, "bits a byte are no share"
    for said in ("no &lt;records&gt;", "safety.refusal.by_language.ru", "heldout.documents"):
        assert said in text


def test_an_evaluations_examples_are_shown(policy):
    (policy / "examples").mkdir()
    fields = {"answer": "x", "logprobs": [-1.23456789, -2.0], "choices": ["one", "two"], "correct": 0.5}
    lines = [{"where": f"/mnt/data/a.jsonl:{n}", "prompt": f"<{n}>?"} | fields for n in range(30)]
    (policy / "examples/task-sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = text_of(policy)
    assert "task-sums: 12 of 30" in text
    assert "&lt;11&gt;?" in text
    assert "&lt;12&gt;?" not in text
    for said in (">a.jsonl:3<", "-1.235\n-2<", ">one\ntwo<"):
        assert said in text


def test_what_a_stage_read_and_packed_itself_is_shown(policy):
    (policy / "rows").mkdir()
    source = {"read": 40, "kept": 39, "bad": 0, "dropped": {"is_held_out": 1}}
    (policy / "rows/report.json").write_text(json.dumps({"sources": {"chats": source}}))
    facts = {"train": {"documents": 39, "rows": 7, "tokens": 700, "padding_share": 0.125}, "row_length": 128}
    (policy / "rows/manifest.json").write_text(json.dumps({"facts": facts}))
    packed = {"train": {"prompts": 20, "pairs": 55, "batches": 4, "tokens": 900, "padding_share": 0.25}}
    ranked = {"sources": {"people": source | {"dropped": {"duplicate_record": 1}}}, "packing": packed}
    (policy / "data.json").write_text(json.dumps(ranked))
    text = text_of(policy)
    for said in ("is_held_out", "duplicate_record", "rows, train", "rankings, train", "padding share", "0.125", "55"):
        assert said in text


def test_an_unfinished_run_has_versions_and_inputs(policy):
    (policy / "inputs.json").write_text(json.dumps({"runs/sft/model": "0123abcd"}))
    text = text_of(policy)
    assert "unfinished" in text
    assert "python 3." in text
    assert "0123abcd" in text
