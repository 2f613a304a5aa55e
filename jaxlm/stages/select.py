"""Selecting: a model's several answers to each prompt, and what scores them → the best, as chats to train on.

    python -m jaxlm run --config=configs/best_of_n.py --workdir=runs/best              # sample, select, sft

Best-of-n keeps each prompt's best answer, rejection sampling (keep="above") all from a threshold on. Answers that were
cut off are not kept: `sft` would teach an end that the model did not write. Results: WORKDIR/chats.jsonl, which is a
source of `sft` as it is,

    {"messages": […], "score": 1.25, "sample": 3, "prompt_id": 7}

and report.json: how many were kept and why the others were not, and the mean score of the best of 1, 2, 4, … answers
beside the most KL that taking it can cost. Time: one forward pass of the reward model an answer.
"""

import json
import math
import time
from typing import Any

import jax
from etils import epath

from jaxlm.base import config as configs
from jaxlm.base import files, manifest, sharding
from jaxlm.base.errors import UserError
from jaxlm.hub.find import find_model
from jaxlm.hub.language_model import LanguageModel, load
from jaxlm.report import terminal
from jaxlm.rl.config import SelectConfig
from jaxlm.rl.models import check_reward_model
from jaxlm.rl.selection import answered, curve, groups, scores_of, select
from jaxlm.train import model_directory

Config = SelectConfig


def validate(config: SelectConfig, device_count: int) -> None:
    """Raises ConfigError for a mesh that does not divide the devices."""
    config.mesh.sizes(device_count)


def inputs(config: SelectConfig) -> dict[str, str]:
    """What the stage reads → a hash of each."""
    read = {config.samples: manifest.read(config.samples, "samples", "samples").hash}
    if config.reward_model:
        found = find_model(config.reward_model, "reward_model")
        read[str(found)] = manifest.read(found).hash
    return read


def main(config: SelectConfig) -> dict[str, Any]:
    """Writes WORKDIR/chats.jsonl and report.json, prints the curve."""
    began = time.monotonic()
    validate(config, jax.device_count())
    workdir = epath.Path(config.workdir)
    files.clear(workdir, ("manifest.json", "chats.jsonl", "report.json"))
    read_from = inputs(config)
    drawn = manifest.read(config.samples, "samples")
    manifest.verify(config.samples, drawn)
    if not drawn.facts.get("chat_template_hash"):
        raise UserError(f"samples: {config.samples} was not drawn as a chat's answers; sample with chat=True")
    where = f"{config.samples}/completions.jsonl"
    asked = groups([json.loads(line) for line in epath.Path(where).read_text("utf-8").split("\n") if line], where)
    scores = scores_of(config, asked, judge_of(config, drawn))
    kept = select(asked, scores, config.keep, config.threshold or 0.0)
    if not kept.chosen:
        raise UserError(
            f"{'threshold' if config.keep == 'above' else 'samples'}: no answer is left of {len(asked)} prompts' "
            f"{len(asked[0])} each; {kept.cut_off} were cut off, the best score is {max(map(max, scores)):g}"
        )
    lines = []
    for prompt, index in kept.chosen:
        answer = asked[prompt][index]
        record = {"messages": answered(answer), "score": round(scores[prompt][index], 6)}
        lines.append(json.dumps(record | {name: answer[name] for name in ("sample", "prompt_id")}, ensure_ascii=False))
    files.write_bytes(workdir / "chats.jsonl", ("\n".join(lines) + "\n").encode())
    report = {
        "prompts": len(asked),
        "answers_a_prompt": len(asked[0]),
        "cut_off": kept.cut_off,
        "repeated": kept.repeated,
        "kept": len(kept.chosen),
        "prompts_with_none_kept": len(asked) - len({prompt for prompt, _ in kept.chosen}),
        "mean_score_of_kept": math.fsum(scores[p][i] for p, i in kept.chosen) / len(kept.chosen),
        "best_of": curve(scores),
    }
    files.write_json(workdir / "report.json", report)
    terminal.show_best_of(report["best_of"])
    summary = {
        "seconds": round(time.monotonic() - began, 2),
        "figure": f"{report['kept']} answers kept, score {report['mean_score_of_kept']:.3f} "
        f"(one drawn: {report['best_of'][0]['score']:.3f})",
    }
    made_with: Any = dict(inputs=read_from, config=configs.identity(config), facts=report | {"summary": summary})
    manifest.write(workdir, "chats", contents=["chats.jsonl", "report.json"], **made_with)
    return summary


def judge_of(config: SelectConfig, drawn: manifest.Manifest) -> LanguageModel | None:
    """The reward model, if one is asked; it has to read text as the model that answered does."""
    if not config.reward_model:
        return None
    found = find_model(config.reward_model, "reward_model")
    check_reward_model(
        model_directory.read(found, verify=False),
        [criterion.name for criterion in config.criteria],
        tokenizer=drawn.facts["tokenizer_hash"],
        template=drawn.facts["chat_template_hash"],
        whose="that of the model that answered",
    )
    return load(found, mesh=sharding.make_mesh(config.mesh))
