"""The release gate by example: two tasks, a file of thresholds, and the demo's GRPO policy beside its assistant.

    python -m jaxlm run --config=configs/evaluate.py --workdir=runs/gate            # after make demo
    python -m jaxlm run --config=configs/evaluate.py --workdir=runs/refused \\
        --config.stages.verdict.model=runs/demo/sft                                  # refused: exit code 3
    python -m jaxlm export --model=runs/demo/grpo --output=exported                 # goes: it has passed

Tasks and thresholds are the files of configs/gate/: copy that folder and this file, and put yours in their place
(docs/recipes.md). functions: what 40 functions do that no chat, ranking or task of the demo was about, by likelihood of
four answers; modules: an open-book question about each, answered in one of four forms.
Hardware: any; on two CPU cores 5 s. Result: modules 0.200 before GRPO, 0.925 (0.801 to 0.974) after it, functions 0.350
and 0.375 (chance 0.25): it passes.
"""

from pathlib import Path

from jaxlm.evaluate.config import EvaluateConfig
from jaxlm.stages.config import RunConfig

GATE = Path(__file__).parent / "gate"
TASKS = (str(GATE / "functions.json"), str(GATE / "modules.json"))


def get_config() -> RunConfig:
    return RunConfig(
        stages=(
            EvaluateConfig(name="before", model="runs/demo/sft", tasks=TASKS),
            EvaluateConfig(
                name="verdict",
                model="runs/demo/grpo",
                tasks=TASKS,
                baseline="@before",
                gate=str(GATE / "thresholds.json"),
            ),
        )
    )
