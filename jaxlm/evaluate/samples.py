"""What a model in training says to the same prompts, from one evaluation to the next."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm.base.config import check
from jaxlm.model.config import ModelConfig
from jaxlm.model.weights import Params
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.decoding import prepare
from jaxlm.sample.sampler import Sampler
from jaxlm.tokenizer.chat import ChatTemplate
from jaxlm.tokenizer.tokenizer import Tokenizer
from jaxlm.train.metrics_writer import cut_back
from jaxlm.train.state import TrainState

logger = logging.getLogger("jaxlm")

MOST_TOKENS = 64  # of an answer: short enough to be read at every evaluation

Evaluate = Callable[[TrainState], dict[str, float]]


def with_samples(
    evaluate: Evaluate,
    config: Any,
    model: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    whole: Callable[[Params], Params] = lambda params: params,
) -> Evaluate:
    """`evaluate`, after which each of a stage's `config.sample_prompts` is continued, or with a template answered.

    What was said goes into WORKDIR/completions.jsonl. The average speaks where there is one; `whole`: a state's
    parameters → all of the model's. The same step says the same again, so that a run that went back and comes by once
    more replaces its lines. Raises ConfigError for prompts that leave no room in a row.
    """
    prompts, row_length = config.sample_prompts, config.row_length
    if not prompts:
        return evaluate
    sampler = Sampler(model, tokenizer, ends=template.stop_ids if template else ())
    path = Path(config.workdir) / "completions.jsonl"

    def encoded(prompt: str) -> list[int]:
        return template.prompt([{"role": "user", "content": prompt}]) if template else sampler.encode(prompt)

    # Drawn, not the likeliest, which repeats itself in a young model.
    sampling = SamplingConfig(max_tokens=min(MOST_TOKENS, row_length // 2), temperature=0.8)
    asked = [encoded(prompt) for prompt in prompts]
    for index, ids in enumerate(asked):
        most = row_length - sampling.max_tokens
        check(0 < len(ids) <= most, f"sample_prompts[{index}]", f"has {len(ids)} tokens; 1 to {most} are possible")

    def both(state: TrainState) -> dict[str, float]:
        figures = evaluate(state)
        said = sampler.generate(prepare(model, whole(state.ema or state.params)), asked, sampling)
        step = int(state.step)
        lines = [
            {"step": step, "prompt": prompt, "answer": completion.text, "stop_reason": completion.stop_reason}
            for prompt, completion in zip(prompts, said, strict=True)
        ]
        if jax.process_index() == 0:
            try:
                cut_back(path, step - 1)
                with open(path, "ab") as file:
                    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            except OSError as error:
                logger.warning("the samples of step %d could not be written: %s", step, error.strerror or error)
        return figures

    return both
