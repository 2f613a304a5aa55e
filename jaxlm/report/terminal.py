"""What stages say at their end, as tables in the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from jaxlm.base import logging


def show_run(title: str, summaries: Mapping[str, Mapping[str, Any]], samples: Mapping[str, str]) -> None:
    """The table of stages, then three prompts with what the model of each of `samples` (name → folder) made of them."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("result")
    for name, summary in summaries.items():
        rate = summary.get("tokens_per_second")
        table.add_row(name, f"{summary['seconds']:.1f} s", f"{rate:,.0f}" if rate else "", summary["figure"])
    logging.console.print(table)
    said = {
        name: [json.loads(line) for line in (Path(folder) / "completions.jsonl").read_text("utf-8").splitlines()[:3]]
        for name, folder in samples.items()
    }
    for number in range(max(map(len, said.values()), default=0)):
        for name, records in said.items():
            # A text goes on where its prompt ends; beside others, each stands after its stage's name.
            label, gap = (f"{name}: ", " ") if len(said) > 1 else ("", "")
            for record in records[number : number + 1]:
                logging.console.print(label, style="dim", end="", markup=False)
                logging.console.print(record["prompt"], style="bold", end=gap, markup=False, emoji=False)
                logging.console.print(record["text"], style="cyan", markup=False, emoji=False)
        logging.console.print()


def show_best_of(curve: Sequence[Mapping[str, Any]]) -> None:
    """What the best of n answers scores, and the most KL that taking it can cost."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="the best of n answers")
    for name in ("n", "mean score", "KL, at most"):
        table.add_column(name, justify="right")
    for line in curve:
        table.add_row(str(line["n"]), f"{line['score']:.4f}", f"{line['kl_bound']:.3f} nats")
    logging.console.print(table)
