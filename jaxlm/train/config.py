"""Configs of the training machinery; standard library only."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and which saves stay."""

    runtime_fields: ClassVar[tuple[str, ...]] = (
        "every_steps",
        "keep_last",
        "keep_best",
        "best",
        "keep_every_steps",
        "max_failed_saves",
        "timeout_seconds",
    )

    every_steps: int = 500
    """Steps between two saves; the last step is saved always."""
    keep_last: int = 2
    """How many of the newest whole checkpoints stay. Two, so that a damaged newest one does not end the run."""
    keep_best: int = 1
    """How many checkpoints with the best metric stay besides; 0 for none."""
    best: Literal["lowest", "highest"] = "lowest"
    """Which values of the metric are good."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this step stay for good; 0 for none."""
    max_failed_saves: int = 3
    """So many failed saves in a row (a full disk, say) end the run; fewer are warned about."""
    timeout_seconds: int = 900
    """A save that takes longer than this to reach the disk has failed."""

    def __post_init__(self):
        for field in ("every_steps", "keep_last", "max_failed_saves", "timeout_seconds"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; at least 1 is needed")
        for field in ("keep_best", "keep_every_steps"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 (none) or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long each phase of a run may take before it counts as hung; 0 for no limit."""

    runtime_fields: ClassVar[tuple[str, ...]] = (
        "start_seconds",
        "compile_seconds",
        "step_seconds",
        "save_seconds",
        "eval_seconds",
    )

    start_seconds: float = 1800.0
    """From the start of the stage to the first compilation: data, restoring a checkpoint."""
    compile_seconds: float = 3600.0
    """Compiling a step."""
    step_seconds: float = 600.0
    """One training step, waiting for its data included."""
    save_seconds: float = 1800.0
    """The part of a save that the loop waits for, above `checkpoint.timeout_seconds`, which it may wait out; and
    writing the model at the end."""
    eval_seconds: float = 3600.0
    """One evaluation."""

    def __post_init__(self):
        for field in self.runtime_fields:
            value = getattr(self, field)
            check(value >= 0, field, f"got {value}; seconds, or 0 for no limit, are needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which rule updates the weights; the learning rate is the schedule's."""

    kind: Literal["adamw", "muon", "soap", "lion", "adafactor", "sgd"] = "adamw"
    """muon orthogonalises the momentum of the inner matrices, soap is Adam in an eigenbasis of their gradients
    (arXiv:2409.11321): embeddings, head and norms go to AdamW. lion (arXiv:2302.06675: a third to a tenth of AdamW's
    learning rate), adafactor (arXiv:1804.04235, section 4: of a matrix's second moment, rows and columns are kept; no
    first moment; the learning rate is the schedule's) and sgd are used for every weight."""
    b1: float = 0.9
    """Decay of the first moment of AdamW and SOAP, and of what Lion takes the sign of."""
    b2: float = 0.95
    """Decay of the second moment of AdamW and SOAP; 0.95 forgets a bad batch ten times sooner than 0.999."""
    epsilon: float = 1e-8
    """Added to the root of that second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate; norms have none."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum (Nesterov)."""
    lion_momentum: float = 0.99
    """Decay of Lion's momentum."""
    sgd_momentum: float = 0.9
    """Decay of SGD's sum of gradients; 0: the gradient itself."""
    soap_refresh_steps: int = 10
    """Steps between two turns of SOAP's eigenbases."""
    soap_largest_side: int = 4096
    """A longer side of a matrix keeps its own basis: that of a side of 4096 takes 2 x 64 MiB a layer."""
    embedding_rate: float = 1.0
    """Learning rate of an untied embedding over that of the rest: its rows have unit size at any width, and most
    batches have nothing for most of them (arXiv:2203.03466, table 3, has it constant where others fall with width)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    ema: float = 0.0
    """Decay of the running average of the parameters; 0: none is kept."""
    spike_limit: float = 0.0
    """Skips a step whose loss or gradient norm lies above median + so many median absolute deviations of the last good
    steps, such as 20; 0: only those that are not finite. `loop.max_skipped_steps` in a row end the run."""
    spike_window: int = 128
    """How many good steps that looks back on; before there are so many, no step is a spike."""

    def __post_init__(self):
        for field in ("b1", "b2", "muon_momentum", "lion_momentum", "sgd_momentum", "ema"):
            value = getattr(self, field)
            check(0 <= value < 1, field, f"got {value}; a decay in [0, 1) is needed")
        check(self.embedding_rate > 0, "embedding_rate", f"got {self.embedding_rate}; a positive factor is needed")
        check(self.epsilon > 0, "epsilon", f"got {self.epsilon}; a positive number is needed")
        check(self.spike_limit >= 0, "spike_limit", f"got {self.spike_limit}; 0 (off) or a positive number is needed")
        for field in ("soap_refresh_steps", "soap_largest_side", "spike_window"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        check(self.weight_decay >= 0, "weight_decay", f"got {self.weight_decay}; 0 or more is needed")
        check(self.clip_norm >= 0, "clip_norm", f"got {self.clip_norm}; 0 (none) or a positive norm is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then one of three ways down."""

    kind: Literal["cosine", "wsd", "linear"] = "cosine"
    """cosine or linear to the final share; wsd stays at the peak and falls linearly over the last part."""
    peak: float = 0.0
    """The highest learning rate; 0 derives it from the depth."""
    warmup_steps: int = 100
    """Steps from 0 to the peak."""
    decay_share: float = 0.2
    """wsd: the last share of the steps, in which the rate falls."""
    final_share: float = 0.1
    """The rate at the last step over the peak."""

    def __post_init__(self):
        check(0 <= self.peak < math.inf, "peak", f"got {self.peak}; a positive rate, or 0 to derive it, is needed")
        check(self.warmup_steps >= 0, "warmup_steps", f"got {self.warmup_steps}; 0 or more is needed")
        check(0 < self.decay_share <= 1, "decay_share", f"got {self.decay_share}; a share in (0, 1] is needed")
        check(0 <= self.final_share <= 1, "final_share", f"got {self.final_share}; a share in [0, 1] is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """When the error has stopped falling: of the last `evaluations` held-out figures, the best is not below the best
    before them by `least_improvement` of it."""

    evaluations: int = 0
    """How many evaluations the rule looks back on; 0: never stop early."""
    least_improvement: float = 0.002
    """The relative fall that counts as falling."""

    def __post_init__(self):
        check(self.evaluations >= 0, "evaluations", f"got {self.evaluations}; 0 (off) or more is needed")
        check(0 <= self.least_improvement < 1, "least_improvement", f"got {self.least_improvement}; [0, 1) is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often the loop logs, evaluates, saves and looks inside; nothing here changes the trained numbers."""

    log_every_steps: int = 10
    """A line of metrics every so many steps."""
    evaluate_every_steps: int = 250
    """Held-out figures every so many steps, and at the end."""
    max_skipped_steps: int = 50
    """So many steps in a row whose loss or gradient is not finite, or a spike, end the run; fewer are skipped."""
    black_boxes: int = 3
    """The first so many bad steps are kept whole in WORKDIR/blackbox/STEP, for tools/replay.py; 0: none."""
    deterministic: bool = False
    """The same bits on every rerun on a GPU too, where sums are otherwise taken in any order: slower there, and nothing
    new elsewhere."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of a profiler trace into tensorboard/."""
    stop_at_step: int = 0
    """Save and end before the last step of the schedule; the same command goes on from there. 0: at the last."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Hangs."""

    def __post_init__(self):
        check(self.log_every_steps > 0, "log_every_steps", f"got {self.log_every_steps}; 1 or more is needed")
        check(self.black_boxes >= 0, "black_boxes", f"got {self.black_boxes}; 0 or more is needed")
        check(self.max_skipped_steps > 0, "max_skipped_steps", f"got {self.max_skipped_steps}; 1 or more is needed")
        check(
            self.evaluate_every_steps > 0,
            "evaluate_every_steps",
            f"got {self.evaluate_every_steps}; 1 or more is needed",
        )
        check(
            not self.profile_steps
            or (len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]),
            "profile_steps",
            f"got {self.profile_steps}; FIRST,LAST or nothing is needed",
        )
        check(self.stop_at_step >= 0, "stop_at_step", f"got {self.stop_at_step}; 0 or more is needed")
