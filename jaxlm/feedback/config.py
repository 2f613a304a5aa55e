"""Which verifier; standard library only."""

import dataclasses
from typing import Literal

from jaxlm.base.config import check

Kind = Literal["exact", "normalized", "number", "choice", "regex", "json_schema", "function"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """A program that scores answers from 0 to 1; most compare with a target that stands in the prompt's record."""

    kind: Kind
    """exact, normalized, number, choice, regex, json_schema: see `feedback/verifiers.py`; function: the user's own."""
    function: str = ""
    """function only: package.module:name of a function (prompt, answer) → score."""
    target_field: str = "target"
    """Field of the prompt's record that holds the right answer (or a list of them), the pattern or the schema."""
    marker: str = ""
    """number only: the answer's number stands after this, such as ####."""
    tolerance: float = 0.0
    """number only: largest difference that counts as right."""
    weight: float = 1.0
    """Its score, times this, goes into the reward."""

    def __post_init__(self):
        if self.kind == "function":
            check(bool(self.function), "function", "is empty; package.module:name is needed")
        else:
            check(not self.function, "function", f"got {self.function!r}; only kind=function takes one")
            check(bool(self.target_field), "target_field", "is empty; the field of the record is needed")
        check(self.tolerance >= 0, "tolerance", f"got {self.tolerance}; 0 or more is needed")
