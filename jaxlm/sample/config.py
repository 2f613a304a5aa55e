"""How completions are drawn; standard library only."""

import dataclasses
from typing import Any, ClassVar

from jaxlm.base.config import MeshConfig, StageConfig, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """From which distribution tokens are drawn, and when a completion ends."""

    runtime_fields: ClassVar[tuple[str, ...]] = ("batch_rows",)

    max_tokens: int = 128
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to p (arXiv:1904.09751); 1: all."""
    min_p: float = 0.0
    """Keep tokens whose probability is at least this share of the most likely one's (arXiv:2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of tokens in prompt and completion (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these strings."""
    stop_tokens: tuple[str, ...] = ()
    """A completion ends at the first of these tokens: names of special tokens, or ids."""
    stop_at_eos: bool = True
    """End at the tokenizer's end-of-text token and at the chat template's stop tokens; off, to measure speed."""
    samples: int = 1
    """K: completions of each prompt."""
    seed: int = 0
    """Seed of the random numbers, which depend on prompt, sample and position besides."""
    context_tokens: int = 0
    """Most tokens of prompt and completion together; 0: the row length that the model was trained on."""
    batch_rows: int = 64
    """Completions that are drawn at the same time; changes speed and memory, not results."""

    def __post_init__(self):
        for field in ("max_tokens", "samples", "batch_rows"):
            check(getattr(self, field) >= 1, field, f"got {getattr(self, field)}; 1 or more is needed")
        for field in ("temperature", "top_k", "seed", "context_tokens"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 or more is needed")
        check(0 < self.top_p <= 1, "top_p", f"got {self.top_p}; above 0 and at most 1 is needed")
        check(0 <= self.min_p <= 1, "min_p", f"got {self.min_p}; 0 to 1 is needed")
        check(self.repetition_penalty > 0, "repetition_penalty", f"got {self.repetition_penalty}; above 0 is needed")
        check(self.seed < 2**32, "seed", f"got {self.seed}; below 2**32 is needed")
        check(all(self.stop), "stop", "has an empty string, which every text contains")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(StageConfig):
    """Completions of prompts by a model."""

    stage: ClassVar[str] = "sample"
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "model", "prompts_file", "mesh")

    model: str = ""
    """Model directory, or a run's folder with one in it."""
    prompts: tuple[str, ...] = ()
    """Texts to complete."""
    chat: bool = False
    """The prompts are a user's messages, to be answered through the chat template."""
    prompts_file: str = ""
    """JSONL with a text under "prompt" in each line (with `chat`, or "messages"), other keys are kept; in place of
    `prompts`."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def __post_init__(self):
        check(bool(self.model), "model", "is empty; give a model directory or a run's folder")
        check(bool(self.prompts) != bool(self.prompts_file), "prompts", "give either prompts or a prompts_file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSamplingConfig(SamplingConfig):
    """How the answers of a chat are drawn, one at a time."""

    max_tokens: int = 0
    """Most tokens of an answer; 0: what the context has room for, at most 512."""
    temperature: float = 0.7
    top_p: float = 0.9

    def __post_init__(self):
        check(self.max_tokens >= 0, "max_tokens", f"got {self.max_tokens}; 0 or more is needed")
        check(self.samples == 1, "samples", f"got {self.samples}; a chat has one answer at a time: leave it at 1")
        check(self.seed == 0, "seed", f"got {self.seed}; a chat's seed is its config's own: leave it at 0, set `seed`")
        given: dict[str, Any] = vars(self) | {"max_tokens": self.max_tokens or 1}
        SamplingConfig(**given)  # checks the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(StageConfig):
    """A conversation with a model in the terminal."""

    stage: ClassVar[str] = "chat"
    # A folder takes conversations of all kinds: every line says with which model it was held.
    runtime_fields: ClassVar[tuple[str, ...]] = ("workdir", "name", "model", "system", "sampling", "seed", "mesh")

    model: str = ""
    """Model directory, or a run's folder with one in it."""
    system: str = ""
    """Text of a system message before the conversation; empty: none."""
    sampling: ChatSamplingConfig = ChatSamplingConfig()
    """How answers are drawn."""
    seed: int = 0
    """Seed of the random numbers: the same seed and inputs give the same chat."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def __post_init__(self):
        example = "python -m jaxlm chat runs/assistant"
        check(bool(self.model), "model", f"is empty; give a model directory or a run's folder: {example}")
        check(0 <= self.seed < 2**32, "seed", f"got {self.seed}; 0 to 2**32 - 1 is needed")
