"""Rewards that programs give, on the host: each prompt's own verifiers, made from its record."""

from collections.abc import Sequence
from typing import Any

from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.feedback import verifiers
from jaxlm.feedback.config import VerifierConfig
from jaxlm.feedback.verifiers import Verifier
from jaxlm.rl.prompts import Prompt
from jaxlm.sample.sampler import Completion


def verifier_for(config: VerifierConfig, record: dict[str, Any], where: str) -> Verifier:
    """The verifier of one prompt. Raises UserError for a record without what it is compared with."""
    if config.kind == "function":
        return verifiers.python(config.function)
    if config.target_field not in record:
        raise UserError(f"{where}: has no field {config.target_field!r}, which verifier {config.kind} compares with")
    target, texts = _target(record[config.target_field])
    try:
        match config.kind:
            case "exact":
                return verifiers.exact(texts)
            case "normalized":
                return verifiers.normalized(texts)
            case "number":
                return verifiers.number(target, marker=config.marker, tolerance=config.tolerance)
            case "choice":
                return verifiers.choice(target, marker=config.marker)
            case "regex":
                return verifiers.regex(target)
            case _:
                return verifiers.json_schema(target)
    except JaxlmError as error:
        raise UserError(f"{where}: {config.target_field}: {error}") from None


def _target(value: Any) -> tuple[Any, list[Any]]:
    """The value by itself, and as a list of right answers."""
    return value, value if isinstance(value, list) else [value]


class Judge:
    """The verifiers of all prompts, made before the first rollout, so that a bad record is refused at the start."""

    def __init__(self, configs: Sequence[VerifierConfig], prompts: Sequence[Prompt], field: str):
        self._parts = [
            [
                (config.weight, verifier_for(config, prompt.record, f"{field}: prompt {prompt.number}"))
                for config in configs
            ]
            for prompt in prompts
        ]

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """The weighted sum for each completion; as many for each prompt as there are."""
        samples = len(completions) // len(prompts)
        return [
            sum(weight * verify(prompt.text, completion.text).score for weight, verify in self._parts[prompt.number])
            for index, completion in enumerate(completions)
            for prompt in [prompts[index // samples]]
        ]
