"""Reward against √KL: what the policy gains for the way that it goes, and whether the gold score comes along."""

import json
import math
from typing import Any

from etils import epath

from jaxlm.base.logging import logger


def frontier(workdir: str) -> list[dict[str, Any]]:
    """{"step", "root_kl", "reward", "gold"?} of each logged rollout, in order."""
    points = []
    for line in (epath.Path(workdir) / "metrics.jsonl").read_text("utf-8").splitlines():
        values = json.loads(line)
        if values.get("rl/kl") is None or values.get("rl/reward") is None:
            continue
        # Of few answers, the estimate of a small KL can be below 0.
        point = {"step": values["step"], "root_kl": math.sqrt(max(values["rl/kl"], 0.0)), "reward": values["rl/reward"]}
        points.append(point | ({"gold": values["rl/gold"]} if values.get("rl/gold") is not None else {}))
    return points


def draw_frontier(workdir: str) -> None:
    """WORKDIR/reward_kl.png. (The form of arXiv:2210.10760, where gold falls while the reward still rises.)"""
    import matplotlib.figure

    points = frontier(workdir)
    if not points:
        return
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    root_kl = [point["root_kl"] for point in points]
    lines = axes.plot(root_kl, [point["reward"] for point in points], "o-", ms=3, lw=0.5, color="#1f6fb4")
    axes.set(xlabel="√KL to the reference (√nats an answer)", ylabel="reward, trained on")
    axes.grid(alpha=0.25)
    golden = [point for point in points if "gold" in point]
    if golden:
        right = axes.twinx()
        at, gold = ([point[name] for point in golden] for name in ("root_kl", "gold"))
        lines += right.plot(at, gold, "s-", ms=3, lw=0.5, color="#b8860b")
        right.set_ylabel("gold score, measured only")
    # Above the axes: curves go wherever they like.
    names = ["reward", "gold, measured only"][: len(lines)]
    figure.legend(lines, names, loc="outside upper center", ncols=2, frameon=False)
    with (epath.Path(workdir) / "reward_kl.png").open("wb") as file:
        figure.savefig(file, dpi=150, format="png")
    logger.info("reward against KL: %s/reward_kl.png", workdir)
