"""What a model was made from: by its manifests, also where all of it was moved."""

import json

from jaxlm.base import files, manifest
from jaxlm.evaluate import lineage


def made(folder, stage, inputs=(), **config):
    """A model directory without parameters."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": folder.parent.name} | config))
    read_from = {str(path): manifest.read(path).hash for path in inputs}
    manifest.write(folder, "model", contents=["config.json"], inputs=read_from, config={"stage": stage}, facts={})
    return folder


def names(family):
    return [ancestor.folder.parent.name for ancestor in family]


def test_ancestors_nearest_first_without_reward_models(tmp_path):
    run = tmp_path / "run"
    base = made(run / "base" / "model", "pretrain")
    assistant = made(run / "sft" / "model", "sft", [base])
    reward = made(run / "reward" / "model", "reward", [assistant], criteria=["overall"])
    policy = made(run / "ppo" / "model", "rl", [assistant, reward])
    made(run / "later" / "model", "sft", [policy])
    hashes = {manifest.read(assistant).hash, manifest.read(reward).hash}
    (run / "base" / "metrics.jsonl").write_text('{"step": 1, "eval/bits_per_byte": 2.0}\n')
    (run / "ppo" / "metrics.jsonl").write_text('{"step": 1, "eval/reward": 2.0}\n')
    run.rename(tmp_path / "moved")
    family = list(lineage.ancestors(tmp_path / "moved" / "later" / "model"))
    assert names(family) == ["later", "ppo", "sft", "base"]
    assert lineage.optimised_for(family) == hashes
    assert lineage.optimised_for(family[2:]) == set()
    assert lineage.curve_path(family, "") == tmp_path / "moved" / "base" / "metrics.jsonl"
    assert lineage.curve_path(family[:2], "") is None


def test_another_model_of_that_name_is_no_ancestor(tmp_path):
    base = made(tmp_path / "base" / "model", "pretrain")
    assistant = made(tmp_path / "sft" / "model", "sft", [base])
    (tmp_path / "base").rename(tmp_path / "old")
    made(tmp_path / "base" / "model", "pretrain", other=True)
    assert names(lineage.ancestors(assistant)) == ["sft"]
    assert len(manifest.read(assistant).inputs) == 1


def test_chats_that_a_reward_model_chose_are_optimised_for_it(tmp_path):
    """Best-of-n and rejection sampling optimise too: what is tuned on the chosen chats is no evidence for the judge."""
    run = tmp_path / "run"
    base = made(run / "base" / "model", "sft")
    reward = made(run / "reward" / "model", "reward", [base], criteria=["overall"])
    chosen = run / "select"
    chosen.mkdir()
    (chosen / "chats.jsonl").write_text("{}\n")
    digest = manifest.read(reward).hash
    manifest.write(chosen, "chats", contents=["chats.jsonl"], inputs={str(reward): digest}, config={}, facts={})
    tuned = run / "best" / "model"
    tuned.mkdir(parents=True)
    (tuned / "config.json").write_text("{}")
    read_from = {str(base): manifest.read(base).hash, str(chosen / "chats.jsonl"): files.sha256(chosen / "chats.jsonl")}
    manifest.write(tuned, "model", contents=["config.json"], inputs=read_from, config={"stage": "sft"}, facts={})
    assert lineage.optimised_for(list(lineage.ancestors(tuned))) == {digest}
    assert lineage.optimised_for(list(lineage.ancestors(base))) == set()
    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "best" / "model"
    assert lineage.optimised_for(list(lineage.ancestors(moved))) == {digest}
    # Other chats that lie there now are not those that were read.
    (tmp_path / "moved" / "select" / "manifest.json").unlink()
    assert lineage.optimised_for(list(lineage.ancestors(moved))) == set()
