"""Where the wall time of a run went, over all its starts: every line of metrics has the sums so far.

    {"time/start_seconds": 41.2, "time/compile_seconds": 30.1, "time/step_seconds": 9120.4, "time/data_seconds": 2.0,
     "time/save_seconds": 60.0, "time/eval_seconds": 301.5, "time/lost_seconds": 77.0, "train/goodput": 0.941}

Steps that a restart took again are lost: their time is that between the line of metrics at the restored step and the
last one that was written. What is missing from the sum is the time between two starts, and what a killed run did after
its last line. WORKDIR/time.json keeps the sums while a restart cuts the lines that had them.
"""

import time
from pathlib import Path

import jax

from jaxlm.base import files
from jaxlm.train.metrics_writer import whole_lines
from jaxlm.train.watchdog import Watchdog


class Ledger:
    def __init__(self, workdir: str, step: int, watchdog: Watchdog):
        """To be made before the metrics are cut back to `step` (-1: of a new run)."""
        self.watchdog, self.data_seconds = watchdog, 0.0
        self.began, self.before = time.time() - sum(watchdog.seconds().values()), {}
        if jax.process_index() != 0:
            return
        path = Path(workdir) / "time.json"
        kept = files.read_json(path) if path.exists() and step >= 0 else {}
        self.began = kept.get("began", self.began)
        lines = [line for line in whole_lines(Path(workdir) / "metrics.jsonl") if "time/step_seconds" in line]
        sums = [{name: x for name, x in line.items() if name.startswith("time/")} for line in (kept, *lines)]
        self.before = max(sums, key=lambda each: sum(each.values())) if step >= 0 else {}
        if lines and lines[-1]["step"] > step >= 0:
            kept_seconds = max((x["time/step_seconds"] for x in lines if x["step"] <= step), default=0.0)
            lost = self.before.get("time/lost_seconds", 0.0) + lines[-1]["time/step_seconds"] - kept_seconds
            self.before["time/lost_seconds"] = lost
        files.write_json(path, {"began": self.began} | self.before)

    def values(self) -> dict[str, float]:
        """The sums so far, and the share of the time since the first start that went into steps that stayed."""
        now = {f"time/{phase}_seconds": seconds for phase, seconds in self.watchdog.seconds().items()}
        now |= {"time/data_seconds": self.data_seconds, "time/lost_seconds": 0.0}
        now["time/step_seconds"] -= self.data_seconds
        sums = {name: seconds + self.before.get(name, 0.0) for name, seconds in now.items()}
        good = sums["time/step_seconds"] - sums["time/lost_seconds"]
        return sums | {"train/goodput": max(good, 0.0) / max(time.time() - self.began, 1e-9)}
