"""How a reward model is trained; standard library only."""

import dataclasses
from typing import ClassVar

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.model.config import LoRAConfig
from jaxlm.text.config import ObjectSource, check_sources
from jaxlm.train.config import LoopConfig, OptimizerConfig, PlateauConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingSource(ObjectSource):
    """Where some of the rankings come from: records of ranked answers, or pairs with chosen and rejected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatorWeight:
    """How much an annotator's rankings count."""

    name: str
    """As it stands in the records."""
    weight: float = 1.0
    """How much they count, where others count 1; 0 leaves them out."""

    def __post_init__(self):
        check(bool(self.name), "name", "is empty; the annotator's name is needed")
        check(0 <= self.weight < float("inf"), "weight", f"got {self.weight}; a number of 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Trains a reward model on people's rankings of answers."""

    stage: ClassVar[str] = "reward"
    changeable_fields: ClassVar[tuple[str, ...]] = ("exclude",)
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "model", "mesh", "loop")

    model: str = ""
    """The model to start from, best the assistant that gave the answers: a model directory, or a run's folder."""
    sources: tuple[RankingSource, ...] = ()
    """The rankings; at least one source of the split train."""
    max_bad_share: float = 0.01
    """The stage refuses when more than this share of any source's records is bad."""
    exclude: tuple[str, ...] = ()
    """Prompts to leave out, by their records' prompt_id, as a bad step's blackbox/STEP/record.json names them: they
    become padding in their place, all else stays where it is. A stopped run goes on with others."""
    criteria: tuple[str, ...] = ("overall",)
    """Criteria to learn, each with a scalar head of its own."""
    annotators: tuple[AnnotatorWeight, ...] = ()
    """Annotators whose rankings count more or less than 1."""
    heldout_annotators: tuple[str, ...] = ()
    """Annotators who are not trained on, but measured."""
    margin: float = 0.0
    """By how much the better answer should score higher, for each tier between the two."""
    centring: float = 0.0
    """Weight of (better + worse)², which holds the rewards near 0 while training (arXiv:2312.09244)."""
    reference_policy: str = ""
    """After training the mean reward of this policy's answers is brought to 0; empty: of all train answers."""
    reference_answers: int = 512
    """How many of these answers are taken, the first ones."""
    chat_template: str = ""
    """chatml, llama2, llama3, or the path of a Jinja file; empty: the model's own, and chatml where it has none."""
    row_length: int = 0
    """S: tokens a row; 0 takes the model's. Prompts with a longer answer are left out and counted."""
    batch_rows: int = 16
    """Rows of the global batch; each holds several answers."""
    batch_pairs: int = 256
    """How many pairs a batch has room for."""
    accumulate: int = 1
    """Pieces in which a batch is worked off, one after the other, for less memory; the result is the same."""
    epochs: int = 1
    """How often the prompts are gone through, where `steps` is 0; more than one overfits soon (arXiv:2203.02155)."""
    steps: int = 0
    """Updates of the whole schedule; 0 derives them from the epochs."""
    lora: LoRAConfig | None = None
    """Trains low-rank adapters beside the model's frozen matrices, and the heads; none: all weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-5, warmup_steps=10)
    """The learning rate."""
    heldout_batches: int = 0
    """Batches an evaluation reads; 0: all."""
    plateau: PlateauConfig = PlateauConfig()
    """When to stop early."""
    seed: int = 0
    """Seed of the order of the data and of the heads' initial values."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, saving."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        check_sources(self.sources)
        check(bool(self.criteria), "criteria", "is empty; name at least one, such as overall")
        check(len(set(self.criteria)) == len(self.criteria), "criteria", f"{self.criteria} names one twice")
        for field in ("batch_rows", "batch_pairs", "accumulate", "epochs", "reference_answers"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        for field in ("batch_rows", "batch_pairs"):
            divides = getattr(self, field) % self.accumulate == 0
            check(divides, "accumulate", f"{self.accumulate} pieces do not divide {field} {getattr(self, field)}")
        for field in ("margin", "centring", "row_length", "steps", "heldout_batches", "seed"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check(0 <= self.max_bad_share <= 1, "max_bad_share", f"got {self.max_bad_share}; a share from 0 to 1 is needed")
        check(self.schedule.peak > 0, "schedule.peak", "is 0; a learning rate is needed, such as 1e-5")
