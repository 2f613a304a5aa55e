"""The verifier that a config and a prompt's record ask for."""

from collections.abc import Mapping
from typing import Any

from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.feedback import verifiers
from jaxlm.feedback.config import VerifierConfig
from jaxlm.feedback.verifiers import Verifier


def verifier_for(config: VerifierConfig, record: Mapping[str, Any], where: str) -> Verifier:
    """The verifier of one prompt. Raises UserError, beginning with `where`, for a record that it cannot be made of."""
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
