"""What a model is measured on, and what it must reach; standard library only."""

import dataclasses
import math
from typing import ClassVar, Literal, get_args

from jaxlm.base.config import MeshConfig, StageConfig, check
from jaxlm.data.config import ChatSource
from jaxlm.feedback.config import Kind, VerifierConfig
from jaxlm.reward.config import RankingSource
from jaxlm.sample.config import SamplingConfig

Rater = Literal["trainer", "lead", "expert", "judge"]
METRICS = ("multiple_choice", "bits_per_byte", *(kind for kind in get_args(Kind) if kind != "function"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task file: a prompt template, a data file, a metric."""

    prompt: str
    """Jinja, sandboxed: {{ question }} stands for that field of the record; {{ chat }} says whether a chat template
    goes around it. A field that a record lacks is an error."""
    data: str
    """JSONL (plain, .gz, .zst), Parquet or ArrayRecord, from the task file's folder on."""
    metric: str | VerifierConfig
    """multiple_choice, bits_per_byte, or a verifier: its kind (exact, normalized, number, choice, regex, json_schema),
    or an object of its fields, such as {"kind": "number", "marker": "####"}."""
    name: str = ""
    """In results; empty: the file's name without its ending."""
    target_field: str = "target"
    """Field with the right answer: of multiple_choice the choice's number (from 0) or its text."""
    choices_field: str = "choices"
    """multiple_choice: field with the list of answers to choose from."""
    separator: str = " "
    """Stands between prompt and answer where no chat template does."""
    shots: int = 0
    """So many records, the first ones, stand with their answers before each prompt, and are not measured."""
    shot_answer: str = ""
    """Template of the answers of these; empty: the target."""
    chat: bool = False
    """Asks through the chat template where there is one: the model's own, or the config's `chat_template`."""
    system: str = ""
    """System message in a chat; elsewhere the text before everything."""
    language: str = ""
    """Language of records that have no "language" of their own; results are shown by language where there are
    several."""
    limit: int = 0
    """Measures so many records, the first ones; 0: all."""
    max_tokens: int = 64
    """Most tokens of an answer that the model writes itself."""
    stop: tuple[str, ...] = ()
    """Such an answer ends before the first of these, besides the end of text: ["\\n"] for a base model's one line."""

    def __post_init__(self):
        for field in ("prompt", "data"):
            check(bool(getattr(self, field)), field, "is empty; it is needed")
        if isinstance(self.metric, str):
            known = f"{', '.join(METRICS)}, or an object of a verifier's fields"
            check(self.metric in METRICS, "metric", f"got {self.metric!r}; one of {known} is needed")
        check("/" not in self.name, "name", f"got {self.name!r}; a name without / is needed")
        for field in ("shots", "limit"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check(self.max_tokens >= 1, "max_tokens", f"got {self.max_tokens}; 1 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorisationConfig:
    """How many training rows the model continues verbatim, and how many that it never saw."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("rows",)

    rows: str = ""
    """A pack stage's folder."""
    examples: int = 200
    """Rows of each split, spread evenly over it."""
    prompt_tokens: int = 32
    """n: the first tokens of a row's document, which are given."""
    tokens: int = 32
    """m: how many tokens follow; a row counts when greedy decoding gives all of them."""

    def __post_init__(self):
        check(bool(self.rows), "rows", "is empty; a pack stage's folder is needed")
        for field in ("examples", "prompt_tokens", "tokens"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """How often a reward model prefers the model's answers to another model's."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("against", "reward_model")

    against: str = ""
    """The other model: a model directory, or a run's folder."""
    reward_model: str = ""
    """What compares them; the gate takes no reward model that the model was optimised for."""
    criterion: str = ""
    """One of the reward model's; empty: overall, or the only one."""
    prompts: tuple[ChatSource, ...] = ()
    """Chats; their last answer is left out. Also {"prompt"} and {"messages"} that end with the user's turn."""
    limit: int = 200
    """Prompts, the first ones; 0: all."""

    def __post_init__(self):
        for field in ("against", "reward_model"):
            check(bool(getattr(self, field)), field, "is empty; give a model directory or a run's folder")
        check(bool(self.prompts), "prompts", "is empty; give at least one source")
        check(self.limit >= 0, "limit", f"got {self.limit}; 0 or more is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingsConfig:
    """How often people or judges prefer the model's answers, from their ranking records."""

    sources: tuple[RankingSource, ...] = ()
    """The records; completions say under "policy" which model gave them."""
    policy: str = ""
    """The name of the measured model there."""
    against: str = ""
    """The policy that it is compared with; empty: all others."""
    criterion: str = "overall"
    """The criterion whose rankings count."""
    roles: tuple[Rater, ...] = ("trainer", "lead", "expert", "judge")
    """Whose annotations count."""

    def __post_init__(self):
        check(bool(self.sources), "sources", "is empty; give at least one source of ranking records")
        check(bool(self.policy), "policy", "is empty; the model's name in the records is needed")
        check(self.against != self.policy, "against", f"is {self.policy!r}, the measured policy itself")
        check(bool(self.roles), "roles", f"is empty; {', '.join(get_args(Rater))} are known")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a figure of the results must reach."""

    name: str
    """What is claimed, such as safe: stands in the verdict's reasons."""
    figure: str
    """Where it stands in results.json, dotted: tasks.truthful.accuracy, heldout.bits_per_byte, safety.refusal."""
    least: float | None = None
    """The figure must be at least this. Exactly one of least and most is given."""
    most: float | None = None
    """The figure must be at most this."""
    compared: Literal["absolute", "baseline"] = "absolute"
    """baseline: not the figure but its difference to the baseline's must be."""
    end: Literal["worse", "value", "better"] = "worse"
    """Which end of the 95 % interval is held to it: the worse one (the figure must be good beyond doubt), the value
    itself, or the better one (it must not be bad beyond doubt)."""
    missing: str = ""
    """How to get the figure, told where it is missing."""

    def __post_init__(self):
        check(bool(self.name), "name", "is empty; say what is claimed")
        check(bool(self.figure), "figure", "is empty; the place of a figure in results.json is needed")
        given = [limit for limit in (self.least, self.most) if limit is not None]
        check(len(given) == 1, "least", "give exactly one of least and most")
        check(
            math.isfinite(given[0]),
            "least" if self.most is None else "most",
            f"got {given[0]}; a finite number is needed",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A file of thresholds."""

    thresholds: tuple[Threshold, ...]
    """All of which a model must pass."""
    decayed_share: float = 0.5
    """The error's slope is taken where the learning rate is at most this share of its peak."""
    comment: str = ""
    """For its readers."""

    def __post_init__(self):
        check(bool(self.thresholds), "thresholds", "is empty; a gate that asks for nothing is none")
        names = [(t.name, t.figure, t.compared) for t in self.thresholds]
        check(len(set(names)) == len(names), "thresholds", "has one twice: name, figure and compared must differ")
        check(0 < self.decayed_share <= 1, "decayed_share", f"got {self.decayed_share}; above 0, at most 1 is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Measures a model on held-out rows, texts and chats, tasks, requests to refuse, training rows and against other
    models; then the gate."""

    stage: ClassVar[str] = "evaluate"
    runtime_fields: ClassVar[tuple[str, ...]] = (
        "workdir",
        "name",
        "model",
        "rows",
        "documents",
        "tasks",
        "safety",
        "toxic_words",
        "gate",
        "baseline",
        "curve",
        "batch_rows",
        "mesh",
    )

    model: str = ""
    """Model directory, or a run's folder with one in it."""
    rows: str = ""
    """A pack stage's folder, whose held-out rows are measured; empty: none."""
    documents: str = ""
    """The prepare stage's folder that the rows were packed from, to compare with `xz -9`; empty: no comparison."""
    texts: tuple[str, ...] = ()
    """Files or globs (text, Markdown, JSONL, Parquet), measured one by one: a text file is one document."""
    text_field: str = "text"
    """Where the text stands in a record of JSONL or Parquet."""
    chats: tuple[ChatSource, ...] = ()
    """Held-out chats: bits per byte of the answers, and what the model answers itself."""
    kinds: tuple[str, ...] = ()
    """Only chats whose "kind" is one of these; empty: all."""
    chat_template: str = ""
    """Empty: the model's own; plain asks a base model in plain text (Q: ... A: ...)."""
    answers: int = 200
    """How many of each source's chats the model answers, the first ones; 0: none."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=64)
    """How these answers are drawn."""
    verifiers: tuple[VerifierConfig, ...] = ()
    """Programs that score these answers."""
    tasks: tuple[str, ...] = ()
    """Task files (JSON or TOML: a prompt template, a data file, a metric), folders of them, or truthful, which comes
    with jaxlm."""
    safety: str = ""
    """shipped: 80 requests that come with jaxlm, harmful and harmless-but-close, for refusal and over-refusal; or a
    JSONL of {"request", "kind": "harmful" | "harmless", "language"}; empty: not measured."""
    toxic_words: tuple[str, ...] = ()
    """Word lists besides the shipped English and Russian ones, for the toxicity of all answers: a word or phrase a
    line, a star for any ending."""
    memorisation: MemorisationConfig | None = None
    """Verbatim memorisation: training rows that the model continues to the letter, beside held-out ones."""
    win_rate: WinRateConfig | None = None
    """How often a reward model prefers its answers to another model's."""
    ratings: RatingsConfig | None = None
    """How often people or judges prefer its answers to other models', by ranking records."""
    gate: str = ""
    """A file of thresholds, or default: the error has stopped falling; rated high; safe, not toxic, truthful. The
    verdict goes to gate.json and into the model's manifest; a refusal exits with 3. Empty: no gate."""
    baseline: str = ""
    """gate: an evaluate stage's folder, whose results thresholds with compared=baseline are held to."""
    curve: str = ""
    """gate: a run's folder, whose metrics.jsonl shows whether the error has stopped falling; empty: the model's own,
    or that of the nearest model that it was made from with eval/bits_per_byte in it."""
    row_length: int = 0
    """Tokens of a row of `texts` and `chats`: longer documents are split; 0: as the model was trained."""
    batch_rows: int = 8
    """Rows measured at the same time; changes speed and memory only."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        parts = (self.rows, self.texts, self.chats, self.tasks, self.safety, self.memorisation, self.win_rate)
        others = "texts, chats, tasks, safety, memorisation, win_rate or ratings"
        check(any((*parts, self.ratings)), "rows", f"give a pack folder as rows, or {others}")
        check(self.answers >= 0, "answers", f"got {self.answers}; 0 or more is needed")
        check(
            self.sampling.samples == 1, "sampling.samples", f"got {self.sampling.samples}; an answer each is measured"
        )
        for field in ("baseline", "curve"):
            check(not getattr(self, field) or bool(self.gate), field, "is the gate's: set gate=default, or give a file")
        check(not self.documents or bool(self.rows), "documents", "go with rows: give the pack folder made from them")
        check(self.batch_rows >= 1, "batch_rows", f"got {self.batch_rows}; 1 or more is needed")
        check(self.row_length == 0 or self.row_length >= 8, "row_length", f"got {self.row_length}; 8 or more is needed")
