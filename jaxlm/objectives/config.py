"""Config of what pretraining predicts; standard library only."""

import dataclasses
from typing import Any

from jaxlm.base.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedWordsConfig:
    """Tokens that were taken away are predicted from all others of their document (BERT, arXiv:1810.04805)."""

    rate: float = 0.15
    """Share of the tokens that are predicted, each drawn by itself; special tokens never are."""
    masked: float = 0.8
    """Share of those that are replaced by mask_token."""
    random: float = 0.1
    """Share of those that are replaced by a random token, drawn from all but the special ones; the rest stay as they
    are, and are predicted all the same."""
    mask_token: str = "[MASK]"
    """Name of the tokenizer's special token for a missing word."""

    def __post_init__(self):
        check(0 < self.rate <= 1, "rate", f"got {self.rate}; a share in (0, 1] is needed")
        for field in ("masked", "random"):
            check(0 <= getattr(self, field) <= 1, field, f"got {getattr(self, field)}; a share in [0, 1] is needed")
        both = self.masked + self.random
        check(both <= 1 + 1e-9, "random", f"{self.random} and masked {self.masked} are more than 1 together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddleConfig:
    """Some documents are cut in three, and their middle is moved to the end (arXiv:2207.14255).

    Cuts fall between tokens. Three sentinels take the place of the document's last three tokens, so that rows keep
    their length.
    """

    rate: float = 0.5
    """Share of the documents that are rearranged; up to 0.9 costs next to nothing of the usual ability."""
    suffix_first: float = 0.5
    """Share of those in the order suffix, prefix, middle (SPM); the others have prefix, suffix, middle (PSM)."""
    prefix_token: str = "<|fim_prefix|>"
    """Name of the tokenizer's special token before the prefix."""
    suffix_token: str = "<|fim_suffix|>"
    """The one before the suffix."""
    middle_token: str = "<|fim_middle|>"
    """The one before the middle (in SPM: before prefix and middle)."""

    def __post_init__(self):
        check(0 < self.rate <= 1, "rate", f"got {self.rate}; a share in (0, 1] is needed")
        check(0 <= self.suffix_first <= 1, "suffix_first", f"got {self.suffix_first}; a share in [0, 1] is needed")
        names = (self.prefix_token, self.suffix_token, self.middle_token)
        check(len(set(names)) == 3, "middle_token", f"{', '.join(names)} are not all different")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is predicted from what; without either field each token from those before it."""

    masked_words: MaskedWordsConfig | None = None
    """Missing words from what stands on both sides: for an encoder (model.causal=False)."""
    fill_in_the_middle: FillInTheMiddleConfig | None = None
    """The next token, in documents of which some are rearranged: a decoder learns to fill gaps."""

    def __post_init__(self):
        both = self.masked_words is not None and self.fill_in_the_middle is not None
        check(not both, "fill_in_the_middle", "is for decoders and masked_words for encoders; give one of them")


def check_fits(config: Any) -> None:
    """Raises ConfigError where objective and model of a `PretrainConfig` do not go together."""
    model, teacher = config.model, config.distill
    stored = teacher is not None and teacher.stored and config.objective.fill_in_the_middle
    check(not stored, "distill.stored", "is of plain rows, and fill_in_the_middle changes them; give a teacher instead")
    if config.objective.masked_words is None:
        problem = "is off, so that each token would see the next one; set it, or give objective.masked_words"
        check(model.causal, "model.causal", problem)
        return
    problem = "a causal model does not see what follows a missing word; set model.causal=False"
    check(not model.causal, "objective.masked_words", problem)
    check(teacher is None, "distill", "is learning from what follows a token; masked_words leaves nothing to follow")
    check(model.head != "pooler", "model.head", "is pooler, which predicts no token; take transform (BERT's) or plain")
    check(not config.sample_prompts, "sample_prompts", "an encoder writes no text; leave it empty")
    given = {"batch_rows": config.batch_rows, "steps": config.steps, "schedule.peak": config.schedule.peak}
    for field, value in given.items():
        problem = "is 0; give it: what the depth derives was measured on causal models, which predict every token"
        check(value > 0, field, problem)
