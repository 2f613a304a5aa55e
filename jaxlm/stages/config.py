"""Configs of the stages that compose several packages; the others stand in their package's `config.py`."""

import dataclasses
from typing import ClassVar

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.data.config import ChatRowsConfig, ChatSource, MixtureSource, check_exclude
from jaxlm.distill.config import DistillConfig
from jaxlm.model.config import LoRAConfig, ModelConfig
from jaxlm.objectives.config import ObjectiveConfig, check_fits
from jaxlm.routing.config import RoutingConfig
from jaxlm.text.config import check_sources
from jaxlm.train.config import LoopConfig, OptimizerConfig, PlateauConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Trains a transformer on packed rows: a decoder, or an encoder on missing words."""

    stage: ClassVar[str] = "pretrain"
    runtime_fields: ClassVar[tuple[str, ...]] = (
        "workdir",
        "name",
        "mesh",
        "loop",
        "loss_chunk_tokens",
        "sample_prompts",
    )

    data: tuple[MixtureSource, ...] = ()
    """Folders of packed rows with their weights in the mixture."""
    depth: int = 0
    """Derives layers, width and heads where they are 0. Batch, learning rate and steps at 0 follow from the size."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is predicted: the next token, missing words, or the next token of rearranged documents."""
    row_length: int = 0
    """S: tokens a row; 0 takes the rows'."""
    batch_rows: int = 0
    """Rows of the global batch; 0 derives them from the depth."""
    accumulate: int = 1
    """Pieces in which a batch is worked off, one after the other, for less memory; the result is the same."""
    steps: int = 0
    """Updates of the whole schedule; 0 derives them from the depth."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate."""
    routing: RoutingConfig = RoutingConfig()
    """Balance of a mixture of experts."""
    distill: DistillConfig | None = None
    """Learns from a teacher's next tokens beside the data's; none: from the data's alone."""
    z_loss: float = 0.0
    """Weight of log²(normaliser) in the objective; 1e-4 keeps logits from drifting."""
    loss_chunk_tokens: int = 0
    """Makes the logits of so many tokens at a time, for less memory; 0: of all at once."""
    heldout_batches: int = 0
    """Batches of each source's held-out rows an evaluation reads; 0: all."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model goes on with at each evaluation, for 64 tokens: completions.jsonl, and the report."""
    plateau: PlateauConfig = PlateauConfig()
    """When to stop early."""
    seed: int = 0
    """Seed of the initial values and of the order of the data."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, saving."""

    def __post_init__(self):
        check(self.depth >= 0, "depth", f"got {self.depth}; a positive depth, or 0, is needed")
        check(self.batch_rows >= 0, "batch_rows", f"got {self.batch_rows}; a positive number, or 0, is needed")
        check(self.steps >= 0, "steps", f"got {self.steps}; a positive number, or 0, is needed")
        check(self.accumulate >= 1, "accumulate", f"got {self.accumulate}; 1 or more is needed")
        if self.batch_rows:
            check(
                self.batch_rows % self.accumulate == 0,
                "accumulate",
                f"{self.accumulate} pieces do not divide a batch of {self.batch_rows} rows",
            )
        known = self.optimizer.kind not in ("lion", "sgd")
        check(
            known or self.schedule.peak > 0,
            "schedule.peak",
            f"is 0; give {self.optimizer.kind}'s: the depth has AdamW's",
        )
        check(self.heldout_batches >= 0, "heldout_batches", f"got {self.heldout_batches}; 0 or more is needed")
        check(self.z_loss >= 0, "z_loss", f"got {self.z_loss}; 0 or more is needed")
        check(self.loss_chunk_tokens >= 0, "loss_chunk_tokens", f"got {self.loss_chunk_tokens}; 0 or more is needed")
        check(self.seed >= 0, "seed", f"got {self.seed}; 0 or more is needed")
        check_fits(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Instruction tuning: trains a model on people's written answers."""

    stage: ClassVar[str] = "sft"
    runtime_fields: ClassVar[tuple[str, ...]] = (*PretrainConfig.runtime_fields, "model")
    changeable_fields: ClassVar[tuple[str, ...]] = ("exclude",)

    model: str = ""
    """The model to start from: a model directory, or a run's folder."""
    sources: tuple[ChatSource, ...] = ()
    """The chats; at least one source of the split train."""
    chats: ChatRowsConfig = ChatRowsConfig()
    """How chats become rows."""
    chat_template: str = ""
    """chatml, llama2, llama3, or the path of a Jinja file; empty: the model's own, and chatml where it has none."""
    pretraining: tuple[MixtureSource, ...] = ()
    """Folders of packed pretraining rows to mix in; weight: their rows for each row of chats."""
    exclude: tuple[str, ...] = ()
    """Rows of WORKDIR/rows and chats to leave out, such as row:12 or document:345 (see `pretraining.exclude`)."""
    row_length: int = 0
    """S: tokens a row; 0 takes the model's."""
    batch_rows: int = 16
    """Rows of the global batch."""
    accumulate: int = 1
    """Pieces in which a batch is worked off, one after the other, for less memory; the result is the same."""
    epochs: float = 2.0
    """How often the chats are gone through, where `steps` is 0."""
    steps: int = 0
    """Updates of the whole schedule; 0 derives them from the epochs."""
    distill: DistillConfig | None = None
    """Learns from a teacher's next tokens beside the answers'; none: from the answers' alone."""
    lora: LoRAConfig | None = None
    """Trains low-rank adapters beside the model's frozen matrices, at rates of 1e-4 or more; none: all weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig(peak=2e-5, warmup_steps=20)
    """The learning rate."""
    routing: RoutingConfig = RoutingConfig()
    """Balance of a mixture of experts."""
    loss_chunk_tokens: int = 0
    """Makes the logits of so many tokens at a time, for less memory; 0: of all at once."""
    heldout_batches: int = 0
    """Batches of held-out rows an evaluation reads; 0: all."""
    sample_prompts: tuple[str, ...] = ()
    """Questions that the model answers at each evaluation, in 64 tokens or fewer: completions.jsonl, and the report."""
    plateau: PlateauConfig = PlateauConfig()
    """When to stop early."""
    seed: int = 0
    """Seed of the order of the data."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, saving."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        check_sources(self.sources)
        for field in ("batch_rows", "accumulate"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        check(
            self.batch_rows % self.accumulate == 0,
            "accumulate",
            f"{self.accumulate} pieces do not divide a batch of {self.batch_rows} rows",
        )
        for field in ("row_length", "steps", "loss_chunk_tokens", "heldout_batches", "seed"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check_exclude(self.exclude)
        check(self.epochs > 0, "epochs", f"got {self.epochs}; more than 0 is needed")
        check(self.schedule.peak > 0, "schedule.peak", "is 0; a learning rate is needed, such as 2e-5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(StageConfig):
    """Several stages, one after the other, each in WORKDIR/NAME.

    A path `@NAME` in a stage's config stands for the folder of the stage of that name.
    """

    stage: ClassVar[str] = "run"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "only")

    stages: tuple[StageConfig, ...] = ()
    """The stages' configs, in order; reached by name: --config.stages.pretrain.steps=100."""
    only: tuple[str, ...] = ()
    """Run just these stages; empty: all of them."""

    def __post_init__(self):
        names = [stage_name(stage) for stage in self.stages]
        check(len(names) > 0, "stages", "is empty; give at least one stage's config")
        twice = sorted({name for name in names if names.count(name) > 1})
        check(not twice, "stages", f"two stages are called {', '.join(twice)}; give them different names")
        check(
            all(isinstance(stage, StageConfig) and not isinstance(stage, RunConfig) for stage in self.stages),
            "stages",
            "every item must be a stage's config, and none a run",
        )
        for name in self.only:
            check(name in names, "only", f"no stage is called {name!r}; the stages are {', '.join(names)}")


def stage_name(config: StageConfig) -> str:
    return config.name or config.stage
