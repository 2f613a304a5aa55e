"""How a policy learns from preferences without a reward model; standard library only."""

import dataclasses
import math
from typing import ClassVar, Literal

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.model.config import LoRAConfig
from jaxlm.reward.config import AnnotatorWeight, RankingSource
from jaxlm.text.config import check_sources
from jaxlm.train.config import LoopConfig, OptimizerConfig, PlateauConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation: the policy's log-ratio to its reference is the reward (arXiv:2305.18290)."""

    beta: float = 0.1
    """Implicit reward for a nat of log-ratio to the reference: the lower, the farther the policy goes from it. With
    length_normalised a larger one, 2 to 10: log-ratios are of a token then, not of an answer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: the larger the margin of log-ratios the better; ipo: it is pulled to 1 / (2 beta) (arXiv:2310.12036)."""
    label_smoothing: float = 0.0
    """Share of the labels taken to be wrong (conservative DPO); sigmoid only."""
    length_normalised: bool = False
    """Divides an answer's log-ratio by its number of tokens (arXiv:2411.15124), so that length is no reward; raise
    beta."""

    def __post_init__(self):
        _check_positive(self, "beta")
        share = self.label_smoothing
        check(0 <= share < 0.5, "label_smoothing", f"got {share}; a share below 0.5 is needed")
        check(not share or self.loss == "sigmoid", "label_smoothing", "is for loss='sigmoid'; leave it at 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Kahneman-Tversky optimisation: each answer is good or bad by itself (arXiv:2402.01306)."""

    beta: float = 0.1
    """Implicit reward for a nat of log-ratio to the reference: the lower, the farther the policy goes from it."""
    desirable_weight: float = 1.0
    """Weight of the chosen answers' losses."""
    undesirable_weight: float = 1.0
    """Weight of the rejected answers' losses."""

    def __post_init__(self):
        _check_positive(self, "beta", "desirable_weight", "undesirable_weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """Odds-ratio preference optimisation: instruction tuning on the chosen answers, and their odds; no reference
    (arXiv:2403.07691)."""

    weight: float = 0.1
    """λ: weight of the odds ratio's loss beside the chosen answers' cross-entropy."""

    def __post_init__(self):
        _check_positive(self, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPOConfig:
    """Simple preference optimisation: an answer's mean log-probability is its reward; no reference
    (arXiv:2405.14734)."""

    beta: float = 2.0
    """Reward for a nat of an answer's mean log-probability."""
    margin: float = 1.0
    """γ: by how much the chosen answer's reward should be higher; about half of beta."""

    def __post_init__(self):
        _check_positive(self, "beta")
        check(0 <= self.margin < math.inf, "margin", f"got {self.margin}; 0 or more is needed")


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        check(0 < value < math.inf, field, f"got {value}; a number above 0 is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(StageConfig):
    """Trains a policy on people's rankings of answers, without a reward model."""

    stage: ClassVar[str] = "preference"
    changeable_fields: ClassVar[tuple[str, ...]] = ("exclude",)
    runtime_fields: ClassVar[tuple[str, ...]] = (
        "workdir",
        "name",
        "model",
        "reference_cache",
        "mesh",
        "loop",
        "loss_chunk_tokens",
    )

    model: str = ""
    """The policy to start from, which is the reference too: a model directory, or a run's folder."""
    sources: tuple[RankingSource, ...] = ()
    """The rankings or pairs; at least one source of the split train."""
    max_bad_share: float = 0.01
    """The stage refuses when more than this share of any source's records is bad."""
    exclude: tuple[str, ...] = ()
    """Prompts to leave out, by their records' prompt_id, as a bad step's blackbox/STEP/record.json names them: they
    become padding in their place, all else stays where it is. A stopped run goes on with others."""
    criterion: str = "overall"
    """Which of the records' rankings to learn."""
    annotators: tuple[AnnotatorWeight, ...] = ()
    """Annotators whose rankings count more or less than 1."""
    heldout_annotators: tuple[str, ...] = ()
    """Annotators who are not trained on, but measured."""
    dpo: DPOConfig | None = None
    """DPO, IPO or length-normalised DPO. Exactly one of dpo, kto, orpo and simpo is given."""
    kto: KTOConfig | None = None
    """KTO: each answer counts by itself, as a good or a bad one."""
    orpo: ORPOConfig | None = None
    """ORPO: cross-entropy of the chosen answers and their odds, without a reference."""
    simpo: SimPOConfig | None = None
    """SimPO: mean log-probabilities with a margin, without a reference."""
    reference_cache: str = ""
    """Where the reference's log-probabilities are kept, for several runs if it is given; empty: in WORKDIR."""
    chat_template: str = ""
    """chatml, llama2, llama3, or the path of a Jinja file; empty: the model's own, and chatml where it has none."""
    row_length: int = 0
    """S: tokens a row; 0 takes the model's. Prompts with a longer answer are left out and counted: none is cut."""
    batch_rows: int = 16
    """Rows of the global batch; each holds several answers."""
    batch_pairs: int = 256
    """How many pairs a batch has room for."""
    accumulate: int = 1
    """Pieces in which a batch is worked off, one after the other, for less memory; the result is the same."""
    epochs: int = 1
    """How often the prompts are gone through, where `steps` is 0."""
    steps: int = 0
    """Updates of the whole schedule; 0 derives them from the epochs."""
    lora: LoRAConfig | None = None
    """Trains low-rank adapters beside the model's frozen matrices, which are the reference; none: all weights."""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig(kind="linear", peak=1e-6, warmup_steps=10)
    """The learning rate."""
    loss_chunk_tokens: int = 0
    """Makes the logits of so many tokens at a time, for less memory; 0: of all at once."""
    heldout_batches: int = 0
    """Batches an evaluation reads; 0: all."""
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
        given = [field for field in ("dpo", "kto", "orpo", "simpo") if getattr(self, field) is not None]
        found = " and ".join(given) or "none"
        check(len(given) == 1, given[0] if given else "dpo", f"give exactly one of dpo, kto, orpo, simpo; got {found}")
        check(bool(self.criterion), "criterion", "is empty; name one, such as overall")
        for field in ("batch_rows", "batch_pairs", "accumulate", "epochs"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        for field in ("batch_rows", "batch_pairs"):
            divides = getattr(self, field) % self.accumulate == 0
            check(divides, "accumulate", f"{self.accumulate} pieces do not divide {field} {getattr(self, field)}")
        for field in ("row_length", "steps", "loss_chunk_tokens", "heldout_batches", "seed"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check(0 <= self.max_bad_share <= 1, "max_bad_share", f"got {self.max_bad_share}; a share from 0 to 1 is needed")
        check(self.schedule.peak > 0, "schedule.peak", "is 0; a learning rate is needed, such as 1e-6")
        if self.lora is not None:
            check(not self.lora.dropout, "lora.dropout", "must be 0: in the reference nothing is dropped")

    @property
    def method(self) -> DPOConfig | KTOConfig | ORPOConfig | SimPOConfig:
        """The one that is given."""
        found = self.dpo or self.kto or self.orpo or self.simpo
        assert found is not None
        return found

    @property
    def has_reference(self) -> bool:
        return self.dpo is not None or self.kto is not None
