"""The special tokens that objectives put into rows."""

from jaxlm.base.errors import ConfigError
from jaxlm.tokenizer.tokenizer import Tokenizer


def special_token(tokenizer: Tokenizer, field: str, name: str) -> int:
    """The id of a special token that a field names. Raises ConfigError where the tokenizer has none."""
    if name not in tokenizer.special_ids:
        known = ", ".join(list(tokenizer.special_ids)[:12])
        raise ConfigError(
            field,
            f"the rows' tokenizer has no special token {name!r}; train one with it among the tokenizer stage's "
            f"special_tokens and pack again, or name one that nothing else uses of {known}",
        )
    return tokenizer.special_ids[name]
