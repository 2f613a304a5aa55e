"""Config of learning from a teacher; standard library only."""

import dataclasses
from typing import ClassVar, Literal

from jaxlm.base.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a teacher's probabilities beside the data's tokens (arXiv:1503.02531, arXiv:2306.13649).

    The objective is weight · temperature² · divergence + (1 - weight) · cross-entropy, each over the same targets.
    """

    # Their contents count, by hash.
    runtime_fields: ClassVar[tuple[str, ...]] = ("teacher", "stored")

    teacher: str = ""
    """A model directory, a run's folder, a Hugging Face directory or a GGUF file, with the tokenizer of the rows."""
    stored: str = ""
    """In place of a teacher: the folder in which tools/store_teacher.py has put what it says of the rows."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """forward_kl: KL(teacher, student), under which the student covers all that the teacher finds likely; reverse_kl:
    KL(student, teacher), under which it keeps to the likeliest; jensen_shannon: the KL of both to their mixture."""
    beta: float = 0.5
    """The teacher's share of jensen_shannon's mixture."""
    temperature: float = 1.0
    """Divides the logits of both; the divergence is multiplied by its square, so that gradients keep their size."""
    weight: float = 0.5
    """Weight of the divergence; 1 - weight is that of the cross-entropy to the data's tokens."""
    top_k: int = 0
    """Compares the teacher's likeliest k tokens and, as one, all others; 0: every token by itself."""

    def __post_init__(self):
        check(not (self.teacher and self.stored), "stored", "stands in place of a teacher; leave one of them out")
        check(0 < self.beta < 1, "beta", f"got {self.beta}; a share between 0 and 1 is needed")
        check(self.temperature > 0, "temperature", f"got {self.temperature}; more than 0 is needed")
        check(0 < self.weight <= 1, "weight", f"got {self.weight}; more than 0, at most 1, is needed")
        check(self.top_k >= 0, "top_k", f"got {self.top_k}; a positive number, or 0 for all, is needed")
