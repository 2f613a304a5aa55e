"""The depth dial: one number, and model, batch, learning rate and horizon that suit each other.

What a config gives stays; what it leaves at 0 is derived here. Standard library only.
"""

import dataclasses

from jaxlm.base.config import check
from jaxlm.model.config import ModelConfig

# Width over depth. Between 30 and 130 the loss at a given size hardly changes (arXiv:2001.08361, figure 5); 64 keeps
# the head count equal to the depth and every size a multiple of 64, which matrix units like.
ASPECT = 64
HEAD_SIZE = 64
# Tokens per parameter at which a given compute is best spent (arXiv:2203.15556, table 3).
TOKENS_PER_PARAMETER = 20


@dataclasses.dataclass(frozen=True)
class Dial:
    model: ModelConfig
    batch_rows: int
    steps: int
    peak: float


def matrix_parameters(model: ModelConfig) -> int:
    """Weights of the matrix products, head included, embedding lookup not: what FLOPs are counted by."""
    attention = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
    if (c := model.latent).kv_rank:
        N, P, M = model.head_size, model.rope_size, c.value_size
        queries = c.query_rank * (model.width + model.heads * N) if c.query_rank else model.width * model.heads * N
        keys_and_values = model.width * (c.kv_rank + P) + c.kv_rank * model.heads * (N - P + M)
        attention = queries + keys_and_values + model.heads * M * model.width
    return model.layers * (attention + 3 * model.width * model.feed_forward) + model.width * model.vocab_size


def derive(
    depth: int, model: ModelConfig, *, vocab_size: int, row_length: int, batch_rows: int, steps: int, peak: float
) -> Dial:
    """Fills in the zeros. Raises ConfigError where there is neither a value nor a depth to derive it from."""
    width = model.width or depth * ASPECT
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or vocab_size,
        layers=model.layers or depth,
        width=width,
        heads=model.heads or max(width // HEAD_SIZE, 1),
    ).complete()
    few = f"{model.learned_positions} are too few for rows of {row_length} tokens"
    check(not 0 < model.learned_positions < row_length, "model.learned_positions", few)
    parameters = matrix_parameters(model)
    tokens = TOKENS_PER_PARAMETER * parameters
    # Training FLOPs C of that horizon. Best batch and rate were measured as powers of C, B = 0.2920 C^0.3271 tokens
    # and 0.3118 C^-0.1250, over 1e17 to 2e19 FLOPs (arXiv:2401.02954, section 3.1): larger runs have less noise to
    # average out early and more to lose from a large step.
    flops = 6 * parameters * tokens
    if not batch_rows:
        batch_rows = max(1 << round_log2(0.2920 * flops**0.3271 / row_length), 1)
    return Dial(
        model=model,
        batch_rows=batch_rows,
        steps=steps or max(round(tokens / (batch_rows * row_length)), 1),
        peak=peak or 0.3118 * flops**-0.1250,
    )


def round_log2(value: float) -> int:
    """The power of two nearest to `value`, as its exponent; devices divide powers of two."""
    exponent = 0
    while 2.0 ** (exponent + 0.5) < value:
        exponent += 1
    return exponent
